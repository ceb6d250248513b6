"""What the corrections for old completions leave of the gradient: every completion of a small policy is listed."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.rollouts import Rollouts

F64 = torch.float64
V, T = 3, 3
ROWS = list(itertools.product(range(V), repeat=T))
# A state is the tokens so far; the policy is a table of logits, one row a state.
STATES = {s: i for i, s in enumerate(s for t in range(T) for s in itertools.product(range(V), repeat=t))}
STATE_BT = torch.tensor([[STATES[row[:t]] for t in range(T)] for row in ROWS])
TOKEN_BT = torch.tensor(ROWS)
REWARD_B = torch.rand(len(ROWS), generator=torch.Generator().manual_seed(5), dtype=F64)


def logp(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[STATE_BT, TOKEN_BT]


def policies(apart: float) -> tuple[Tensor, Tensor]:
    """The present policy's logits, and those of an older one."""
    g = torch.Generator().manual_seed(1)
    present = torch.randn(len(STATES), V, generator=g, dtype=F64)
    return present, present + apart * torch.randn(len(STATES), V, generator=g, dtype=F64)


def exact(logits: Tensor) -> Tensor:
    """The gradient of the expected reward, by autograd through the probabilities."""
    logits = logits.clone().requires_grad_()
    (logp(logits).sum(1).exp() * REWARD_B).sum().backward()
    assert logits.grad is not None
    return logits.grad


def expected_update(present: Tensor, older: Tensor, **changes: object) -> Tensor:
    """The mean of the update over completions of the older policy, through the algorithm's own loss."""
    row = dataclasses.replace(ALGORITHMS["reinforce"], returns="total", loss_type="sequence_sum", **changes)  # type: ignore[arg-type]
    algorithm, share_B = Algorithm(row), logp(older).sum(1).exp()
    logits, everything = present.clone().requires_grad_(), torch.ones(len(ROWS), T, dtype=torch.bool)
    rollouts = Rollouts.of_scored_text(
        mask_BT=everything, logp_BT=logp(older), group_B=torch.arange(len(ROWS)), reward_B=REWARD_B
    )
    batch = algorithm.compute_advantages(rollouts)
    batch.loss_scale_BT = share_B.unsqueeze(1) * everything  # the mean over completions is a sum by their probability
    algorithm.loss(logp(logits), batch)[0].backward()
    assert logits.grad is not None
    return -logits.grad


def corrected(mode: str, clip_max: float | None) -> dict[str, object]:
    return {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": clip_max,
    }


def bias(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_fresh_completions_have_no_bias_with_and_without_a_correction() -> None:
    present, _ = policies(0.0)
    for changes in ({}, corrected("token_truncate", 3.0), corrected("sequence_truncate", 3.0)):
        assert bias(expected_update(present, present, **changes), exact(present)) < 1e-12


@pytest.mark.parametrize("apart", [0.1, 0.5, 1.0])
def test_the_whole_ratio_without_a_bound_takes_the_age_away(apart: float) -> None:
    present, older = policies(apart)
    assert bias(expected_update(present, older), exact(present)) > 0.03
    assert bias(expected_update(present, older, **corrected("sequence_truncate", None)), exact(present)) < 1e-12


@pytest.mark.parametrize("apart", [0.1, 0.5, 1.0])
def test_the_ratio_of_a_token_gives_the_gradient_on_the_older_policys_paths(apart: float) -> None:
    """Σ_s d_old(s) Σ_a ∇π(a|s) Q_old(s, a): states come, and go on, as the older policy has it. By recursion over
    states, without a ratio."""
    present, older = policies(apart)
    probability = older.softmax(-1)
    reward = dict(zip(ROWS, REWARD_B.tolist(), strict=True))

    def value(state: tuple[int, ...]) -> float:
        if len(state) == T:
            return reward[state]
        return sum(float(probability[STATES[state], a]) * value((*state, a)) for a in range(V))

    wanted = torch.zeros_like(present)
    for state, place in STATES.items():
        visits = 1.0
        for t, token in enumerate(state):
            visits *= float(probability[STATES[state[:t]], token])
        pi = present[place].softmax(-1)
        q = torch.tensor([value((*state, a)) for a in range(V)], dtype=F64)
        wanted[place] = visits * pi * (q - (pi * q).sum())  # the gradient of Σ π·q by the logits of a softmax
    found = expected_update(present, older, **corrected("token_truncate", None))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert bias(found, exact(present)) > 0.01


def test_the_bias_of_each_correction_grows_with_the_distance_and_is_largest_without_one() -> None:
    """‖mean update - ∇J‖ / ‖∇J‖, to the digits that docs/many.md tells."""
    found = {}
    for apart in (0.1, 0.3, 1.0):
        present, older = policies(apart)
        for name, changes in (
            ("none", {}),
            ("token", corrected("token_truncate", 3.0)),
            ("sequence", corrected("sequence_truncate", 3.0)),
        ):
            found[name, apart] = bias(expected_update(present, older, **changes), exact(present))
    told = {"none": [0.26, 0.79, 2.52], "token": [0.05, 0.16, 0.60], "sequence": [0.00, 0.00, 0.41]}
    for name, numbers in told.items():
        assert [round(found[name, apart], 2) for apart in (0.1, 0.3, 1.0)] == numbers
