"""What an algorithm does with scored rollouts: each line is a bug that a published trainer had."""

import dataclasses
import math

import pytest
import torch
from algorithm_batches import LIMIT, algorithm, make, text, weighed

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import STD_EPS
from llm_pg.estimators.kl import AdaptivePenalty
from llm_pg.rollouts import Rollouts, is_last

GROUPED = [name for name, row in ALGORITHMS.items() if row.needs_group]
APART = [
    name
    for name in GROUPED
    if ALGORITHMS[name].normalize_advantages == "none" and ALGORITHMS[name].scale_rewards != "batch"
]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("reward", [0.0, 0.7, 1.0, -3.3, 1e6])
def test_a_group_of_equal_rewards_weighs_nothing_to_the_last_bit(name: str, reward: float) -> None:
    """Dividing by a deviation of 0 gives NaN, and by one of rounding errors gives noise the size of a signal."""
    for size in (1, 2, 3, 7):
        batch = algorithm(name).compute_advantages(text([reward] * size))
        assert torch.equal(batch.advantage_BT, torch.zeros(size, 3))


@pytest.mark.parametrize("name", sorted(name for name, row in ALGORITHMS.items() if row.reward_coef))
def test_no_weight_is_nan_when_nothing_could_be_scored(name: str) -> None:
    nothing = text([None] * 4, value_BT=torch.zeros(4, 3))
    batch = algorithm(name).compute_advantages(nothing)
    assert torch.equal(batch.advantage_BT, torch.zeros(4, 3))
    assert not batch.mask_BT.any()
    assert not algorithm(name).contributes_B(batch).any()
    assert float(algorithm(name).loss(nothing.logp_BT, batch)[0]) == 0.0


def test_z_scores_are_the_rewards_less_their_mean_over_their_deviation() -> None:
    batch = algorithm("grpo").compute_advantages(
        text([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 7.0, 7.0], group_B=[0, 0, 0, 0, 1, 1, 1, 1])
    )
    first = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + STD_EPS)
    second = torch.tensor([-1.0, -1.0, 1.0, 1.0]) / (math.sqrt(4 / 3) + STD_EPS)
    assert torch.allclose(batch.advantage_BT[:, 0], torch.cat([first, second]), atol=1e-6)


@pytest.mark.parametrize("name", APART)
def test_the_rewards_of_one_prompt_move_no_weight_of_another(name: str) -> None:
    base = [1.0, 0.0, 0.0, 0.2, 0.5, 0.9]
    moved = [1.0, 0.0, 0.0, 9.2, -4.5, 3.9]
    groups = [0, 0, 0, 1, 1, 1]
    weights = [algorithm(name).compute_advantages(text(r, group_B=groups)).advantage_BT[:3] for r in (base, moved)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_beta_is_read_by_every_algorithm(name: str) -> None:
    """Whatever its placement, a penalty must change the gradient."""
    gradients = []
    for beta in (0.0, 0.3):
        rollouts, model = make(7)
        tried = algorithm(name, beta=beta)
        gradients.append(model.gradient(tried, tried.compute_advantages(rollouts))[0])
    assert float((gradients[0] - gradients[1]).norm()) > 1e-3 * float(gradients[0].norm())


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_a_penalty_pulls_toward_the_reference(placement: str) -> None:
    """The sign: with no reward, a step must raise the tokens that the reference likes better."""
    estimator = "k1" if placement == "reward" else "k3"
    row = AlgorithmSpec("kl", "", surrogate="reinforce", beta=1.0, kl_placement=placement, kl_estimator=estimator)
    logp_BT = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(2, 1),
        logp_BT=logp_BT.detach(),
        group_B=torch.zeros(2, dtype=torch.long),
        reward_B=torch.zeros(2),
        ref_logp_BT=torch.tensor([[-0.2], [-3.0]]),
    )
    tried = Algorithm(row)
    tried.loss(logp_BT, tried.compute_advantages(rollouts))[0].backward()
    assert logp_BT.grad is not None
    assert logp_BT.grad[0] < 0 < logp_BT.grad[1]


def test_beta_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="must carry ref_logp_BT"):
        algorithm("grpo", beta=0.04).compute_advantages(text([1.0, 0.0]))


def test_a_critics_algorithm_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a critic"):
        algorithm("ppo").compute_advantages(text([1.0, 0.0]))


def test_a_constant_denominator_without_its_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="max_completion_length"):
        Algorithm(ALGORITHMS["dr_grpo"])


def test_the_eos_is_in_the_mask_and_carries_the_verdict() -> None:
    rollouts = text([1.0, 2.0], length_B=[2, 4])
    assert rollouts.reward_BT.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]
    assert is_last(rollouts.mask_BT).tolist() == [[False, True, False, False], [False, False, False, True]]
    batch = algorithm("rloo").compute_advantages(rollouts)
    assert batch.mask_BT[0].tolist() == [True, True, False, False]
    assert batch.advantage_BT[0].tolist() == [-1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_last_token_of_a_completion_is_trained_like_any_other(name: str) -> None:
    """The stop token must get a gradient, or a policy never learns when to stop."""
    rollouts = text([1.0, 0.2, -0.5], length_B=[1, 2, 3], value_BT=torch.full((3, 3), 0.3))
    rollouts.teacher_logp_BT = rollouts.logp_BT - torch.tensor([[0.1], [0.4], [0.9]])
    logp_BT = rollouts.logp_BT.clone().requires_grad_()
    tried = algorithm(name)
    tried.loss(logp_BT, tried.compute_advantages(rollouts))[0].backward()
    assert logp_BT.grad is not None
    assert (logp_BT.grad[is_last(rollouts.mask_BT)] != 0).all()
    assert (logp_BT.grad[~rollouts.mask_BT] == 0).all()


def test_truncated_completions_follow_the_policy_that_is_named() -> None:
    rollouts = text([1.0, 0.0, 1.0, 0.0], truncated_B=torch.tensor([True, False, False, False]))
    kept, masked, fined = (
        algorithm("rloo", truncated=policy, truncation_penalty=0.6).compute_advantages(rollouts)
        for policy in ("keep", "mask", "penalize")
    )
    assert kept.advantage_BT[:, 0].tolist() == pytest.approx([2 / 3, -2 / 3, 2 / 3, -2 / 3])
    assert masked.mask_BT.any(1).tolist() == [False, True, True, True]
    assert masked.advantage_BT[0].tolist() == [0, 0, 0]
    assert masked.num_tokens == 9
    assert fined.advantage_BT[:, 0].tolist() == pytest.approx(
        [0.4 - 1 / 3, -0.8 / 1.5 + 0.2 / 3, 1 - 0.4 / 3, -1.4 / 3]
    )


def test_a_row_that_could_not_be_scored_enters_neither_baseline_nor_denominator() -> None:
    """What remains is the batch without it."""
    with_hole = algorithm("rloo").compute_advantages(text([1.0, None, 0.0, 0.5]))
    without = algorithm("rloo").compute_advantages(text([1.0, 0.0, 0.5]))
    keep = torch.tensor([0, 2, 3])
    assert torch.allclose(with_hole.advantage_BT[keep], without.advantage_BT)
    assert torch.allclose(with_hole.loss_scale_BT[keep], without.loss_scale_BT)
    assert with_hole.advantage_BT[1].tolist() == [0, 0, 0]


def test_the_denominators_are_those_of_the_whole_batch() -> None:
    rollouts = text([1.0, 0.0, 1.0], length_B=[1, 2, 4])
    token_mean = algorithm("dapo").compute_advantages(rollouts)
    assert token_mean.loss_scale_BT[rollouts.mask_BT].tolist() == pytest.approx([1 / 7] * 7)
    assert token_mean.rows(torch.tensor([0])).loss_scale_BT[0, 0] == pytest.approx(1 / 7)
    by_row = algorithm("grpo", loss_type="grpo").compute_advantages(rollouts)
    assert by_row.loss_scale_BT.sum(1).tolist() == pytest.approx([1 / 3] * 3)
    constant = algorithm("dr_grpo").compute_advantages(rollouts)
    assert constant.loss_scale_BT[rollouts.mask_BT].tolist() == pytest.approx([1 / (3 * LIMIT)] * 7)
    summed = algorithm("rloo").compute_advantages(rollouts)
    assert summed.loss_scale_BT[rollouts.mask_BT].tolist() == pytest.approx([1 / 3] * 7)


def test_logged_kl_and_entropy_are_means_over_completion_tokens_only() -> None:
    rollouts, _ = make(3)
    batch = weighed(algorithm("ppo"), rollouts, reused=True)
    logp_BT = torch.where(rollouts.mask_BT, rollouts.logp_BT + 0.1, torch.tensor(50.0, dtype=torch.float64))
    entropy_BT = torch.where(rollouts.mask_BT, 0.7, 1e6)
    stats = algorithm("ppo").loss(logp_BT, batch, entropy_BT=entropy_BT)[1]
    assert float(stats["entropy"]) == pytest.approx(0.7)
    assert float(stats["approx_kl"]) == pytest.approx(math.exp(0.1) - 1.1)
    assert float(stats["sampler_gap"]) == 0.0


def test_the_fraction_of_clipped_tokens_counts_only_those_without_a_gradient() -> None:
    rollouts = text([1.0, 0.0], length_B=[2, 2])
    tried = algorithm("grpo")
    batch = dataclasses.replace(tried.compute_advantages(rollouts), proximal_logp_BT=torch.full((2, 2), -1.0))
    logp_BT = torch.tensor([[-0.5, -1.5], [-0.5, -1.0]])  # ratios 1.65, 0.61 | 1.65, 1
    assert float(tried.loss(logp_BT, batch)[1]["clip_fraction"]) == 0.25


@pytest.mark.parametrize("name", sorted(name for name, row in ALGORITHMS.items() if row.surrogate != "reinforce"))
def test_a_second_pass_measures_its_ratio_from_the_policy_that_sampled(name: str) -> None:
    """Without the kept log-probabilities every ratio would be 1 and nothing would ever be clipped."""
    rollouts, model = make(11, generations=4, reused=True)
    tried = algorithm(name)
    kept = model.gradient(tried, weighed(tried, rollouts, reused=True))[0]
    forgotten = model.gradient(tried, weighed(tried, rollouts, reused=False))[0]
    assert float((kept - forgotten).norm()) > 1e-3 * float(kept.norm())


def test_the_entropy_bonus_moves_linearly_to_its_end() -> None:
    tried = algorithm("reinforce", entropy_coef=0.4, entropy_coef_final=0.0)
    coefs = [tried.compute_advantages(text([1.0, 0.0]), progress=p).entropy_coef for p in (-1.0, 0.0, 0.25, 1.0, 2.0)]
    assert coefs == pytest.approx([0.4, 0.4, 0.3, 0.0, 0.0])
    assert tried.compute_advantages(text([1.0, 0.0])).entropy_coef == 0.4


def test_the_entropy_bonus_raises_entropy() -> None:
    tried = algorithm("reinforce", entropy_coef=0.4)
    entropy_BT = torch.full((2, 3), 0.5, requires_grad=True)
    rollouts = text([0.0, 0.0])
    loss = tried.loss(rollouts.logp_BT, tried.compute_advantages(rollouts), entropy_BT=entropy_BT)[0]
    (gradient,) = torch.autograd.grad(loss, entropy_BT)
    assert torch.allclose(gradient, torch.full((2, 3), -0.4 / 6))


def test_opo_weighs_by_length() -> None:
    """Rewards 1, 0, 0 of lengths 1, 2, 5: the mean over all tokens is 1/8."""
    batch = algorithm("opo").compute_advantages(text([1.0, 0.0, 0.0], length_B=[1, 2, 5]))
    assert batch.advantage_BT[:, 0].tolist() == pytest.approx([7 / 8, -1 / 8, -1 / 8])


def test_reinforce_plus_plus_centres_and_scales_over_all_tokens_of_the_batch() -> None:
    """Two groups; token by token mean 0 and deviation 1, whatever the prompt."""
    rewards, groups, lengths = [1.0, 0.0, 3.0, 2.5], [0, 0, 1, 1], [1, 4, 2, 3]
    of_tokens = torch.repeat_interleave(torch.tensor(rewards), torch.tensor(lengths))
    plain = algorithm("reinforce_plus_plus").compute_advantages(text(rewards, group_B=groups, length_B=lengths))
    expected = (torch.tensor(rewards) - of_tokens.mean()) / (of_tokens.std() + STD_EPS)
    assert torch.allclose(plain.advantage_BT[:, 0], expected)
    centred = torch.tensor([0.5, -0.5, 0.25, -0.25])
    of_tokens = torch.repeat_interleave(centred, torch.tensor(lengths))
    grouped = algorithm("reinforce_plus_plus_baseline").compute_advantages(
        text(rewards, group_B=groups, length_B=lengths)
    )
    assert torch.allclose(grouped.advantage_BT[:, 0], (centred - of_tokens.mean()) / (of_tokens.std() + STD_EPS))


def test_remax_compares_with_the_greedy_completion_of_its_own_prompt() -> None:
    greedy_B = torch.tensor([1.0, 1.0, 0.0, 0.0])
    rollouts = text([1.0, 0.0, 1.0, 0.0], group_B=[0, 0, 1, 1], greedy_B=greedy_B)
    assert algorithm("remax").compute_advantages(rollouts).advantage_BT[:, 0].tolist() == [0.0, -1.0, 1.0, 0.0]
    rollouts.greedy_B = None
    with pytest.raises(ValueError, match="greedy_B"):
        algorithm("remax").compute_advantages(rollouts)


def test_a_likelihood_refuses_negative_rewards_and_a_mean_reward_does_not() -> None:
    negative = text([1.0, -0.5])
    with pytest.raises(ValueError, match=r"reward -0.5, and maxrl divides by the mean"):
        algorithm("maxrl").check_rewards(negative)
    algorithm("rloo").check_rewards(negative)
    algorithm("maxrl").check_rewards(text([1.0, 0.0]))


def test_tokens_of_low_entropy_weigh_nothing_and_still_count_in_the_denominator() -> None:
    rollouts = text([1.0, 0.0], length_B=[3, 2], entropy_BT=torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 9.0]]))
    whole, some = (algorithm("grpo", top_entropy_quantile=q).compute_advantages(rollouts) for q in (1.0, 0.4))
    kept_BT = torch.tensor([[False, True, False], [True, False, False]])
    assert torch.equal(some.advantage_BT, torch.where(kept_BT, whole.advantage_BT, torch.zeros(2, 3)))
    assert torch.equal(some.loss_scale_BT, whole.loss_scale_BT)
    rollouts.entropy_BT = None
    with pytest.raises(ValueError, match="entropy_BT"):
        algorithm("grpo", top_entropy_quantile=0.4).compute_advantages(rollouts)


def test_the_bonus_is_the_mean_entropy_of_the_tokens_that_are_kept() -> None:
    """As in TRL; the metric stays the mean over all tokens."""
    entropy_BT = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 9.0]])
    rollouts = text([1.0, 0.0], length_B=[3, 2], entropy_BT=entropy_BT)
    options = {"top_entropy_quantile": 0.4, "surrogate": "reinforce"}
    losses, stats = zip(
        *(
            made.loss(rollouts.logp_BT, made.compute_advantages(rollouts), entropy_BT=entropy_BT)
            for made in (algorithm("grpo", entropy_coef=coef, **options) for coef in (0.0, 0.5))
        ),
        strict=True,
    )
    assert float(losses[0] - losses[1]) == pytest.approx(0.5 * (0.9 + 0.8) / 2)
    assert float(stats[1]["entropy"]) == pytest.approx((0.1 + 0.9 + 0.2 + 0.8 + 0.3) / 5)


def test_the_critic_learns_the_returns() -> None:
    """At λ = 1 the value target is the reward-to-go, whatever the critic said before."""
    rollouts = text([1.0, 0.0], length_B=[3, 2], value_BT=torch.randn(2, 3))
    batch = algorithm("a2c").compute_advantages(rollouts)
    assert batch.value_target_BT is not None
    assert torch.allclose(batch.value_target_BT[rollouts.mask_BT], torch.tensor([1.0, 1, 1, 0, 0]), atol=1e-6)


def test_a_batch_that_could_not_be_scored_leaves_the_running_mean_alone() -> None:
    tried = algorithm("reinforce", baseline="running_mean")
    tried.compute_advantages(text([1.0, 3.0]))
    before = tried.running_mean.value
    tried.compute_advantages(text([None, None]))
    assert before != 0
    assert tried.running_mean.value == before


def test_a_running_mean_is_fixed_before_the_batch_it_is_compared_with() -> None:
    tried = algorithm("reinforce", baseline="running_mean")
    first = tried.compute_advantages(text([1.0, 0.0])).advantage_BT[:, 0].tolist()
    second = tried.compute_advantages(text([1.0, 0.0])).advantage_BT[:, 0].tolist()
    assert first == [1.0, 0.0]
    assert second == pytest.approx([0.5, -0.5])
    resumed = algorithm("reinforce", baseline="running_mean")
    resumed.load_state_dict(tried.state_dict())
    assert resumed.running_mean.value == tried.running_mean.value


def test_a_critic_is_asked_for_the_returns_that_it_learns_penalties_included() -> None:
    """One that predicts reward less KL knows all of it; by the bare rewards it would look bad."""
    rollouts, _ = make(4, prompts=2)
    rollouts.cut_BT = torch.zeros_like(rollouts.cut_BT)
    row = dataclasses.replace(ALGORITHMS["a2c"], beta=0.5, gamma=1.0)
    assert rollouts.ref_logp_BT is not None
    paid_BT = torch.where(rollouts.mask_BT, rollouts.reward_BT - 0.5 * (rollouts.logp_BT - rollouts.ref_logp_BT), 0.0)
    rollouts.value_BT = paid_BT.flip(1).cumsum(1).flip(1)
    rollouts.discount_BT = rollouts.mask_BT.to(paid_BT.dtype)
    assert Algorithm(row).explained_variance(rollouts, rollouts.mask_BT) == pytest.approx(1.0)


def test_an_adaptive_penalty_follows_its_target_from_outside_a_factor_of_a_half() -> None:
    """Schulman et al. 2017, section 4: doubled above 1.5 targets, halved under target/1.5, and held within bounds."""
    penalty = AdaptivePenalty(0.01)
    for kl, weight in ((0.0149, 1.0), (0.0151, 2.0), (0.0068, 2.0), (0.0066, 1.0), (0.0, 0.5)):
        penalty.update(kl)
        assert penalty.weight == weight
    for kl, bound in ((1.0, 1e4), (0.0, 1e-4)):
        for _ in range(60):
            penalty.update(kl)
        assert penalty.weight == bound


@pytest.mark.parametrize("kl, weight", [(2.25, 1.0), (2.26, 2.0), (1.0, 1.0), (0.99, 0.5)])
def test_an_adaptive_penalty_is_left_alone_on_the_very_edges_of_its_range(kl: float, weight: float) -> None:
    penalty = AdaptivePenalty(1.5)
    penalty.update(kl)
    assert penalty.weight == weight


@pytest.mark.parametrize("target", [0.0, -0.01, float("nan")])
def test_a_kl_target_of_an_update_is_above_zero(target: float) -> None:
    with pytest.raises(ValueError, match=f"must be above 0 nats; it is {target}. 0.01 is a usual choice"):
        AdaptivePenalty(target)


def test_only_completions_of_negative_weight_are_dropped_when_the_policy_has_left_them() -> None:
    rollouts = text([1.0, 0.0, 1.0, 0.0])
    made = algorithm("grpo", off_policy_mask_threshold=0.1)
    batch = made.compute_advantages(rollouts)
    left_BT = rollouts.logp_BT - torch.tensor([[1.0], [1.0], [0.0], [0.0]])  # the first two are left
    logp_BT = left_BT.clone().requires_grad_()
    made.loss(logp_BT, batch)[0].backward()
    assert logp_BT.grad is not None
    assert (logp_BT.grad.abs().sum(1) > 0).tolist() == [True, False, True, True]


def test_an_adaptive_penalty_survives_saving() -> None:
    tried = algorithm("ppo", kl_target=0.01)
    for kl in (0.1, 0.1, 0.001):
        tried.observe_kl(kl)
    resumed = algorithm("ppo", kl_target=0.01)
    resumed.load_state_dict(tried.state_dict())
    assert tried.kl_penalty is not None
    assert resumed.kl_penalty is not None
    assert resumed.kl_penalty.weight == tried.kl_penalty.weight == 2.0


def test_no_weight_carries_a_gradient() -> None:
    rollouts, _ = make(2)
    rollouts.value_BT = rollouts.value_BT.clone().requires_grad_()  # type: ignore[union-attr]
    for name in ALGORITHMS:
        assert not algorithm(name).compute_advantages(rollouts).advantage_BT.requires_grad


def test_a_baseline_for_each_step_compares_what_is_still_to_come() -> None:
    """Step t's rewards-to-go with the other rows' from step t on, not with their whole returns."""
    rollouts = text([0.0, 0.0], length_B=[2, 2])
    rollouts.reward_BT = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    per_step = algorithm("rloo", baseline_per_step=True).compute_advantages(rollouts)
    assert per_step.advantage_BT.tolist() == [[3.0 - 30.0, 2.0 - 20.0], [30.0 - 3.0, 20.0 - 2.0]]
    of_the_row = algorithm("rloo").compute_advantages(rollouts)
    assert of_the_row.advantage_BT.tolist() == [[3.0 - 30.0, 2.0 - 30.0], [30.0 - 3.0, 20.0 - 3.0]]


def test_the_critic_is_pulled_to_its_target_by_its_share_of_the_loss() -> None:
    """d/dV of vf_coef · mean over tokens of ½(V - target)², and nothing of it outside the mask."""
    rollouts = text([1.0, 0.0], length_B=[3, 2], value_BT=torch.zeros(2, 3))
    tried = algorithm("a2c", vf_coef=0.25)
    batch = tried.compute_advantages(rollouts)
    value_BT = torch.full((2, 3), 0.4, requires_grad=True)
    tried.loss(rollouts.logp_BT, batch, value_BT=value_BT)[0].backward()
    assert value_BT.grad is not None
    expected = 0.25 * torch.tensor([[-0.6, -0.6, -0.6], [0.4, 0.4, 0.0]]) / 5
    assert torch.allclose(value_BT.grad, expected, atol=1e-7)
