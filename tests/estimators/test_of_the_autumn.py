"""Deviations of the others, sums of normalised scores, geometric means and divergences, against plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.estimators.baselines import STD_EPS, leave_one_out_std, sum_of_normalised
from llm_pg.estimators.surrogates import gmpo, outside_divergence
from llm_pg.rollouts import Rollouts

GROUPS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
VALUES = [1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 4.0, 0.7, 0.2, 5.0]


def test_the_deviation_of_the_others_leaves_each_rollout_out() -> None:
    group_B, valid_B = torch.tensor(GROUPS), torch.ones(10, dtype=torch.bool)
    valid_B[5] = False
    found = leave_one_out_std(torch.tensor(VALUES, dtype=torch.float64), group_B, valid_B).tolist()
    for i, value in enumerate(found):
        if not valid_B[i]:
            continue
        others = [v for j, v in enumerate(VALUES) if j != i and GROUPS[j] == GROUPS[i] and valid_B[j]]
        assert value == pytest.approx(statistics.stdev(others) if len(others) > 1 else 0.0, abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e6])
def test_equal_others_have_no_deviation_to_the_last_bit(value: float) -> None:
    x_B = torch.tensor([value + 1, *[value] * 6])
    assert leave_one_out_std(x_B, torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool))[0] == 0


def test_the_one_success_of_a_group_keeps_its_advantage_where_the_others_say_nothing_of_a_scale() -> None:
    rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(4, 1), logp_BT=-torch.ones(4, 1), group_B=torch.zeros(4, dtype=torch.int64),
        reward_B=[1.0, 0.0, 0.0, 0.0],
    )  # fmt: skip
    found = Algorithm("rloo", scale_rewards="leave_one_out").compute_advantages(rollouts).advantage_BT[:, 0]
    others = statistics.stdev([1.0, 0.0, 0.0])
    assert found.tolist() == pytest.approx([1.0, *[-1 / 3 / others] * 3])


def test_each_functions_scores_are_normalised_in_their_group_and_weighed() -> None:
    part_B = torch.tensor([[1.0, 10.0], [0.0, 30.0], [1.0, math.nan], [0.0, 20.0], [9.0, 9.0]], dtype=torch.float64)
    weight_B = torch.tensor([2.0, -1.0], dtype=torch.float64).expand(5, 2)
    group_B, valid_B = torch.tensor([0, 0, 0, 0, 1]), torch.ones(5, dtype=torch.bool)
    found = sum_of_normalised(part_B, weight_B, group_B, valid_B).tolist()

    def z(column: list[float], value: float) -> float:
        return (value - statistics.mean(column)) / (statistics.stdev(column) + STD_EPS)

    first, second = [1.0, 0.0, 1.0, 0.0], [10.0, 30.0, 20.0]
    expected = [
        2 * z(first, a) - (0 if b is None else z(second, b)) for a, b in zip(first, [10, 30, None, 20], strict=True)
    ]
    assert found == pytest.approx([*expected, 0.0])


def test_the_geometric_mean_clips_each_log_ratio_on_the_side_that_gains() -> None:
    ratio_BT = torch.tensor([[2.0, 0.5, 7.0], [0.5, 1.1, 1.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    advantage_BT = torch.tensor([[1.5] * 3, [-2.0] * 3], dtype=torch.float64)
    logs = [[min(math.log(2.0), 0.4), math.log(0.5)], [max(math.log(0.5), -0.3), math.log(1.1), 0.0]]
    means = [math.exp(statistics.mean(row)) for row in logs]
    term_BT = gmpo(ratio_BT, mask_BT, advantage_BT, 0.3, 0.4)
    assert term_BT[0, 0].item() == pytest.approx(-1.5 * means[0])
    assert term_BT[1].tolist() == pytest.approx([2.0 * means[1]] * 3)


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize("now, old", [(0.6, 0.3), (0.3, 0.6), (3e-4, 1e-4), (0.99, 0.7), (0.05, 0.5)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_is_dropped_where_it_moved_on_further_than_the_divergence(
    kind: str, now: float, old: float, advantage: float
) -> None:
    tv = abs(now - old)
    kl = old * math.log(old / now) + (1 - old) * math.log((1 - old) / (1 - now))
    divergence, leads_away = tv if kind == "binary_tv" else kl, (now > old) == (advantage > 0)
    for bound in (0.9 * divergence, 1.1 * divergence):
        found = outside_divergence(
            torch.tensor([[math.log(now)]], dtype=torch.float64), torch.tensor([[now / old]], dtype=torch.float64),
            torch.tensor([[advantage]]), kind, bound, bound,
        )  # fmt: skip
        assert found.item() == (leads_away and divergence > bound)


def test_each_direction_has_its_own_bound() -> None:
    logp_BT, ratio_BT = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[2.0, 0.5]])
    ahead = outside_divergence(logp_BT, ratio_BT, torch.tensor([[1.0, -1.0]]), "binary_tv", 0.2, 0.4)
    assert ahead.tolist() == [[False, True]]
