"""What is biased is biased by the predicted amount, so that a silent change of meaning fails."""

import dataclasses
import math

import pytest
import torch

from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import STD_EPS
from llm_pg.estimators.exact import TabularPolicy, kl, state_values, step_values, terminal_reward
from llm_pg.estimators.expectation import Comparison, compare
from llm_pg.prove.measure import algorithm_of, expect_in, measure
from llm_pg.prove.reasons import NO_CLIP
from llm_pg.prove.world import FixedMean, World
from llm_pg.prove.worlds import WorldSpec, build

PLAIN = AlgorithmSpec("plain", "", surrogate="reinforce")
TOTAL = dataclasses.replace(PLAIN, returns="total")
Z_SCORE = dataclasses.replace(TOTAL, baseline="group_mean", scale_rewards="group")
ONE_PROMPT = WorldSpec(prompts="one")


def in_world(row: AlgorithmSpec, world: World, horizon: int, beta: float = 0.0) -> Comparison:
    return compare(expect_in(world, algorithm_of(row, horizon)), world.gradient(beta))


@pytest.mark.parametrize("generations", [2, 3, 4])
def test_a_mean_that_contains_itself_shrinks_the_gradient_to_g_minus_one_over_g(generations: int) -> None:
    spec = WorldSpec(num_generations=generations, rewards="graded")
    found = measure(dataclasses.replace(PLAIN, baseline="group_mean"), spec)[0]
    assert found.scale == pytest.approx((generations - 1) / generations, rel=1e-12)
    assert found.off_direction < 1e-12


def test_the_mean_of_a_batch_of_two_groups_shrinks_it_to_n_minus_one_over_n() -> None:
    spec = WorldSpec(horizon=2, num_generations=3, prompts_per_step=2, rewards="graded")
    found = measure(dataclasses.replace(PLAIN, baseline="batch_mean"), spec)[0]
    assert found.scale == pytest.approx(5 / 6, rel=1e-12)
    assert found.off_direction < 1e-12


@pytest.mark.parametrize("generations", [2, 3, 4])
def test_leave_one_out_is_unbiased_for_every_group_size(generations: int) -> None:
    assert measure(ALGORITHMS["rloo"], WorldSpec(num_generations=generations, rewards="graded"))[0].bias < 1e-12


def _z_score_scale(p: float, generations: int) -> float:
    """E over the number of successes k of sqrt(k/G (1-k/G) (G-1)/G) / (p (1-p)): what dividing 0/1 rewards does."""
    total = 0.0
    for k in range(1, generations):
        share = k / generations
        spread = math.sqrt(share * (1 - share) * generations / (generations - 1))
        chance = math.comb(generations, k) * p**k * (1 - p) ** (generations - k)
        total += chance * share * (1 - share) / (spread + STD_EPS)
    return total / (p * (1 - p))


@pytest.mark.parametrize("generations", [2, 3, 4])
def test_z_scoring_verdicts_scales_one_prompt_as_its_closed_form_says(generations: int) -> None:
    spec = ONE_PROMPT.replace(num_generations=generations)
    found, world = measure(Z_SCORE, spec)[0], build(spec)
    p = float((world.policy.prob_PS() * world.return_PS).sum())
    assert found.off_direction < 1e-12
    assert found.scale == pytest.approx(_z_score_scale(p, generations), rel=1e-12)


def test_z_scoring_grows_with_the_group_toward_one_over_the_deviation() -> None:
    """0.71 at G = 2 whatever p; the larger the group and the rarer success, the larger the effective step."""
    p = 0.03
    scales = [_z_score_scale(p, g) for g in (2, 4, 8, 16, 64)]
    assert scales[0] == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert scales == pytest.approx([0.71, 1.49, 2.37, 3.37, 5.20], abs=0.04)
    assert _z_score_scale(p, 1000) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.02)
    assert _z_score_scale(0.03, 64) > 2 * _z_score_scale(0.5, 64)


def test_z_scoring_hardly_reweights_two_prompts_at_g_4_and_does_at_g_8() -> None:
    """Of 0/1 rewards: the scale at G <= 3 is the same for every p, so the direction is exact there."""
    cosines = {g: measure(Z_SCORE, WorldSpec(horizon=2, num_generations=g))[0].cosine for g in (2, 3, 4, 8)}
    assert 1 - cosines[2] < 1e-12
    assert 1 - cosines[3] < 1e-12
    assert 1e-6 < 1 - cosines[4] < 1e-3 < 1 - cosines[8]


def test_leave_one_out_mean_and_deviation_keep_the_direction_of_one_prompt() -> None:
    """Of one prompt: what the others say is independent of the completion that it weighs."""
    from llm_pg.prove.user import OwnAlgorithm

    def advantage(rollouts):  # type: ignore[no-untyped-def]
        r_B = rollouts.reward_BT.sum(1)
        others_BB = r_B.unsqueeze(0).expand(4, 4)[~torch.eye(4, dtype=torch.bool)].reshape(4, 3)
        return (r_B - others_BB.mean(1)) / (others_BB.std(1) + 0.1)

    world = build(ONE_PROMPT.replace(rewards="graded"))
    found = compare(expect_in(world, OwnAlgorithm(advantage)), world.gradient())
    assert found.off_direction < 1e-12
    assert abs(found.scale - 1) > 0.05


@pytest.mark.parametrize("generations", [2, 4])
def test_variance_of_leave_one_out_is_that_of_a_u_statistic(generations: int) -> None:
    """g = mean over pairs of ½(R_i - R_j)(s_i - s_j), whose variance Hoeffding gave (1948)."""
    spec = ONE_PROMPT.replace(num_generations=generations, rewards="graded")
    world = build(spec)
    policy, c = world.policy, world.completions
    chosen = policy.logits_PNV.softmax(-1)[0, c.prefix_ST]
    step_STV = (torch.nn.functional.one_hot(c.tokens_ST, 3) - chosen) * c.mask_ST.unsqueeze(2)
    score_SNV = torch.zeros(15, 7, 3, dtype=torch.float64)
    for t in range(3):
        score_SNV[torch.arange(15), c.prefix_ST[:, t]] += step_STV[:, t]
    score_SD, reward_S, prob_S = score_SNV.flatten(1), world.return_PS[0], policy.prob_PS()[0]
    kernel_SSD = 0.5 * (reward_S[:, None] - reward_S[None]).unsqueeze(2) * (score_SD[:, None] - score_SD[None])
    mean_D = world.gradient().flatten()
    once_SD = torch.einsum("r,srd->sd", prob_S, kernel_SSD)
    zeta_1 = float(prob_S @ once_SD.square().sum(1) - mean_D.square().sum())
    zeta_2 = float(prob_S @ kernel_SSD.square().sum(2) @ prob_S - mean_D.square().sum())
    pairs = generations * (generations - 1)
    expected = (4 * (generations - 2) * zeta_1 + 2 * zeta_2) / pairs
    assert expect_in(world, algorithm_of(ALGORITHMS["rloo"], 3)).trace == pytest.approx(expected, rel=1e-10)


def test_a_constant_denominator_only_scales() -> None:
    found = measure(dataclasses.replace(PLAIN, loss_type="dr_grpo"), WorldSpec(rewards="graded"))[0]
    assert found.scale == pytest.approx(1 / 3, rel=1e-12)
    assert found.off_direction < 1e-12


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "bnpo"])
def test_means_over_tokens_turn_the_update_away(reduction: str) -> None:
    row = dataclasses.replace(TOTAL, baseline="leave_one_out", loss_type=reduction)
    assert measure(row, WorldSpec())[0].off_direction > 0.01


def test_dapo_and_bnpo_are_the_same_reduction_of_a_whole_batch() -> None:
    rows = [dataclasses.replace(TOTAL, loss_type=kind) for kind in ("dapo", "bnpo")]
    assert measure(rows[0], WorldSpec())[0] == measure(rows[1], WorldSpec())[0]


def test_length_bias_is_the_gradient_of_the_reward_over_the_length() -> None:
    """One completion a step and no baseline: 1/length turns J into E[R/L] seen through fixed lengths."""
    world = build(ONE_PROMPT.replace(num_generations=1))
    c = world.completions
    per_token_PS = world.return_PS / c.mask_ST.sum(1)
    other = world.replace(reward_PNV=terminal_reward(c, per_token_PS))
    update = expect_in(world, algorithm_of(dataclasses.replace(TOTAL, loss_type="grpo"), 3))
    assert torch.allclose(update.mean_D, other.gradient().flatten(), rtol=0, atol=1e-14)


def test_an_eos_left_out_of_the_loss_misses_exactly_the_credit_of_stopping() -> None:
    whole, without = build(ONE_PROMPT), build(ONE_PROMPT.replace(train_eos=False))
    c, prob_S = whole.completions, whole.policy.prob_PS()[0]
    missing_NV = torch.zeros(7, 3, dtype=torch.float64)
    for s in range(c.num_completions):
        if not c.truncated_S[s]:
            n = c.prefix_ST[s, int(c.mask_ST[s].sum()) - 1]
            score_V = -whole.policy.logits_PNV[0, n].softmax(-1)
            score_V[c.eos] += 1
            missing_NV[n] += prob_S[s] * whole.return_PS[0, s] * score_V
    left = expect_in(without, algorithm_of(TOTAL, 3)).mean_D
    assert torch.allclose(left + missing_NV.flatten(), whole.gradient().flatten(), rtol=0, atol=1e-14)
    assert missing_NV.norm() > 0.1 * left.norm()


def test_unscored_rows_leave_the_gradient_of_the_scored_mean_times_the_chance_of_two() -> None:
    spec = ONE_PROMPT.replace(unscored=True)
    world = build(spec)
    found = compare(expect_in(world, algorithm_of(ALGORITHMS["rloo"], 3)), world.gradient())
    assert world.scored_PS is not None
    v = float((world.policy.prob_PS() * world.scored_PS).sum())
    assert found.off_direction < 1e-12
    assert found.scale == pytest.approx(1 - (1 - v) ** 4 - 4 * v * (1 - v) ** 3, rel=1e-12)


# --- credit and critics, on a larger policy: 5 tokens, 4 steps, 341 completions, 3 prompts


@pytest.fixture(scope="module")
def large() -> World:
    policy = TabularPolicy.random(5, 4, num_prompts=3)
    generator = torch.Generator().manual_seed(0)
    steps = 0.3 * torch.randn(policy.logits_PNV.shape, dtype=torch.float64, generator=generator) + 0.3
    verdict = (torch.rand(3, 341, generator=generator) < 0.4).double()
    reward_PNV = steps + terminal_reward(policy.completions, verdict)
    return World(policy, reward_PNV, num_generations=1, value_PN=state_values(policy, reward_PNV))


def test_each_step_of_credit_assignment_cuts_the_variance_and_keeps_the_mean(large: World) -> None:
    critic = dataclasses.replace(PLAIN, baseline="value")
    found = [in_world(TOTAL, large, 4), in_world(PLAIN, large, 4)]
    found += [in_world(dataclasses.replace(critic, lam=lam), large, 4) for lam in (1.0, 0.95, 0.5, 0.0)]
    assert max(f.bias for f in found) < 1e-10
    ratios = [f.noise / found[0].noise for f in found]
    assert ratios == sorted(ratios, reverse=True)
    assert 0.4 < ratios[1] < 0.7
    assert ratios[2] < 0.15
    assert ratios[-1] < 0.07


def test_a_wrong_critic_biases_more_the_smaller_lambda_and_not_at_all_at_one(large: World) -> None:
    assert large.value_PN is not None
    wrong = large.replace(value_PN=large.value_PN + 0.5)
    critic = dataclasses.replace(PLAIN, baseline="value")
    biases = [in_world(dataclasses.replace(critic, lam=lam), wrong, 4).bias for lam in (1.0, 0.95, 0.5, 0.0)]
    assert biases[0] < 1e-10
    assert biases[1:] == sorted(biases[1:])
    assert biases[1] < 0.05 < 0.2 < biases[2]


def test_a_critic_of_zeros_at_lambda_zero_learns_only_from_the_next_reward(large: World) -> None:
    blind = large.replace(value_PN=torch.zeros_like(large.value_PN))  # type: ignore[arg-type]
    found = in_world(dataclasses.replace(PLAIN, baseline="value", lam=0.0), blind, 4)
    assert found.bias > 0.9


def test_a_fixed_baseline_is_exact_whatever_its_value_and_best_near_the_mean(large: World) -> None:
    row = dataclasses.replace(TOTAL, baseline="running_mean")
    mean = float((large.policy.prob_PS() * large.return_PS).sum(1).mean())
    noises = []
    for value in (mean, mean + 1.0, mean - 1.0):
        algorithm = algorithm_of(row, 4)
        algorithm.running_mean = FixedMean(value)
        found = compare(expect_in(large, algorithm), large.gradient())
        assert found.bias < 1e-10
        noises.append(found.noise)
    assert noises[0] < min(noises[1:])
    assert noises[0] < 0.2 * in_world(TOTAL, large, 4).noise


# --- the KL penalty


@pytest.fixture(scope="module")
def penalty() -> World:
    policy = TabularPolicy.random(4, 3, num_prompts=2, seed=1)
    reference = TabularPolicy.random(4, 3, num_prompts=2, seed=2)
    return World(policy, torch.zeros_like(policy.logits_PNV), num_generations=1, reference=reference)


def _placed(placement: str, estimator: str, **others: object) -> AlgorithmSpec:
    return dataclasses.replace(PLAIN, beta=1.0, kl_placement=placement, kl_estimator=estimator, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_k1_in_the_reward_is_exactly_the_gradient_of_the_kl(penalty: World, returns: str) -> None:
    assert in_world(_placed("reward", "k1", returns=returns), penalty, 3, beta=1.0).bias < 1e-10


def test_k1_to_go_has_less_variance_than_k1_summed(penalty: World) -> None:
    noise = {r: in_world(_placed("reward", "k1", returns=r), penalty, 3, 1.0).noise for r in ("total", "reward_to_go")}
    assert noise["reward_to_go"] < 0.8 * noise["total"]


def test_k1_in_the_loss_has_no_expected_gradient(penalty: World) -> None:
    assert expect_in(penalty, algorithm_of(_placed("loss", "k1"), 3)).mean_D.norm() < 1e-14


def _token_kl_gradient(world: World, weights: str) -> torch.Tensor:
    """-∇ of E over visited prefixes of a per-token divergence, the visits held fixed."""
    assert world.reference is not None
    c = world.completions
    leaf = world.policy.logits_PNV.clone().requires_grad_()
    logp_PNV, ref_PNV = leaf.log_softmax(-1), world.reference.logits_PNV.log_softmax(-1)
    if weights == "reverse":
        token_PN = (logp_PNV.exp() * (logp_PNV - ref_PNV)).sum(2)
    else:
        token_PN = (ref_PNV.exp() * (ref_PNV - logp_PNV)).sum(2)
    at_PST = torch.where(c.mask_ST, token_PN[:, c.prefix_ST], torch.zeros((), dtype=torch.float64))
    value = (world.policy.prob_PS().detach() * at_PST.sum(2)).sum(1).mean()
    return -torch.autograd.grad(value, leaf)[0].flatten()


def test_k2_in_the_loss_is_the_token_kl_without_what_it_does_to_later_tokens(penalty: World) -> None:
    update = expect_in(penalty, algorithm_of(_placed("loss", "k2"), 3))
    assert torch.allclose(update.mean_D, _token_kl_gradient(penalty, "reverse"), rtol=0, atol=1e-13)


def test_k3_in_the_loss_is_the_gradient_of_the_forward_token_kl(penalty: World) -> None:
    """E_π[(1 - ref/π) ∇log π] = -Σ ref ∇log π: KL(ref‖π) of each token, the other direction of the divergence."""
    update = expect_in(penalty, algorithm_of(_placed("loss", "k3"), 3))
    assert torch.allclose(update.mean_D, _token_kl_gradient(penalty, "forward"), rtol=0, atol=1e-13)


def test_k3_times_the_ratio_has_the_gradient_of_k2(penalty: World) -> None:
    corrected = _placed("loss", "k3", use_bias_correction_kl=True, surrogate="clip")
    updates = [expect_in(penalty, algorithm_of(row, 3)).mean_D for row in (corrected, _placed("loss", "k2"))]
    assert torch.allclose(updates[0], updates[1], rtol=0, atol=1e-13)


def test_k2_in_the_loss_is_exact_once_the_kl_of_what_follows_is_in_the_reward(penalty: World) -> None:
    """The two halves of ∇KL: a token's own KL, and the KL of the states that it leads to."""
    assert penalty.reference is not None
    c = penalty.completions
    k_PST = torch.where(c.mask_ST, penalty.policy.logp_PST() - penalty.reference.logp_PST(), torch.zeros(()).double())
    after_PST = k_PST.flip(2).cumsum(2).flip(2) - k_PST
    leaf = penalty.policy.logits_PNV.clone().requires_grad_()
    logp_PST = penalty.policy.with_logits(leaf).logp_PST()
    value = (penalty.policy.prob_PS() * (logp_PST * after_PST).sum(2)).sum(1).mean()
    future = -torch.autograd.grad(value, leaf)[0].flatten()
    present = expect_in(penalty, algorithm_of(_placed("loss", "k2"), 3)).mean_D
    exact = -kl(penalty.policy, penalty.reference).gradient_PNV.flatten()
    assert torch.allclose(present + future, exact, rtol=0, atol=1e-13)
    assert future.norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_nearly_no_penalty_close_to_the_reference(estimator: str) -> None:
    policy = TabularPolicy.random(3, 3, num_prompts=2, seed=4)
    near = policy.with_logits(policy.logits_PNV + 0.05 * TabularPolicy.random(3, 3, 2, seed=5).logits_PNV)
    world = World(policy, torch.zeros_like(policy.logits_PNV), num_generations=1, reference=near)
    assert abs(in_world(_placed("reward", estimator), world, 3, 1.0).scale) < 0.1
    assert in_world(_placed("reward", "k1"), world, 3, 1.0).bias < 1e-9


# --- data of an older policy


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_the_completions_ratio_without_clipping_is_exact_on_any_older_data(returns: str) -> None:
    row = dataclasses.replace(ALGORITHMS["rloo"], epsilon=NO_CLIP, returns=returns)
    assert measure(row, WorldSpec(reused=True, rewards="graded"))[0].bias < 1e-10


def test_token_ratios_are_the_gradient_of_the_old_policys_visits(large: World) -> None:
    """PPO's surrogate without clipping: E over prefixes of the old policy, not of the new one."""
    old = large.policy.with_logits(large.policy.logits_PNV + 0.3 * TabularPolicy.random(5, 4, 3, seed=9).logits_PNV)
    reused = large.replace(behaviour=old, value_PN=None)
    c = reused.completions
    to_go_PST = step_values(c, reused.reward_PNV).flip(2).cumsum(2).flip(2)
    leaf = reused.policy.logits_PNV.clone().requires_grad_()
    ratio_PST = (reused.policy.with_logits(leaf).logp_PST() - old.logp_PST()).exp() * c.mask_ST
    value = (old.prob_PS() * (ratio_PST * to_go_PST).sum(2)).sum(1).mean()
    expected = torch.autograd.grad(value, leaf)[0].flatten()
    row = dataclasses.replace(PLAIN, surrogate="clip", epsilon=NO_CLIP)
    update = expect_in(reused, algorithm_of(row, 4))
    assert torch.allclose(update.mean_D, expected, rtol=0, atol=1e-13)
    assert compare(update, large.gradient()).off_direction > 0.01


def test_clipping_only_ever_takes_tokens_out() -> None:
    spec = WorldSpec(reused=True)
    narrow, wide = (measure(dataclasses.replace(ALGORITHMS["rloo"], epsilon=e), spec)[0].scale for e in (0.05, 0.5))
    assert narrow < wide < 1
