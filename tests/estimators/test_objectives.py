"""Weights for the best of k completions and for the likelihood of success, against enumeration and closed forms."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from llm_pg.estimators.baselines import leave_one_out, length_weighted_mean
from llm_pg.estimators.objectives import best_of_k, over_the_mean

ONE_GROUP = torch.zeros(6, dtype=torch.long)
ALL = torch.ones(6, dtype=torch.bool)
GRADED = torch.tensor([0.3, -1.0, 2.0, 0.3, 0.9, 0.0], dtype=torch.float64)
VERDICTS = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)


def by_sets(x: list[float], k: int) -> list[float]:
    """The definition, over every set of companions."""
    out = []
    for i, own in enumerate(x):
        others = x[:i] + x[i + 1 :]
        with_it = [max((own, *some)) for some in itertools.combinations(others, k - 1)]
        without = [max(some) for some in itertools.combinations(others, k)]
        out.append(k * (sum(with_it) / len(with_it) - sum(without) / len(without)))
    return out


@pytest.mark.parametrize("x_B", [GRADED, VERDICTS])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_best_of_k_is_averaged_over_every_set_of_companions(x_B: Tensor, k: int) -> None:
    found = best_of_k(x_B, ONE_GROUP, ALL, k)
    assert found.tolist() == pytest.approx(by_sets(x_B.tolist(), k), abs=1e-12)
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-12)


def test_the_best_of_one_is_leave_one_out() -> None:
    assert torch.allclose(best_of_k(GRADED, ONE_GROUP, ALL, 1), GRADED - leave_one_out(GRADED, ONE_GROUP, ALL))


def test_the_best_of_one_of_a_pair_is_the_difference_from_the_other() -> None:
    found = best_of_k(torch.tensor([3.0, 1.0]), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool), 1)
    assert found.tolist() == [2.0, -2.0]


def test_a_verdict_among_k_fellows_has_the_closed_form_of_pass_at_k() -> None:
    """c successes among n - 1 others: a success adds C(n-1-c, k-1)/C(n-1, k-1) before the baseline."""
    k, n, right = 3, 6, 2
    found = best_of_k(VERDICTS, ONE_GROUP, ALL, k)
    fails = [math.comb(n - 1 - c, k) / math.comb(n - 1, k) for c in (right - 1, right)]
    adds = 1 - math.comb(n - 1 - right, k - 1) / math.comb(n - 1, k - 1)
    assert float(found[1]) == pytest.approx(k * (1 - (1 - fails[0])))
    assert float(found[0]) == pytest.approx(k * (adds - (1 - fails[1])))


def test_groups_and_unscored_rollouts_do_not_reach_each_others_best() -> None:
    x_B = torch.cat([GRADED, torch.tensor([50.0, 7.0, 7.0, 60.0], dtype=torch.float64)])
    order = torch.tensor([9, 3, 0, 6, 1, 8, 2, 5, 7, 4])
    group_B = torch.tensor([0] * 6 + [1] * 4)[order]
    valid_B = torch.tensor([True] * 6 + [True, True, True, False])[order]
    found = torch.zeros(10, dtype=torch.float64)
    found[order] = best_of_k(x_B[order], group_B, valid_B, 2)
    assert found[:6].tolist() == pytest.approx(by_sets(GRADED.tolist(), 2))
    assert found[6:].tolist() == pytest.approx([*by_sets([50.0, 7.0, 7.0], 2), 0.0])


def test_a_group_without_k_others_weighs_nothing() -> None:
    some_B = torch.tensor([True, True, True, False, False, False])
    assert best_of_k(GRADED, ONE_GROUP, some_B, 3).tolist() == [0.0] * 6
    assert best_of_k(GRADED, ONE_GROUP, some_B, 2).abs().sum() > 0


def test_over_the_mean_a_success_weighs_the_failures_over_the_successes() -> None:
    """(1 - c/n)/(c/n) = (n - c)/c for a success, -1 for a failure, 0 for a group without success."""
    x_B = torch.cat([VERDICTS, torch.zeros(2, dtype=torch.float64)])
    group_B = torch.tensor([0] * 6 + [1] * 2)
    advantage_BT = (x_B - torch.tensor([1 / 3] * 6 + [0.0] * 2, dtype=torch.float64)).unsqueeze(1)
    found = over_the_mean(advantage_BT, x_B, group_B, torch.ones(8, dtype=torch.bool)).squeeze(1)
    assert found.tolist() == pytest.approx([-1.0, 2.0, -1.0, -1.0, 2.0, -1.0, 0.0, 0.0])


def test_a_length_weighted_mean_is_the_mean_over_all_tokens_of_the_group() -> None:
    length_B = torch.tensor([1, 4, 2, 2, 5, 1])
    of_tokens = torch.repeat_interleave(GRADED, length_B).mean()
    found = length_weighted_mean(GRADED, length_B, ONE_GROUP, ALL)
    assert torch.allclose(found, of_tokens.expand(6), rtol=1e-12)
    half_B = torch.tensor([True, True, False, False, False, True])
    some = torch.repeat_interleave(GRADED[half_B], length_B[half_B]).mean()
    assert float(length_weighted_mean(GRADED, length_B, ONE_GROUP, half_B)[0]) == pytest.approx(float(some))
