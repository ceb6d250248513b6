"""Sums over all groups: each against another way to take the same sum."""

import math

import pytest
import torch

from llm_pg.algorithms.table import ALGORITHMS, AlgorithmSpec
from llm_pg.estimators.exact import TabularPolicy
from llm_pg.estimators.expectation import (
    ExpectedUpdate,
    compare,
    count_groups,
    enumerate_groups,
    expected_update,
    sample_groups,
)
from llm_pg.prove.measure import algorithm_of, expect_in
from llm_pg.prove.world import loss_of_groups
from llm_pg.prove.worlds import WorldSpec, build

SMALL = WorldSpec(horizon=2, num_generations=3, rewards="graded", reference="near", critic="exact")
WITH_KL = {name: row.__class__(**{**row.__dict__, "beta": 0.1}) for name, row in ALGORITHMS.items()}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("all_prompts", [False, True])
def test_probabilities_of_all_batches_add_up_to_one(ordered: bool, all_prompts: bool) -> None:
    prob_PS = TabularPolicy.random(3, 2, num_prompts=2).prob_PS()
    groups = list(enumerate_groups(prob_PS, 2, all_prompts=all_prompts, ordered=ordered))
    assert float(sum(g.weight_M.sum() for g in groups)) == pytest.approx(1.0, rel=1e-13)
    assert sum(len(g.weight_M) for g in groups) == count_groups(prob_PS, 2, all_prompts=all_prompts, ordered=ordered)


def test_fifteen_completions_in_groups_of_four_make_3060_multisets() -> None:
    assert count_groups(TabularPolicy.random(3, 3).prob_PS(), 4) == 3060


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_multisets_with_their_multiplicity_equal_all_ordered_groups(name: str) -> None:
    """So no shipped algorithm reads the order of the rows."""
    row, world = WITH_KL[name], build(SMALL)
    multisets = expect_in(world, algorithm_of(row, 2))
    ordered = expect_in(world.replace(ordered=True), algorithm_of(row, 2))
    assert ordered.num_groups > 3 * multisets.num_groups
    assert torch.allclose(multisets.mean_D, ordered.mean_D, rtol=0, atol=1e-14)
    assert multisets.trace == pytest.approx(ordered.trace, rel=1e-12)


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_groups_run_side_by_side_as_they_do_one_by_one(name: str, reused: bool) -> None:
    """The vectorised road skips the border check of Rollouts; the loop goes through it."""
    world = build(SMALL.replace(num_generations=2, reused=reused))
    together = expect_in(world, algorithm_of(WITH_KL[name], 2))
    looped = expect_in(world, algorithm_of(WITH_KL[name], 2), side_by_side=False)
    assert torch.allclose(together.mean_D, looped.mean_D, rtol=0, atol=1e-14)
    assert together.trace == pytest.approx(looped.trace, rel=1e-12)


def test_variance_of_reinforce_equals_its_closed_form() -> None:
    """One completion a step: tr Cov = E[R² |∇log π|²] - |∇J|², with |e_a - π|² summed over the steps."""
    spec = WorldSpec(num_generations=1, rewards="graded", prompts="one")
    world = build(spec)
    policy, c = world.policy, world.completions
    chosen = policy.logits_PNV.softmax(-1)[0, c.prefix_ST]
    onehot = torch.nn.functional.one_hot(c.tokens_ST, 3)
    square_S = (((onehot - chosen) ** 2).sum(2) * c.mask_ST).sum(1)
    second = float(policy.prob_PS()[0] @ (world.return_PS[0] ** 2 * square_S))
    expected = second - float(world.gradient().square().sum())
    update = expect_in(world, algorithm_of(AlgorithmSpec("total", "", returns="total", surrogate="reinforce"), 3))
    assert update.trace == pytest.approx(expected, rel=1e-12)


def test_averaging_g_independent_completions_divides_the_variance_by_g() -> None:
    row = AlgorithmSpec("total", "", returns="total", surrogate="reinforce")
    traces = [
        expect_in(build(WorldSpec(num_generations=g, prompts="one")), algorithm_of(row, 3)).trace for g in (1, 2, 4)
    ]
    assert traces[0] / traces[1] == pytest.approx(2.0, rel=1e-10)
    assert traces[0] / traces[2] == pytest.approx(4.0, rel=1e-10)


def test_sampled_batches_agree_with_the_enumerated_mean_within_their_standard_error() -> None:
    world = build(WorldSpec(rewards="graded"))
    algorithm = algorithm_of(ALGORITHMS["rloo"], 3)
    exact = expect_in(world, algorithm)
    drawn = expected_update(
        loss_of_groups(world, algorithm), world.policy.logits_PNV, world.policy.prob_PS(), 4, num_samples=20_000
    )
    distance = float((drawn.mean_D - exact.mean_D).norm())
    assert 0.2 * drawn.standard_error < distance < 2.5 * drawn.standard_error
    assert drawn.standard_error == pytest.approx(math.sqrt(exact.trace / 20_000), rel=0.05)
    assert compare(drawn, world.gradient()).standard_error > 0


def test_both_prompts_of_a_sampled_step_stand_side_by_side() -> None:
    prob_PS = TabularPolicy.random(3, 2, num_prompts=2).prob_PS()
    (groups,) = sample_groups(prob_PS, 3, 5, all_prompts=True)
    assert groups.prompt_MB.tolist() == [[0, 0, 0, 1, 1, 1]] * 5


def test_too_many_batches_are_refused_with_their_number_and_the_way_out() -> None:
    prob_PS = TabularPolicy.random(5, 4).prob_PS()
    with pytest.raises(ValueError, match=rf"make {math.comb(341 + 3, 4):,} batches.*500,000.*num_samples"):
        next(enumerate_groups(prob_PS, 4))


def test_only_the_length_differs_is_told_from_another_direction() -> None:
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    shorter = compare(ExpectedUpdate(0.5 * target, 1.0, 1), target)
    assert (shorter.scale, shorter.cosine, shorter.bias) == pytest.approx((0.5, 1.0, 0.5))
    assert shorter.off_direction < 1e-15
    assert shorter.noise == pytest.approx(4.0)
    aside = compare(ExpectedUpdate(torch.tensor([-4.0, 3.0], dtype=torch.float64), 1.0, 1), target)
    assert (aside.scale, aside.cosine) == pytest.approx((0.0, 0.0))
    assert aside.bias == pytest.approx(math.sqrt(2))


def test_a_gradient_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(ExpectedUpdate(torch.ones(2, dtype=torch.float64), 1.0, 1), torch.zeros(2, dtype=torch.float64))
