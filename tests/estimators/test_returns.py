"""Returns and advantages along a row: identities between them, and sums written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.estimators.returns import gae, next_values, reward_to_go, td_error, total_return

F64 = torch.float64


def rows(seed: int, rows: int = 4, steps: int = 6, cuts: bool = True) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (rows, steps)
    ends = torch.rand(shape, generator=g) < 0.2
    cut_BT = (torch.rand(shape, generator=g) < 0.2) & ~ends if cuts else torch.zeros(shape, dtype=torch.bool)
    return {
        "reward_BT": torch.randn(shape, generator=g, dtype=F64),
        "discount_BT": 0.9 * (~ends).to(F64),
        "cut_BT": cut_BT,
        "bootstrap_BT": torch.randn(shape, generator=g, dtype=F64),
    }


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_gae_at_lambda_one_is_the_return_minus_the_value(seed: int) -> None:
    """The telescoping sum of TD errors, across ends and cuts."""
    x = rows(seed)
    value_BT = torch.randn(x["reward_BT"].shape, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    # The last column is an end or a cut of every row; without one the sum would miss V after it.
    x["discount_BT"][:, -1] = 0
    advantage = gae(x["reward_BT"], value_BT, x["discount_BT"], x["cut_BT"], x["bootstrap_BT"], 1.0)
    assert torch.allclose(advantage + value_BT, reward_to_go(**x), atol=1e-12)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_gae_at_lambda_zero_is_the_td_error(seed: int) -> None:
    x = rows(seed)
    value_BT = torch.randn(x["reward_BT"].shape, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    arguments = (x["reward_BT"], value_BT, x["discount_BT"], x["cut_BT"], x["bootstrap_BT"])
    assert torch.equal(gae(*arguments, 0.0), td_error(*arguments))


def test_gae_is_the_exponential_average_of_n_step_advantages() -> None:
    """(1-λ) Σ λ^(n-1) A^(n) with the rest of the weight on the longest, as the paper defines it."""
    lam, gamma, reward = 0.7, 0.9, [1.0, -2.0, 0.5, 3.0]
    value = [0.3, -0.4, 1.1, 0.2]
    steps = len(reward)
    n_step = []
    for n in range(1, steps + 1):
        tail = gamma**n * value[n] if n < steps else 0.0
        n_step.append(sum(gamma**k * reward[k] for k in range(n)) + tail - value[0])
    average = (1 - lam) * sum(lam ** (n - 1) * n_step[n - 1] for n in range(1, steps)) + lam ** (steps - 1) * n_step[-1]
    discount_BT = torch.tensor([[gamma, gamma, gamma, 0.0]], dtype=F64)
    nothing = torch.zeros(1, steps, dtype=F64)
    found = gae(
        torch.tensor([reward], dtype=F64), torch.tensor([value], dtype=F64), discount_BT, nothing.bool(), nothing, lam
    )
    assert float(found[0, 0]) == pytest.approx(average, rel=1e-12)


def test_lambda_may_differ_from_row_to_row() -> None:
    x = rows(3)
    value_BT = torch.ones_like(x["reward_BT"])
    arguments = (x["reward_BT"], value_BT, x["discount_BT"], x["cut_BT"], x["bootstrap_BT"])
    mixed = gae(*arguments, torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=F64))
    for row, lam in enumerate((0.0, 0.5, 1.0, 0.5)):
        assert torch.allclose(mixed[row], gae(*arguments, lam)[row], atol=1e-14)


def test_an_episode_pays_nothing_back_across_its_end_and_a_cut_bootstraps() -> None:
    reward_BT = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=F64)
    discount_BT = torch.tensor([[0.5, 0.0, 0.5, 0.5]], dtype=F64)
    cut_BT = torch.tensor([[False, False, False, True]])
    bootstrap_BT = torch.full((1, 4), 8.0, dtype=F64)
    found = reward_to_go(reward_BT, discount_BT, cut_BT, bootstrap_BT)
    assert found.tolist() == [[6.0, 10.0, 602.0, 1004.0]]


def test_total_return_is_the_reward_to_go_of_the_first_step_without_cuts() -> None:
    x = rows(5, cuts=False)
    assert torch.allclose(total_return(x["reward_BT"], x["discount_BT"]), reward_to_go(**x)[:, 0], atol=1e-12)


def test_the_value_after_a_step_is_the_next_column_or_the_bootstrap_value() -> None:
    value_BT = torch.tensor([[1.0, 2.0, 3.0]])
    cut_BT = torch.tensor([[False, True, False]])
    assert next_values(value_BT, cut_BT, torch.full((1, 3), 9.0)).tolist() == [[2.0, 9.0, 0.0]]
