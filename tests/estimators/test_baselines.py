"""What is subtracted and what it is divided by, by hand and by identity."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.estimators.baselines import (
    RunningMean,
    batch_mean,
    batch_std,
    group_mean,
    group_std,
    leave_one_out,
)

REWARDS = st.lists(st.floats(-5, 5, allow_nan=False), min_size=6, max_size=6)
GROUPS = torch.tensor([0, 1, 0, 1, 1, 0])
ALL = torch.ones(6, dtype=torch.bool)


@given(REWARDS)
@settings(max_examples=40, deadline=None)
def test_leave_one_out_is_the_mean_of_the_others_of_the_group(rewards: list[float]) -> None:
    found = leave_one_out(torch.tensor(rewards, dtype=torch.float64), GROUPS, ALL)
    for i in range(6):
        others = [rewards[j] for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]
        assert float(found[i]) == pytest.approx(statistics.fmean(others), abs=1e-12)


@given(REWARDS)
@settings(max_examples=40, deadline=None)
def test_leave_one_out_advantages_are_the_centred_ones_times_g_over_g_minus_one(rewards: list[float]) -> None:
    reward_B = torch.tensor(rewards, dtype=torch.float64)
    centred = reward_B - group_mean(reward_B, GROUPS, ALL)
    assert torch.allclose(reward_B - leave_one_out(reward_B, GROUPS, ALL), 1.5 * centred, atol=1e-12)


@given(REWARDS)
@settings(max_examples=40, deadline=None)
def test_deviations_have_the_divisor_n_minus_one(rewards: list[float]) -> None:
    reward_B = torch.tensor(rewards, dtype=torch.float64)
    found = group_std(reward_B, GROUPS, ALL)
    for group in (0, 1):
        inside = [rewards[j] for j in range(6) if GROUPS[j] == group]
        assert float(found[group == GROUPS][0]) == pytest.approx(statistics.stdev(inside), abs=1e-9)
    assert float(batch_std(reward_B, ALL)) == pytest.approx(statistics.stdev(rewards), abs=1e-9)


def test_groups_never_mix() -> None:
    """The reward of one prompt must not move another prompt's baseline or deviation."""
    reward_B = torch.tensor([1.0, 5.0, 3.0, 7.0, 9.0, 2.0], dtype=torch.float64)
    moved_B = torch.where(GROUPS == 1, reward_B + 100, reward_B)
    for function in (group_mean, leave_one_out, group_std):
        same = function(reward_B, GROUPS, ALL)[GROUPS == 0]
        assert torch.equal(same, function(moved_B, GROUPS, ALL)[GROUPS == 0])


def test_rows_that_could_not_be_scored_enter_no_statistic() -> None:
    reward_B = torch.tensor([1.0, 2.0, 1e9, 4.0, 6.0, 3.0], dtype=torch.float64)
    valid_B = torch.tensor([True, True, False, True, True, True])
    assert leave_one_out(reward_B, GROUPS, valid_B)[[0, 5]].tolist() == [3.0, 1.0]
    assert float(group_mean(reward_B, GROUPS, valid_B)[0]) == 2.0
    assert float(batch_mean(reward_B, valid_B)) == pytest.approx(3.2)
    assert float(batch_std(reward_B, valid_B)) == pytest.approx(statistics.stdev([1, 2, 4, 6, 3]))


def test_a_rollout_with_nobody_to_compare_with_gets_advantage_zero_and_no_nan() -> None:
    reward_B, group_B = torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    alone = torch.ones(2, dtype=torch.bool)
    assert (reward_B - leave_one_out(reward_B, group_B, alone)).tolist() == [0.0, 0.0]
    assert group_std(reward_B, group_B, alone).tolist() == [0.0, 0.0]


def test_batch_statistics_of_two_ranks_are_those_of_all_rows() -> None:
    """Two ranks in two threads, whose `all_sum` really adds what both give."""
    reward_B = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
    shards = [reward_B[:2], reward_B[2:]]
    given: list[list[torch.Tensor]] = [[], []]
    meet = threading.Barrier(2)

    def rank(i: int) -> tuple[float, float]:
        def all_sum(x: torch.Tensor) -> torch.Tensor:
            given[i].append(x)
            meet.wait(timeout=10)
            turn = len(given[i]) - 1
            total = given[0][turn] + given[1][turn]
            meet.wait(timeout=10)
            return total

        valid_B = torch.ones(len(shards[i]), dtype=torch.bool)
        return float(batch_mean(shards[i], valid_B, all_sum)), float(batch_std(shards[i], valid_B, all_sum))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert found[0] == found[1] == pytest.approx((float(reward_B.mean()), float(reward_B.std())))


def test_a_running_mean_starts_at_the_first_batch_and_is_read_before_it() -> None:
    mean = RunningMean(decay=0.9)
    assert mean.value == 0.0
    mean.update(4.0)
    assert mean.value == pytest.approx(4.0)
    mean.update(torch.tensor(10.0))
    assert mean.value == pytest.approx((0.9 * 0.1 * 4 + 0.1 * 10) / (0.9 * 0.1 + 0.1))
    again = RunningMean(decay=0.9)
    again.load_state_dict(mean.state_dict())
    assert again.value == mean.value


@pytest.mark.parametrize("number", [3, 7, 8, 24, 64, 100, 512])
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 0.9, -2.3])
def test_equal_rewards_are_the_batch_mean_to_the_last_bit(value: float, number: int) -> None:
    """Else a batch without any difference has weights of 1e-8, of which Adam makes whole steps."""
    reward_B = torch.full((number,), value)
    valid_B = torch.arange(number) != 1
    mean = batch_mean(reward_B, valid_B)
    assert (reward_B - mean).abs().max() == 0.0
    assert batch_std(reward_B, valid_B) == 0.0


def test_a_batch_of_one_is_its_own_mean_and_a_pair_deviates_by_its_difference_over_the_root_of_two() -> None:
    one = torch.tensor([True, False])
    assert batch_mean(torch.tensor([3.0, 9.0]), one).item() == 3.0
    assert batch_std(torch.tensor([3.0, 9.0]), one).item() == 0.0
    assert batch_std(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).item() == pytest.approx(2**0.5)
