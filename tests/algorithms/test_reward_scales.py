"""What is divided by a deviation does not depend on the size of the rewards: squares from 1e19 on overflow float32."""

import dataclasses

import pytest
import torch
from algorithm_batches import LIMIT
from hypothesis import given
from hypothesis import strategies as st

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import batch_std, group_std
from llm_pg.rollouts import Rollouts

SCALED: dict[str, AlgorithmSpec] = {
    name: row
    for name, row in ALGORITHMS.items()
    if (row.scale_rewards in ("group", "batch") or row.normalize_advantages != "none") and not row.needs_critic
}
SCALED["scaled by the batch"] = dataclasses.replace(ALGORITHMS["rloo"], scale_rewards="batch")
SCALED["normalised rollouts"] = dataclasses.replace(ALGORITHMS["reinforce"], normalize_advantages="rollouts")
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS = st.lists(st.integers(-5, 5), min_size=8, max_size=8).filter(lambda r: len(set(r[:4])) > 1 < len(set(r[4:])))


def rollouts(reward_B: torch.Tensor) -> Rollouts:
    return Rollouts.of_scored_text(
        mask_BT=torch.arange(3) < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3]).unsqueeze(1),
        logp_BT=torch.full((8, 3), -1.0, dtype=reward_B.dtype),
        group_B=GROUPS,
        reward_B=reward_B,
    )


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(SCALED))
@given(rewards=REWARDS, exponent=st.integers(0, 36))
def test_weights_do_not_depend_on_the_scale_of_the_rewards(name: str, rewards: list[int], exponent: int) -> None:
    """float64, whose squares overflow at 1e154, says what float32 has to find, up to the constant below a deviation."""
    scale = 10.0**exponent
    exact_B = torch.tensor(rewards, dtype=torch.float64) * scale
    algorithm = Algorithm(SCALED[name], max_completion_length=LIMIT)
    expected = algorithm.compute_advantages(rollouts(exact_B)).advantage_BT
    found = algorithm.compute_advantages(rollouts(exact_B.float())).advantage_BT.double()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) > 0.1


@pytest.mark.parametrize("exponent", range(-30, 37, 3))
def test_a_deviation_has_the_scale_of_its_numbers(exponent: int) -> None:
    x_B = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10.0**exponent
    valid_B = torch.tensor([True] * 7 + [False])
    halves = [x_B[:4].std(), x_B[4:7].std()]
    found_B = group_std(x_B.float(), GROUPS, valid_B).double()
    assert torch.allclose(found_B[[0, 4]], torch.stack(halves), rtol=1e-5, atol=0)
    assert torch.allclose(batch_std(x_B.float(), valid_B).double(), x_B[:7].std(), rtol=1e-5, atol=0)


@given(st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8))
def test_at_ordinary_sizes_a_deviation_is_the_plain_formula_to_the_last_bit(numbers: list[float]) -> None:
    """A power of two is taken out and put back, which rounds nothing, so runs of before repeat bit for bit."""
    x_B = torch.tensor(numbers, dtype=torch.float32)
    x_B = torch.where(x_B.abs() < 1e-10, torch.zeros_like(x_B), x_B)
    valid_B = torch.ones(8, dtype=torch.bool)
    one = torch.zeros(8, dtype=torch.int64)
    centre = x_B.min() + (x_B - x_B.min()).sum() / 8
    plain = (((x_B - centre) ** 2).sum() / 7).sqrt()
    assert torch.equal(group_std(x_B, one, valid_B), plain.expand(8))
