"""The worked numbers of a first lecture on policy gradients, each by two roads: on paper and by the library."""

import dataclasses
import math

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.estimators.exact import TabularPolicy, state_values
from llm_pg.estimators.expectation import Groups, compare, enumerate_groups, expected_update, sample_groups, updates
from llm_pg.estimators.surrogates import reinforce
from llm_pg.prove.measure import algorithm_of, expect_in
from llm_pg.prove.user import OwnAlgorithm
from llm_pg.prove.world import World, loss_of_groups
from llm_pg.prove.worlds import WorldSpec, build

PLAIN = AlgorithmSpec("plain", "", surrogate="reinforce")


def sigmoid_bandit(theta: float, generations: int = 1) -> World:
    """π(arm 1) = σ(θ), R = 1 for arm 1, else 0: a policy of one step and two tokens, logits (θ, 0)."""
    policy = TabularPolicy(torch.tensor([[[theta, 0.0]]], dtype=torch.float64), horizon=1)
    return World(policy, torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), num_generations=generations)


def along_theta(world: World, num_samples: int | None = None, seed: int = 0) -> tuple[float, float]:
    """Mean and variance of one step's gradient in θ, the first logit, over all batches or over sampled ones."""
    groups = (
        enumerate_groups(world.policy.prob_PS(), world.num_generations)
        if num_samples is None
        else sample_groups(world.policy.prob_PS(), world.num_generations, num_samples, seed=seed)
    )
    (batch,) = groups
    loss_of = loss_of_groups(world, algorithm_of(PLAIN, 1))
    theta_MPNV = world.policy.logits_PNV.expand(len(batch.weight_M), -1, -1, -1)
    g_M = updates(loss_of, theta_MPNV, batch)[:, 0]
    mean = float(batch.weight_M @ g_M)
    return mean, float(batch.weight_M @ (g_M - mean) ** 2)


def test_the_sigmoid_bandit_at_zero_has_gradient_a_quarter_and_variance_a_sixteenth() -> None:
    assert along_theta(sigmoid_bandit(0.0)) == pytest.approx((0.25, 0.0625), rel=1e-14)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.5, 2.0])
def test_the_bandits_gradient_is_sigma_times_one_minus_sigma(theta: float) -> None:
    sigma = 1 / (1 + math.exp(-theta))
    assert along_theta(sigmoid_bandit(theta))[0] == pytest.approx(sigma * (1 - sigma), rel=1e-12)
    assert along_theta(sigmoid_bandit(theta))[1] == pytest.approx(sigma * (1 - sigma) ** 2 * (1 - sigma), rel=1e-12)


def test_two_rewarded_samples_at_step_size_one_lead_to_half_and_then_0_878() -> None:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    seen = []
    for _ in range(2):
        logp = torch.nn.functional.logsigmoid(theta)
        loss = reinforce(logp.reshape(1, 1), torch.ones(1, 1, dtype=torch.float64)).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - gradient).detach().requires_grad_()
        seen += [float(theta.detach()), float(torch.sigmoid(theta.detach()))]
    assert seen == pytest.approx([0.5, 0.622, 0.878, 0.706], abs=5e-4)
    assert seen[2] == pytest.approx(0.5 + 1 / (1 + math.exp(0.5)), rel=1e-14)


def test_one_sample_is_a_one_sigma_guess_and_n_samples_tighten_it_by_the_root_of_n() -> None:
    mean, variance = along_theta(sigmoid_bandit(0.0))
    assert math.sqrt(variance) == pytest.approx(mean, rel=1e-12)
    for n in (4, 16, 64):
        assert math.sqrt(along_theta(sigmoid_bandit(0.0, n))[1]) == pytest.approx(0.25 / math.sqrt(n), rel=1e-10)


def test_sampling_gives_the_same_two_numbers_as_the_paper() -> None:
    mean, variance = along_theta(sigmoid_bandit(0.0), num_samples=40_000)
    assert mean == pytest.approx(0.25, abs=4 * 0.25 / math.sqrt(40_000))
    assert variance == pytest.approx(0.0625, rel=0.02)


def test_a_state_dependent_baseline_leaves_the_mean_and_cuts_the_variance() -> None:
    world = build(WorldSpec(rewards="dense", critic="exact"))
    without, with_v = (
        compare(expect_in(world, algorithm_of(row, 3)), world.gradient())
        for row in (PLAIN, dataclasses.replace(PLAIN, baseline="value"))
    )
    assert max(without.bias, with_v.bias) < 1e-12
    assert with_v.noise < 0.5 * without.noise


def test_reward_to_go_leaves_the_mean_and_cuts_the_variance() -> None:
    world = build(WorldSpec(rewards="dense"))
    total, to_go = (
        compare(expect_in(world, algorithm_of(row, 3)), world.gradient())
        for row in (dataclasses.replace(PLAIN, returns="total"), PLAIN)
    )
    assert max(total.bias, to_go.bias) < 1e-12
    assert to_go.noise < 0.8 * total.noise


def test_an_action_dependent_baseline_is_caught_as_biased() -> None:
    """b = Q(s, a) in the place of V(s): every advantage is 0 in the mean, and so is the update."""
    world = build(WorldSpec(rewards="dense"))
    value_PN = state_values(world.policy, world.reward_PNV)
    c = world.completions
    follow_PNV = torch.where(c.child_NV >= 0, value_PN[:, c.child_NV.clamp(min=0)], torch.zeros(()).double())
    q_PST = (world.reward_PNV + follow_PNV)[:, c.prefix_ST, c.tokens_ST]
    table_PST = torch.where(c.mask_ST, q_PST, torch.zeros(()).double())

    class Acting(World):
        def fields(self, groups: Groups) -> dict[str, torch.Tensor]:
            return {**super().fields(groups), "value_BT": table_PST[groups.prompt_MB, groups.index_MB]}

    acting = Acting(**{field.name: getattr(world, field.name) for field in dataclasses.fields(world)})
    found = compare(expect_in(acting, algorithm_of(dataclasses.replace(PLAIN, baseline="value"), 3)), world.gradient())
    assert found.bias > 0.9


def test_a_baseline_of_ones_own_reward_is_caught_as_biased() -> None:
    world = build(WorldSpec())
    own = OwnAlgorithm(lambda rollouts: rollouts.reward_BT.sum(1) - 0.5 * rollouts.reward_BT.sum(1) ** 2)
    assert compare(expect_in(world, own), world.gradient()).bias == pytest.approx(0.5, rel=1e-10)


def test_the_mean_over_steps_is_another_step_scale_only_where_all_rows_have_one_length() -> None:
    """Σ_t and mean_t differ by the length: a constant for bandits, a bias for completions."""
    bandit = sigmoid_bandit(0.3, generations=2)
    for reduction in ("grpo", "dapo", "sequence_sum"):
        row = dataclasses.replace(PLAIN, loss_type=reduction)
        found = expected_update(
            loss_of_groups(bandit, Algorithm(row)), bandit.policy.logits_PNV, bandit.policy.prob_PS(), 2
        )
        assert compare(found, bandit.gradient()).bias < 1e-12
    world = build(WorldSpec())
    row = dataclasses.replace(PLAIN, loss_type="grpo")
    assert compare(expect_in(world, algorithm_of(row, 3)), world.gradient()).off_direction > 0.01


def test_normalising_returns_over_the_batch_changes_the_objective_a_little() -> None:
    world = build(WorldSpec(rewards="graded"))
    row = dataclasses.replace(PLAIN, normalize_advantages="rollouts")
    found = compare(expect_in(world, algorithm_of(row, 3)), world.gradient())
    assert 0.9 < found.cosine < 1 - 1e-6
