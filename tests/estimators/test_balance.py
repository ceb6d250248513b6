"""The load-balancing loss of a mixture of experts, by hand and by its cuts."""

import math

import pytest
import torch

from llm_pg.estimators.balance import choices, load_balancing

# two layers, two tokens, three experts; probabilities whose logarithms are the logits
PROBABILITY = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]]])
WEIGHT = torch.tensor([1.0, 3.0])


def routers() -> list[torch.Tensor]:
    return [layer.log().requires_grad_() for layer in PROBABILITY]


@pytest.mark.parametrize(("top_k", "expected"), [(1, [4.0, 3.0, 1.0]), (2, [5.0, 7.0, 4.0]), (3, [8.0, 8.0, 8.0])])
def test_the_choices_count_each_token_by_its_weight_in_every_layer(top_k: int, expected: list[float]) -> None:
    counts_E = choices(routers(), WEIGHT, top_k)
    assert counts_E.tolist() == expected
    assert not counts_E.requires_grad


def test_the_loss_is_the_number_of_experts_times_the_shares_chosen_times_the_mean_probabilities() -> None:
    """f = (4, 3, 1)/8; P = (0.5 + 0.3 + 0.2 + 1.8, 0.3 + 1.8 + 0.1 + 0.9, 0.2 + 0.9 + 0.7 + 0.3)/8."""
    logits = routers()
    total = torch.tensor(8.0)
    counts_E = choices(logits, WEIGHT, 1)
    loss = load_balancing(logits, WEIGHT, counts_E, total)
    assert loss.item() == pytest.approx(3 * (4 * 2.8 + 3 * 3.1 + 1 * 2.1) / 64)
    pieces = [load_balancing([x[n : n + 1] for x in logits], WEIGHT[n : n + 1], counts_E, total) for n in range(2)]
    assert sum(piece.item() for piece in pieces) == pytest.approx(loss.item())
    loss.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in logits)


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_used_alike_have_the_loss_top_k_also_in_half_precision(top_k: int) -> None:
    """Two tokens of three experts each way round; the probabilities are equal, and the choices are given."""
    logits = [torch.full((6, 3), math.log(1 / 3), dtype=torch.bfloat16)]
    weight = torch.ones(6, dtype=torch.int64)
    loss = load_balancing(logits, weight, torch.full((3,), 2.0 * top_k), torch.tensor(6.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(top_k, rel=1e-6)
    assert choices(logits, weight, 3).tolist() == [6.0, 6.0, 6.0]
