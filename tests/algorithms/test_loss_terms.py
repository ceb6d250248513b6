"""Each term of the loss and each statistic beside it, against sums that are written out in plain Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from algorithm_batches import LIMIT, algorithm, text
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm, Batch
from llm_pg.algorithms.loss import CLIPPED
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.rollouts import Rollouts

JUNK = -77.0  # outside the mask
# Two completions of two tokens and of one; the rewards are their advantages.
PRESENT = [[-1.0, -0.5], [-2.0, JUNK]]
ADVANTAGE = [1.0, -2.0]
TOKENS = [(0, 0), (0, 1), (1, 0)]


def rows(**others: Any) -> Rollouts:
    made = text(ADVANTAGE, length_B=[2, 1], **others)
    made.logp_BT = torch.tensor(PRESENT)
    return made


def plain(**changes: Any) -> Algorithm:
    """REINFORCE of whole returns: the advantage of a token is the reward of its completion, over two completions."""
    return algorithm("reinforce", **changes)


def moved(by: list[list[float]]) -> Tensor:
    """The present log-probabilities less these."""
    return torch.tensor(PRESENT) - torch.tensor(by)


def value(made: Algorithm, batch: Batch, **given: Any) -> float:
    return float(made.loss(torch.tensor(PRESENT), batch, **given)[0])


PLAIN = -(1.0 * (-1.0 - 0.5) + -2.0 * -2.0) / 2


def test_the_plain_loss_is_minus_the_weighted_log_probabilities() -> None:
    made = plain()
    loss, stats = made.loss(torch.tensor(PRESENT, requires_grad=True), made.compute_advantages(rows()))
    assert float(loss.detach()) == pytest.approx(PLAIN)
    assert float(stats["policy_loss"]) == pytest.approx(PLAIN)
    assert loss.requires_grad
    assert not any(stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_loss_without_statistics_is_the_same_loss(name: str) -> None:
    made = algorithm(name)
    batch = made.compute_advantages(rows(value_BT=torch.zeros(2, 2), greedy_B=torch.zeros(2)))
    measured, short = (made.loss(torch.tensor(PRESENT), batch, measure=measure) for measure in (True, False))
    assert torch.equal(measured[0], short[0])
    always = {"policy_loss", *(["correction_bounded"] if made.spec.vllm_importance_sampling_correction else [])}
    assert set(short[1]) == always
    ratios = {"clip_fraction", "clip_ratio/low_mean", "clip_ratio/high_mean", "approx_kl", "sampler_gap"}
    assert set(measured[1]) == {*always, *ratios}


def test_an_adaptive_penalty_adds_its_weight_times_the_kl_from_the_old_policy() -> None:
    """k3 of the old one first: e^d - 1 - d, where d = log π - log π_old."""
    made, without = plain(kl_target=0.01), plain()
    made.load_state_dict({"running_mean": {"sum": 0.0, "weight": 0.0}, "kl_penalty": 3.0})
    d = [[0.3, -0.4], [0.5, 0.0]]
    batch = dataclasses.replace(made.compute_advantages(rows()), proximal_logp_BT=moved(d))
    kl = sum(math.expm1(d[i][t]) - d[i][t] for i, t in TOKENS) / 2
    assert value(made, batch) == pytest.approx(PLAIN + 3.0 * kl, rel=1e-5)
    assert value(without, batch) == pytest.approx(PLAIN)


def test_an_adaptive_penalty_begins_at_one_and_keeps_to_its_own_target() -> None:
    made = plain(kl_target=0.25)
    assert made.kl_penalty is not None
    assert (made.kl_penalty.weight, made.kl_penalty.target) == (1.0, 0.25)
    assert plain().kl_penalty is None
    plain().observe_kl(100.0)  # nothing to move


@pytest.mark.parametrize("corrected", [False, True])
def test_a_penalty_in_the_loss_is_that_of_the_reference_and_may_be_multiplied_by_the_ratio(corrected: bool) -> None:
    """k3: e^-k - 1 + k with k = log π - log ref."""
    made = plain(beta=0.2, kl_placement="loss", kl_estimator="k3", use_bias_correction_kl=corrected)
    k, d = [[0.5, -0.25], [1.0, 0.0]], [[0.3, -0.4], [0.5, 0.0]]
    batch = made.compute_advantages(rows(ref_logp_BT=moved(k)))
    batch = dataclasses.replace(batch, proximal_logp_BT=moved(d))
    kl = sum(
        (math.expm1(-k[i][t]) + k[i][t]) * (math.exp(d[i][t]) if corrected else 1.0) for i, t in TOKENS
    )  # over two completions
    assert value(made, batch) == pytest.approx(PLAIN + 0.2 * kl / 2, rel=1e-5)


def test_a_reference_without_a_penalty_is_in_no_loss() -> None:
    """Nor is one whose penalty is in the reward: its place is left empty."""
    there = rows(ref_logp_BT=moved([[0.5, -0.25], [1.0, 0.0]]))
    for changes in ({"beta": 0.0, "kl_placement": "loss"}, {"beta": 0.2, "kl_placement": "reward"}):
        assert plain(**changes).compute_advantages(there).ref_logp_BT is None
    kept = plain(beta=0.2, kl_placement="loss").compute_advantages(there).ref_logp_BT
    assert kept is there.ref_logp_BT


def test_the_ratio_of_a_whole_completion_counts_once_in_the_loss_and_its_gradient_for_each_token() -> None:
    """rloo: the ratio is the product over the row, e^(0.3 - 0.4) and e^0.5."""
    made = algorithm("rloo", epsilon=100.0, baseline="none")
    batch = dataclasses.replace(made.compute_advantages(rows()), proximal_logp_BT=moved([[0.3, -0.4], [0.5, 0.0]]))
    logp_BT = torch.tensor(PRESENT, requires_grad=True)
    loss = made.loss(logp_BT, batch)[0]
    ratios = [math.exp(-0.1), math.exp(0.5)]
    assert float(loss.detach()) == pytest.approx(-(ratios[0] * 1.0 + ratios[1] * -2.0) / 2, rel=1e-5)
    loss.backward()
    assert logp_BT.grad is not None
    assert logp_BT.grad[0].tolist() == pytest.approx([-ratios[0] / 2] * 2, rel=1e-5)
    assert float(logp_BT.grad[1, 0]) == pytest.approx(2 * ratios[1] / 2, rel=1e-5)


def test_the_widths_of_clipping_and_the_bound_of_the_ratio_are_the_rows() -> None:
    """Ratios e^0.5, e^-0.5 and e; above they are held to 1.4, where the advantage is negative to 2."""
    options = {"surrogate": "clip", "importance_sampling_level": "token", "epsilon": 0.2}
    d = [[0.5, -0.5], [1.0, 0.0]]
    for changes, terms in (
        ({"epsilon_high": 0.4, "delta": 2.0}, [-1.4, -math.exp(-0.5), 2 * 2.0]),
        ({"epsilon_high": 0.4}, [-1.4, -math.exp(-0.5), 2 * math.e]),
        ({"delta": 2.0}, [-1.2, -math.exp(-0.5), 2 * 2.0]),
        ({}, [-1.2, -math.exp(-0.5), 2 * math.e]),
    ):
        made = plain(**options, **changes)
        batch = dataclasses.replace(made.compute_advantages(rows()), proximal_logp_BT=moved(d))
        assert value(made, batch) == pytest.approx(sum(terms) / 2, rel=1e-5)


@pytest.mark.parametrize("surrogate", ["clip", "reinforce"])
def test_a_ratio_on_the_edge_of_the_range_and_an_advantage_of_zero_are_not_counted_as_clipped(surrogate: str) -> None:
    """On the edge the gradient still passes; without an advantage there is none to hold back."""
    spec = dataclasses.replace(ALGORITHMS["grpo"], epsilon=0.25, surrogate=surrogate)
    ratio_BT = torch.tensor([[0.75, 1.25, 0.5, 1.5, 0.5, 1.5]])
    advantage_BT = torch.tensor([[-1.0, 1.0, 0.0, 0.0, -1.0, 1.0]])
    found = CLIPPED[surrogate](spec, torch.zeros_like(ratio_BT), ratio_BT, advantage_BT)
    assert found.tolist() == [[False, False, False, False, True, True]]


# Ratios of tokens: above, below and inside the range; the second completion has a negative advantage.
D = [[0.5, -0.5], [0.5, 0.0]]


@pytest.mark.parametrize(
    "surrogate, changes, low, high",
    [
        ("clip", {"epsilon": 0.2}, [], [(0, 0)]),  # a negative advantage is clipped below alone
        ("clip", {"epsilon": 0.2, "epsilon_high": 0.9}, [], []),
        ("reinforce", {"epsilon": 0.2}, [], [(0, 0)]),  # those that clipping would meet
        ("cispo", {"epsilon_high": 1.2}, [(1, 0)], [(0, 0)]),  # the bound is that of the ratio itself
        ("cispo", {"epsilon_high": 1.7}, [], []),
        ("sapo", {}, [], []),
        ("vespo", {}, [], []),
    ],
)
def test_clipped_tokens_are_counted_by_the_sign_of_their_advantage(
    surrogate: str, changes: dict[str, float], low: list[Any], high: list[Any]
) -> None:
    made = plain(surrogate=surrogate, importance_sampling_level="token", **changes)
    batch = dataclasses.replace(made.compute_advantages(rows()), proximal_logp_BT=moved(D))
    stats = made.loss(torch.tensor(PRESENT), batch)[1]
    found = [float(stats[name]) for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_fraction")]
    assert found == pytest.approx([len(low) / 3, len(high) / 3, (len(low) + len(high)) / 3])


def test_a_ratio_under_the_range_is_clipped_where_the_advantage_is_negative() -> None:
    made = plain(surrogate="clip", importance_sampling_level="token", epsilon=0.2, epsilon_high=9.0)
    below = [[-0.5, -0.5], [-0.5, 0.0]]
    batch = dataclasses.replace(made.compute_advantages(rows()), proximal_logp_BT=moved(below))
    stats = made.loss(torch.tensor(PRESENT), batch)[1]
    assert float(stats["clip_ratio/low_mean"]) == pytest.approx(1 / 3)
    assert float(stats["clip_ratio/high_mean"]) == 0.0


def test_the_kl_of_an_update_and_the_gap_of_the_sampler_are_means_over_tokens() -> None:
    """The one between the old policy and the present, the other between the sampler and the old policy."""
    made, gap = plain(), [[0.25, -0.5], [1.0, 50.0]]
    batch = made.compute_advantages(rows())
    batch.rollouts.logp_BT = moved(D) + torch.tensor(gap)
    stats = made.loss(torch.tensor(PRESENT), dataclasses.replace(batch, proximal_logp_BT=moved(D)))[1]
    kl = sum(math.expm1(D[i][t]) - D[i][t] for i, t in TOKENS) / 3
    assert float(stats["approx_kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(stats["sampler_gap"]) == pytest.approx((0.25 + 0.5 + 1.0) / 3, rel=1e-5)


@pytest.mark.parametrize(
    "mode, low, high, factors, bounded",
    [
        ("token_truncate", None, 1.2, [1.2, math.exp(-0.5), 1.2], 2),
        ("token_truncate", 0.9, 1.2, [1.2, 0.9, 1.2], 3),
        ("token_mask", None, 1.2, [0.0, math.exp(-0.5), 0.0], 2),
        ("sequence_truncate", None, 1.2, [1.0, 1.0, 1.2], 1),  # e^(0.5 - 0.5) and e^0.5
        ("sequence_mask", None, 1.2, [1.0, 1.0, 0.0], 1),
        ("sequence_mask", 1.1, None, [0.0, 0.0, math.exp(0.5)], 2),
    ],
)
def test_a_correction_for_the_sampler_multiplies_the_policy_term_and_says_where_it_was_bounded(
    mode: str, low: float | None, high: float | None, factors: list[float], bounded: int
) -> None:
    """By the policy of before the update over the sampler; the KL of the loss is left alone."""
    made = plain(
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        beta=0.2,
        kl_placement="loss",
        kl_estimator="k2",
    )
    batch = made.compute_advantages(rows(ref_logp_BT=moved([[1.0, 1.0], [1.0, 0.0]])))
    batch.rollouts.logp_BT = moved(D)
    loss, stats = made.loss(torch.tensor(PRESENT), batch)
    terms = [-ADVANTAGE[i] * PRESENT[i][t] * factor for (i, t), factor in zip(TOKENS, factors, strict=True)]
    assert float(loss) == pytest.approx(sum(terms) / 2 + 0.2 * 3 * 0.5 / 2, rel=1e-5)
    assert float(stats["correction_bounded"]) == pytest.approx(bounded / 3)
    assert "off_policy_masked" not in stats


@pytest.mark.parametrize("threshold, dropped", [(0.6, 0), (0.4, 1)])
def test_a_completion_that_the_policy_has_left_is_dropped_and_counted(threshold: float, dropped: int) -> None:
    """The second one lost half a nat a token since it was sampled; the first one too, and has a positive advantage."""
    made = plain(off_policy_mask_threshold=threshold)
    batch = made.compute_advantages(rows())
    batch.rollouts.logp_BT = moved([[-0.5, -0.5], [-0.5, 0.0]])
    loss, stats = made.loss(torch.tensor(PRESENT), batch)
    assert float(loss) == pytest.approx(PLAIN if not dropped else 1.5 / 2)
    assert float(stats["off_policy_masked"]) == pytest.approx(dropped / 3)
    assert "correction_bounded" not in stats


def test_a_completion_of_no_advantage_is_not_counted_as_dropped() -> None:
    """There is nothing to drop; the one below it is."""
    made = plain(off_policy_mask_threshold=0.4)
    rollouts = text([0.0, -2.0], length_B=[2, 1])
    rollouts.logp_BT = moved([[-0.5, -0.5], [-0.5, 0.0]])
    stats = made.loss(torch.tensor(PRESENT), made.compute_advantages(rollouts))[1]
    assert float(stats["off_policy_masked"]) == pytest.approx(1 / 3)


def test_a_bonus_is_taken_off_the_loss_and_not_off_the_policys_part_of_it() -> None:
    made = plain(entropy_coef=0.5)
    entropy_BT = torch.tensor([[0.25, 1.0], [2.0, 9.0]])
    loss, stats = made.loss(torch.tensor(PRESENT), made.compute_advantages(rows()), entropy_BT=entropy_BT)
    assert float(loss) == pytest.approx(PLAIN - 0.5 * 3.25 / 3)
    assert float(stats["policy_loss"]) == pytest.approx(PLAIN)
    assert float(stats["entropy"]) == pytest.approx(3.25 / 3)
    loss, stats = plain().loss(torch.tensor(PRESENT), plain().compute_advantages(rows()), entropy_BT=entropy_BT)
    assert float(loss) == pytest.approx(PLAIN)
    assert float(stats["entropy"]) == pytest.approx(3.25 / 3)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_critics_loss_is_half_a_mean_square_and_may_hold_back_its_moves(clip: float | None) -> None:
    """The targets are the rewards, 1 and -2; the critic was at 0 and is at 0.4."""
    made = algorithm("a2c", vf_coef=0.25, value_clip=clip)
    batch = made.compute_advantages(rows(value_BT=torch.zeros(2, 2)))
    loss, stats = made.loss(torch.tensor(PRESENT), batch, value_BT=torch.full((2, 2), 0.4))
    errors = [0.6, 0.6, 2.4] if clip is None else [0.9, 0.9, 2.4]  # the larger of V and of V within 0.1 of what it was
    assert float(stats["value_loss"]) == pytest.approx(sum(0.5 * e * e for e in errors) / 3)
    assert float(loss) == pytest.approx(float(stats["policy_loss"]) + 0.25 * float(stats["value_loss"]))
    assert float(stats["policy_loss"]) == pytest.approx(2 * PLAIN / 3)  # a2c is a mean over tokens
    assert "value_loss" not in made.loss(torch.tensor(PRESENT), batch)[1]


def test_values_without_a_target_are_in_no_loss() -> None:
    made = plain()
    batch = made.compute_advantages(rows(value_BT=torch.ones(2, 2)))
    assert batch.value_target_BT is None
    assert batch.old_value_BT is None
    assert value(made, batch, value_BT=torch.ones(2, 2)) == pytest.approx(PLAIN)


def test_a_loss_of_ones_own_takes_the_surrogates_place_and_every_other_term_is_added() -> None:
    seen: list[Batch] = []

    def mine(logp_BT: Tensor, batch: Batch) -> Tensor:
        seen.append(batch)
        return 10 * (logp_BT * batch.mask_BT).sum()

    made = plain(loss=mine, beta=0.2, kl_placement="loss", kl_estimator="k2", entropy_coef=0.5)
    batch = made.compute_advantages(rows(ref_logp_BT=moved([[1.0, 1.0], [1.0, 0.0]])))
    loss, stats = made.loss(torch.tensor(PRESENT), batch, entropy_BT=torch.ones(2, 2))
    assert float(stats["policy_loss"]) == pytest.approx(10 * (-1.0 - 0.5 - 2.0) + 0.2 * 3 * 0.5 / 2)
    assert float(loss) == pytest.approx(float(stats["policy_loss"]) - 0.5)
    assert seen[0].proximal_logp_BT is not None  # those of the first pass are its own
    assert seen[0].proximal_logp_BT[batch.mask_BT].tolist() == [-1.0, -0.5, -2.0]
    assert batch.proximal_logp_BT is None


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, [True, False]),
        ({"entropy_coef": 0.1}, [True, True]),
        ({"kl_target": 0.01}, [True, True]),
        ({"beta": 0.1, "kl_placement": "loss"}, [True, True]),
        ({"beta": 0.1, "kl_placement": "reward", "kl_estimator": "k1"}, [True, False]),
        ({"baseline": "value"}, [True, True]),
    ],
)
def test_a_row_of_weight_zero_is_passed_where_something_else_needs_it(
    changes: dict[str, Any], kept: list[bool]
) -> None:
    made = plain(**changes)
    unscored = Rollouts.of_scored_text(
        mask_BT=torch.ones(3, 2, dtype=torch.bool),
        logp_BT=-torch.ones(3, 2),
        group_B=torch.zeros(3, dtype=torch.int64),
        reward_B=[1.0, 0.0, None],
        ref_logp_BT=-torch.ones(3, 2),
        value_BT=torch.zeros(3, 2),
    )
    assert made.contributes_B(made.compute_advantages(unscored)).tolist() == [*kept, False]


def test_a_row_with_a_single_weighted_step_is_passed() -> None:
    made = plain()
    batch = dataclasses.replace(made.compute_advantages(rows()), advantage_BT=torch.tensor([[0.0, -1.0], [0.0, 5.0]]))
    assert made.contributes_B(batch).tolist() == [True, False]  # what is outside the mask is no weight


def test_nothing_to_sum_is_zero_in_every_statistic() -> None:
    made = algorithm("ppo", entropy_coef=0.1)
    nothing = text([None, None], value_BT=torch.zeros(2, 3))
    loss, stats = made.loss(
        nothing.logp_BT, made.compute_advantages(nothing), entropy_BT=torch.ones(2, 3), value_BT=torch.ones(2, 3)
    )
    assert float(loss) == 0.0
    assert {name: float(stat) for name, stat in stats.items()} == dict.fromkeys(stats, 0.0)


def test_one_completion_of_one_token_is_its_own_mean() -> None:
    """A denominator of 1 is no less than 1; under every reduction."""
    for loss_type in ("sequence_sum", "grpo", "dapo", "bnpo"):
        batch = plain(loss_type=loss_type).compute_advantages(text([1.0], length_B=[1]))
        assert batch.loss_scale_BT.tolist() == [[1.0]], loss_type
        assert float(batch.num_tokens) == 1.0
    constant = plain(loss_type="dr_grpo").compute_advantages(text([1.0], length_B=[1]))
    assert constant.loss_scale_BT.tolist() == [[pytest.approx(1 / LIMIT)]]


@pytest.mark.parametrize("loss_type", ["sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo"])
def test_what_the_loss_reads_has_the_precision_of_the_log_probabilities(loss_type: str) -> None:
    """A third in float32 is off in the eighth digit."""
    rollouts = text([1.0, 0.0, 2.0], length_B=[1, 1, 1], entropy_BT=torch.full((3, 1), 0.5).double())
    rollouts.logp_BT, rollouts.reward_BT = rollouts.logp_BT.double(), rollouts.reward_BT.double()
    rollouts.discount_BT = rollouts.discount_BT.double()
    made = plain(entropy_coef=0.5, top_entropy_quantile=0.99, loss_type=loss_type, baseline="batch_mean")
    batch = made.compute_advantages(rollouts)
    assert batch.bonus_BT is not None
    for tensor in (batch.bonus_BT, batch.loss_scale_BT, batch.advantage_BT, batch.num_tokens):
        assert tensor.dtype == torch.float64
    assert batch.bonus_BT.tolist() == [[1 / 3]] * 3
    assert batch.loss_scale_BT.tolist() == [[1 / 3 / (LIMIT if loss_type == "dr_grpo" else 1)]] * 3


def test_the_bonus_of_a_single_kept_token_is_its_entropy() -> None:
    rollouts = text([1.0, 0.0], length_B=[1, 1], entropy_BT=torch.tensor([[0.1], [0.9]]))
    made = plain(entropy_coef=0.5, top_entropy_quantile=0.5)
    batch = made.compute_advantages(rollouts)
    assert batch.bonus_BT is not None
    assert batch.bonus_BT.tolist() == [[0.0], [1.0]]
