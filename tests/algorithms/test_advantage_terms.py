"""What the advantages are made of: rewards less penalties, critics, functions of one's own; and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from algorithm_batches import algorithm, on_two_ranks, text

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import STD_EPS, AllSum
from llm_pg.rollouts import Rollouts


def test_greedy_rewards_may_be_of_another_precision_than_the_others() -> None:
    rollouts = text([1.0, 0.0], greedy_B=torch.tensor([0.25, 0.25], dtype=torch.float64))
    batch = algorithm("remax").compute_advantages(rollouts)
    assert batch.advantage_BT[:, 0].tolist() == [0.75, -0.25]
    assert batch.advantage_BT.dtype == torch.float32


def test_without_a_name_the_algorithm_is_reinforce() -> None:
    assert Algorithm().spec == ALGORITHMS["reinforce"]
    assert Algorithm().max_completion_length is None
    assert Algorithm("reinforce_plus_plus", 3, baseline_decay=0.5).running_mean.decay == 0.5


@pytest.mark.parametrize("estimator, kl", [("k1", [0.5, -0.25]), ("k2", [0.125, 0.03125])])
def test_a_penalty_in_the_reward_is_paid_at_each_token(estimator: str, kl: list[float]) -> None:
    """Credit of the first token: the verdict less all of it; of the last one: less its own."""
    made = algorithm("reinforce", beta=2.0, kl_placement="reward", kl_estimator=estimator)
    rollouts = text([1.0], length_B=[2], ref_logp_BT=torch.tensor([[-1.5, -0.75]]))
    found = made.compute_advantages(rollouts).advantage_BT.tolist()
    assert found == [pytest.approx([1 - 2 * sum(kl), 1 - 2 * kl[1]])]
    assert rollouts.reward_BT.tolist() == [[0.0, 1.0]]  # what was paid is left as it was


def test_a_penalty_on_truncated_completions_is_paid_at_their_last_token_and_by_them_alone() -> None:
    made = algorithm("reinforce", truncated="penalize", truncation_penalty=0.25)
    rollouts = text([1.0, 1.0], length_B=[2, 1], truncated_B=torch.tensor([True, False]))
    rollouts.reward_BT = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert made.compute_advantages(rollouts).advantage_BT.tolist() == [[0.75, 0.25], [1.0, 0.0]]
    kept = algorithm("reinforce", truncated="keep", truncation_penalty=0.25).compute_advantages(rollouts)
    assert kept.advantage_BT.tolist() == [[1.0, 0.5], [1.0, 0.0]]


def critic_rows() -> Rollouts:
    """Three steps and one step, with rewards at every step, and values."""
    rollouts = text([0.0, 0.0], length_B=[3, 1], value_BT=torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0]]))
    rollouts.reward_BT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    return rollouts


def td_sum(deltas: list[float], lam: float) -> list[float]:
    """Σ λ^k δ_{t+k}."""
    return [sum(lam**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


DELTAS = [1.0 + 1.0 - 0.5, 2.0 - 1.0 - 1.0, 3.0 + 1.0]  # r + V(s') - V(s) of the first row
VALUES = [0.5, 1.0, -1.0]


@pytest.mark.parametrize("lam, lam_value", [(0.5, None), (0.5, 1.0), (0.0, 0.25), (1.0, 0.0)])
def test_advantages_and_targets_of_a_critic_have_a_lambda_each(lam: float, lam_value: float | None) -> None:
    made = algorithm("a2c", lam=lam, lam_value=lam_value)
    batch = made.compute_advantages(critic_rows())
    of_targets = lam if lam_value is None else lam_value
    assert batch.advantage_BT[0].tolist() == pytest.approx(td_sum(DELTAS, lam))
    assert batch.value_target_BT is not None
    expected = [v + a for v, a in zip(VALUES, td_sum(DELTAS, of_targets), strict=True)]
    assert batch.value_target_BT[0].tolist() == pytest.approx(expected)
    assert batch.value_target_BT[1, 0] == 4.0
    assert not batch.value_target_BT.requires_grad
    assert torch.equal(batch.old_value_BT, critic_rows().value_BT)  # type: ignore[arg-type]


@pytest.mark.parametrize("lam_value", [None, 1.0])
def test_a_lambda_by_length_is_that_of_the_advantages_alone(lam_value: float | None) -> None:
    """1 - 1/(0.5 · 3) = 1/3 for the row of three steps; the targets keep `lam`, or `lam_value`."""
    made = algorithm("a2c", lam=0.5, lam_value=lam_value, lam_length_alpha=0.5)
    batch = made.compute_advantages(critic_rows())
    assert batch.advantage_BT[0].tolist() == pytest.approx(td_sum(DELTAS, 1 / 3))
    assert batch.advantage_BT.dtype == torch.float32
    assert batch.value_target_BT is not None
    expected = [v + a for v, a in zip(VALUES, td_sum(DELTAS, lam_value or 0.5), strict=True)]
    assert batch.value_target_BT[0].tolist() == pytest.approx(expected)


def test_targets_carry_no_gradient_of_the_values_they_are_made_of() -> None:
    rollouts = critic_rows()
    rollouts.value_BT = rollouts.value_BT.requires_grad_()  # type: ignore[union-attr]
    batch = algorithm("a2c", lam=0.5).compute_advantages(rollouts)
    assert batch.value_target_BT is not None
    assert not batch.value_target_BT.requires_grad


@pytest.mark.parametrize("bootstrap", [None, 10.0])
def test_a_cut_row_goes_on_with_the_value_after_it_and_with_nothing_where_there_is_none(
    bootstrap: float | None,
) -> None:
    rollouts = critic_rows()
    rollouts.cut_BT = torch.tensor([[False, False, True], [False, False, False]])
    rollouts.discount_BT = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    rollouts.bootstrap_BT = None if bootstrap is None else torch.full((2, 3), bootstrap)
    made = algorithm("a2c", lam=1.0)
    found = made.compute_advantages(rollouts).value_target_BT
    assert found is not None
    after = bootstrap or 0.0
    assert found[0].tolist() == pytest.approx([6.0 + after, 5.0 + after, 3.0 + after])
    rollouts.value_BT = torch.tensor([[6.0 + after, 5.0 + after, 3.0 + after], [4.0, 0.0, 0.0]])
    assert made.explained_variance(rollouts, rollouts.mask_BT) == pytest.approx(1.0)


def test_explained_variance_is_of_the_steps_that_count_on_all_ranks() -> None:
    """Of a critic that says 0: 0. Of two ranks with the same rows: the same. Of rows that do not vary: None."""
    made, rollouts = algorithm("a2c"), critic_rows()
    rollouts.value_BT = torch.zeros(2, 3)
    assert made.explained_variance(rollouts, rollouts.mask_BT) == pytest.approx(0.0, abs=1e-12)
    returns = [6.0, 5.0, 3.0]
    rollouts.value_BT = torch.tensor([[6.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[True, True, True], [False, False, False]])
    errors = [0.0, 5.0, 0.0]
    variance = [sum(x * x for x in xs) / 3 - (sum(xs) / 3) ** 2 for xs in (errors, returns)]
    expected = 1 - variance[0] / variance[1]
    assert made.explained_variance(rollouts, mask_BT) == pytest.approx(expected)
    told: list[int] = []

    def twice(x: torch.Tensor) -> torch.Tensor:
        told.append(x.numel())
        return 2 * x

    assert made.explained_variance(rollouts, mask_BT, twice) == pytest.approx(expected)
    assert told
    assert made.explained_variance(rollouts, torch.tensor([[True, False, False], [False] * 3])) is None


@pytest.mark.parametrize(
    "given, expected",
    [
        (lambda of: torch.tensor([3, -1]), [[3.0, 3.0], [-1.0, 0.0]]),
        (lambda of: torch.tensor([[3.0, 1.0], [-1.0, 9.0]], dtype=torch.float64), [[3.0, 1.0], [-1.0, 0.0]]),
        (lambda of: of.reward_BT.cumsum(1), [[0.0, 1.0], [2.0, 0.0]]),
    ],
)
def test_a_function_gives_one_weight_a_completion_or_one_a_step(given: Any, expected: list[list[float]]) -> None:
    batch = algorithm("reinforce", advantage=given).compute_advantages(text([1.0, 2.0], length_B=[2, 1]))
    assert batch.advantage_BT.tolist() == expected
    assert batch.advantage_BT.dtype == torch.float32
    assert batch.value_target_BT is None


def test_a_function_sees_the_rewards_less_the_penalties_and_changes_nothing_for_others() -> None:
    rollouts = text([1.0], length_B=[2], ref_logp_BT=torch.tensor([[-1.5, -0.75]]))
    seen: list[Rollouts] = []

    def mine(of: Rollouts) -> torch.Tensor:
        seen.append(of)
        return of.reward_BT.sum(1)

    made = algorithm("reinforce", beta=2.0, kl_placement="reward", kl_estimator="k1", advantage=mine)
    made.compute_advantages(rollouts)
    assert seen[0].reward_BT.tolist() == [[-1.0, 1.5]]
    assert seen[0].mask_BT is rollouts.mask_BT
    assert rollouts.reward_BT.tolist() == [[0.0, 1.0]]


def test_the_memory_of_a_running_mean_is_the_algorithms_own() -> None:
    """Means 1 and 3, the older one half as heavy: (0.5 · 1 + 3) / 1.5."""
    made = algorithm("reinforce", baseline="running_mean", baseline_decay=0.5)
    for reward in (1.0, 3.0):
        made.compute_advantages(text([reward, reward]))
    found = made.compute_advantages(text([0.0, 0.0])).advantage_BT
    assert found[0, 0] == pytest.approx(-3.5 / 1.5)
    assert set(made.state_dict()) == {"running_mean"}


def test_a_running_mean_counts_the_rows_of_all_ranks_and_no_unscored_one() -> None:
    """This rank has no scored row and another has: the mean moves all the same."""
    made = algorithm("reinforce", baseline="running_mean")
    made.compute_advantages(text([5.0, 5.0, None]))
    assert made.running_mean.value == pytest.approx(5.0)
    made.compute_advantages(text([None, None]), all_sum=lambda x: x + 1)
    assert made.running_mean.value != pytest.approx(5.0)


def test_a_running_mean_is_that_of_all_ranks() -> None:
    """Three completions of 3 here and one of 7 there."""

    def rank(number: int, all_sum: AllSum) -> float:
        made = algorithm("reinforce", baseline="running_mean")
        made.compute_advantages(text([[3.0, 3.0, 3.0], [7.0]][number]), all_sum=all_sum)
        return made.running_mean.value

    assert on_two_ranks(rank) == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"baseline": "batch_mean"}, [-1.0, 3.0]),
        ({"scale_rewards": "batch"}, [3.0 / (2.0 + STD_EPS), 7.0 / (2.0 + STD_EPS)]),
        ({"normalize_advantages": "rollouts"}, [-1.0 / (2.0 + STD_EPS), 3.0 / (2.0 + STD_EPS)]),
    ],
)
def test_means_and_deviations_of_the_batch_are_those_of_all_ranks(
    changes: dict[str, Any], expected: list[float]
) -> None:
    """3, 3, 3 and 7: mean 4, deviation 2."""

    def rank(number: int, all_sum: AllSum) -> float:
        made = algorithm("reinforce", **changes)
        rollouts = text([[3.0, 3.0, 3.0], [7.0]][number])
        return float(made.compute_advantages(rollouts, all_sum=all_sum).advantage_BT[0, 0])

    assert on_two_ranks(rank) == pytest.approx(expected)


def test_normalised_over_rollouts_a_completion_counts_once_whatever_its_length() -> None:
    """Of one, two and three tokens, each with its reward at every token: 1, 2 and 6 have mean 3 and deviation √7."""
    made = algorithm("reinforce", returns="total", normalize_advantages="rollouts")
    batch = made.compute_advantages(text([1.0, 2.0, 6.0], length_B=[1, 2, 3]))
    expected = [(x - 3.0) / (7**0.5 + STD_EPS) for x in (1.0, 2.0, 6.0)]
    assert batch.advantage_BT[:, 0].tolist() == pytest.approx(expected)
    assert batch.advantage_BT[0].tolist()[1:] == [0.0, 0.0]


def test_another_baseline_leaves_the_running_mean_alone() -> None:
    made = algorithm("reinforce", baseline="batch_mean")
    made.compute_advantages(text([5.0, 7.0]))
    assert made.running_mean.value == 0.0


def test_the_state_has_the_penalty_where_there_is_one_and_a_state_without_it_is_taken() -> None:
    made = algorithm("ppo", kl_target=0.01)
    made.observe_kl(1.0)
    assert made.state_dict() == {"running_mean": {"sum": 0.0, "weight": 0.0}, "kl_penalty": 2.0}
    made.load_state_dict(algorithm("ppo").state_dict())
    assert made.kl_penalty is not None
    assert made.kl_penalty.weight == 2.0
    algorithm("ppo").load_state_dict(made.state_dict())  # of a run with one, gone on from without


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("longest", [None, 0])
def test_a_reduction_by_a_constant_says_what_it_lacks(longest: int | None) -> None:
    with raises("loss_type dr_grpo divides by max_completion_length; give it to Algorithm (> 0)."):
        Algorithm("grpo", longest, loss_type="dr_grpo")
    assert Algorithm("grpo", longest).spec.name == "grpo"


def test_a_return_below_zero_under_a_mean_is_named_with_its_number() -> None:
    rollouts = text([1.0, 0.0])
    rollouts.reward_BT = torch.tensor([[1.0, 1.0, -2.5], [0.0, 0.0, 0.0]])
    with raises(
        "A completion has the reward -0.5, and maxrl divides by the mean reward of a group, which must not fall below "
        "0. Use rewards of 0 and 1, or algorithm rloo."
    ):
        algorithm("maxrl").check_rewards(rollouts)
    rollouts.reward_BT = torch.tensor([[1.0, 1.0, -1.5], [0.0, 0.0, 0.0]])
    algorithm("maxrl").check_rewards(rollouts)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("grpo", {"beta": 0.25}, "beta is 0.25, so the rollouts must carry ref_logp_BT."),
        ("rloo", {"beta": 0.25}, "beta is 0.25, so the rollouts must carry ref_logp_BT."),
        ("grpo", {"top_entropy_quantile": 0.5}, "top_entropy_quantile is 0.5: rollouts must carry entropy_BT."),
        ("ppo", {}, "baseline 'value' needs a critic: the rollouts carry no value_BT."),
        ("remax", {}, "baseline 'greedy' needs the reward of each prompt's greedy completion, greedy_B."),
        (
            "grpo",
            {"advantage": lambda of: [1.0, 2.0]},
            "The advantage function of algorithm grpo returned a list for 2 rollouts of 3 steps; it must return a "
            "tensor (2,), one weight a rollout, or (2, 3), one a step.",
        ),
        (
            "grpo",
            {"advantage": lambda of: torch.ones(3)},
            "The advantage function of algorithm grpo returned shape (3,) for 2 rollouts of 3 steps; it must return a "
            "tensor (2,), one weight a rollout, or (2, 3), one a step.",
        ),
    ],
)
def test_what_rollouts_lack_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with raises(message):
        algorithm(name, **changes).compute_advantages(text([1.0, 0.0], greedy_B=None))


@pytest.mark.parametrize(
    "loss, got",
    [(lambda logp_BT, batch: logp_BT.sum(1), "shape (2,)"), (lambda logp_BT, batch: 3.0, "a float")],
)
def test_a_loss_that_is_no_scalar_is_named_with_what_it_was(loss: Any, got: str) -> None:
    made, rollouts = algorithm("grpo", loss=loss), text([1.0, 0.0])
    with raises(
        f"The loss function of algorithm grpo returned {got}; it must return a scalar, the sum over its rows of terms "
        "times batch.loss_scale_BT. `llm-pg prove --loss FILE:FUNCTION` tries it."
    ):
        made.loss(rollouts.logp_BT, made.compute_advantages(rollouts))
