"""Values of a finite decision process, against sums over every path and every plan."""

import itertools

import pytest
import torch
from torch import Tensor

from llm_pg.estimators.tabular import expected_return, optimal_values, state_values

NUM_STATES, NUM_ACTIONS, HORIZON, DISCOUNT = 3, 2, 3, 0.7


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


POLICY_SA = _drawn(NUM_STATES, NUM_ACTIONS, seed=0).softmax(1)
TRANSITION_SAS = _drawn(NUM_STATES, NUM_ACTIONS, NUM_STATES, seed=1).softmax(2)
REWARD_SA = _drawn(NUM_STATES, NUM_ACTIONS, seed=2)
START_S = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def _by_paths(start: int, num_steps: int, discount: float, plan: tuple[tuple[int, ...], ...] | None = None) -> float:
    """E of the discounted rewards of `num_steps` steps from `start`, path by path; plan[t][s] is an action."""
    total = 0.0
    for actions in itertools.product(range(NUM_ACTIONS), repeat=num_steps):
        for later in itertools.product(range(NUM_STATES), repeat=num_steps):
            states, probability, reward = (start, *later), 1.0, 0.0
            for t, a in enumerate(actions):
                of_action = float(POLICY_SA[states[t], a]) if plan is None else float(plan[t][states[t]] == a)
                probability *= of_action * float(TRANSITION_SAS[states[t], a, states[t + 1]])
                reward += discount**t * float(REWARD_SA[states[t], a])
            total += probability * reward
    return total


@pytest.mark.parametrize("discount", [1.0, DISCOUNT])
def test_the_value_of_a_state_is_the_mean_over_every_path_of_the_steps_that_are_left(discount: float) -> None:
    value_TS = state_values(POLICY_SA, TRANSITION_SAS, REWARD_SA, HORIZON, discount)
    expected = [[_by_paths(s, HORIZON - t, discount) for s in range(NUM_STATES)] for t in range(HORIZON + 1)]
    assert torch.allclose(value_TS, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_values_are_not_discounted_unless_it_is_asked_for() -> None:
    unasked = state_values(POLICY_SA, TRANSITION_SAS, REWARD_SA, HORIZON)
    assert torch.equal(unasked, state_values(POLICY_SA, TRANSITION_SAS, REWARD_SA, HORIZON, 1.0))
    returned = expected_return(POLICY_SA, TRANSITION_SAS, REWARD_SA, START_S, HORIZON)
    assert returned == expected_return(POLICY_SA, TRANSITION_SAS, REWARD_SA, START_S, HORIZON, 1.0)


def test_the_expected_return_is_the_mean_over_the_starts() -> None:
    found = expected_return(POLICY_SA, TRANSITION_SAS, REWARD_SA, START_S, HORIZON, DISCOUNT)
    by_paths = sum(float(START_S[s]) * _by_paths(s, HORIZON, DISCOUNT) for s in range(NUM_STATES))
    assert float(found) == pytest.approx(by_paths, rel=1e-12)


def test_the_best_value_is_the_largest_that_any_plan_reaches() -> None:
    """A plan has an action for each of the steps that are left and each state."""
    best_TS = optimal_values(TRANSITION_SAS, REWARD_SA, 2)
    rules = list(itertools.product(range(NUM_ACTIONS), repeat=NUM_STATES))
    for t in range(3):
        plans = list(itertools.product(rules, repeat=2 - t))
        expected = [max(_by_paths(s, 2 - t, 1.0, plan) for plan in plans) for s in range(NUM_STATES)]
        assert best_TS[t].tolist() == pytest.approx(expected, rel=1e-12)
