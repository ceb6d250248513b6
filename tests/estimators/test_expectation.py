"""Sums over all groups: each against another way to take the same sum."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators import expectation
from llm_pg.estimators.exact import TabularPolicy
from llm_pg.estimators.expectation import (
    ExpectedUpdate,
    Groups,
    compare,
    count_groups,
    enumerate_groups,
    expected_update,
    sample_groups,
)
from llm_pg.prove.measure import algorithm_of, expect_in
from llm_pg.prove.world import loss_of_groups
from llm_pg.prove.worlds import WorldSpec, build

SMALL = WorldSpec(horizon=2, num_generations=3, rewards="graded", reference="near", teacher="far", critic="exact")
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


PROB_PS = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.0, 0.2, 0.7]], dtype=torch.float64)
THETA_PNV = torch.zeros(2, 1, 2, dtype=torch.float64)
PUSH_PSD = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _pushed(theta_MPNV: Tensor, groups: Groups) -> Tensor:
    """A loss whose update is Σ of the PUSH of its completions: -θ · Σ."""
    return -(theta_MPNV.flatten(1) * PUSH_PSD[groups.prompt_MB, groups.index_MB].sum(1)).sum(1)


def _by_hand(all_prompts: bool) -> tuple[Tensor, float]:
    """Mean and trace over every ordered batch of two completions a prompt."""
    pairs = list(itertools.product(range(4), repeat=2))
    if all_prompts:
        batches = [[(0, a), (0, b), (1, c), (1, d)] for (a, b), (c, d) in itertools.product(pairs, repeat=2)]
    else:
        batches = [[(p, a), (p, b)] for p in range(2) for a, b in pairs]
    mean, square = torch.zeros(4, dtype=torch.float64), 0.0
    for batch in batches:
        weight = math.prod(float(PROB_PS[p, s]) for p, s in batch) / (1 if all_prompts else 2)
        push = torch.stack([PUSH_PSD[p, s] for p, s in batch]).sum(0)
        mean += weight * push
        square += weight * float(push @ push)
    return mean, square - float(mean @ mean)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("all_prompts", [False, True])
def test_an_update_is_minus_the_gradient_and_its_moments_are_sums_over_every_batch(
    ordered: bool, all_prompts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt has three completions that can be sampled: 6 pairs, or 9 in order. Chunks change nothing."""
    mean_D, trace = _by_hand(all_prompts)
    each = 9 if ordered else 6
    for numbers in (expectation.CHUNK_NUMBERS, 1):
        monkeypatch.setattr(expectation, "CHUNK_NUMBERS", numbers)
        update = expected_update(_pushed, THETA_PNV, PROB_PS, 2, all_prompts=all_prompts, ordered=ordered)
        assert torch.allclose(update.mean_D, mean_D, atol=1e-14)
        assert update.trace == pytest.approx(trace, rel=1e-12)
        assert (update.num_groups, update.standard_error) == (each**2 if all_prompts else 2 * each, 0.0)


def test_a_batch_is_one_prompt_in_any_order_unless_it_is_asked_otherwise() -> None:
    assert count_groups(PROB_PS, 2) == 12
    assert [g.prompt_MB.unique().tolist() for g in enumerate_groups(PROB_PS, 2)] == [[0], [1]]
    assert expected_update(_pushed, THETA_PNV, PROB_PS, 2).num_groups == 12
    (drawn,) = sample_groups(PROB_PS, 3, 64)
    assert (drawn.prompt_MB == drawn.prompt_MB[:, :1]).all()
    assert set(drawn.prompt_MB[:, 0].tolist()) == {0, 1}


def test_batches_of_all_prompts_hold_the_groups_of_each_in_turn() -> None:
    (groups,) = enumerate_groups(PROB_PS, 2, all_prompts=True)
    assert groups.prompt_MB.tolist() == [[0, 0, 1, 1]] * 36
    first, second = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)], [(0, 0), (0, 2), (0, 3), (2, 2), (2, 3), (3, 3)]
    assert [tuple(row) for row in groups.index_MB.tolist()] == [(*a, *b) for a in first for b in second]


def test_parameters_may_depend_on_the_batch() -> None:
    """A second pass: -θ is the update of |θ|²/2, and θ is the first completion's number."""

    def theta_of(groups: Groups) -> Tensor:
        return groups.index_MB[:, :1].double().view(-1, 1, 1, 1).expand(-1, 2, 1, 2)

    update = expected_update(
        lambda theta, groups: theta.flatten(1).square().sum(1) / 2, THETA_PNV, PROB_PS, 1, theta_of=theta_of
    )
    number = float((PROB_PS * torch.arange(4)).sum(1).mean())
    assert update.mean_D.tolist() == pytest.approx([-number] * 4)


def test_drawn_batches_are_a_function_of_their_seed_and_of_no_other_random_number() -> None:
    def drawn(seed: int | None) -> tuple[list[list[int]], list[list[int]]]:
        torch.manual_seed(torch.seed())
        (groups,) = sample_groups(PROB_PS, 2, 40, **({} if seed is None else {"seed": seed}))
        return groups.prompt_MB.tolist(), groups.index_MB.tolist()

    assert drawn(7) == drawn(7)
    assert drawn(None) == drawn(0)
    assert all(a != b for a, b in zip(drawn(7), drawn(8), strict=True))
    (of_all,) = sample_groups(PROB_PS, 2, 40, all_prompts=True, seed=7)
    (again,) = sample_groups(PROB_PS, 2, 40, all_prompts=True, seed=7)
    assert torch.equal(of_all.index_MB, again.index_MB)


@pytest.mark.parametrize("all_prompts", [False, True])
def test_drawn_batches_have_the_moments_of_all_of_them(all_prompts: bool) -> None:
    mean_D, trace = _by_hand(all_prompts)
    options = {"all_prompts": all_prompts, "num_samples": 20_000}
    drawn = expected_update(_pushed, THETA_PNV, PROB_PS, 2, **options)
    assert float((drawn.mean_D - mean_D).norm()) < 3 * drawn.standard_error
    assert drawn.trace == pytest.approx(trace, rel=0.05)
    assert drawn.standard_error == pytest.approx(math.sqrt(drawn.trace / 20_000), rel=1e-12)
    assert drawn.num_groups == 20_000
    assert torch.equal(expected_update(_pushed, THETA_PNV, PROB_PS, 2, seed=0, **options).mean_D, drawn.mean_D)
    other = expected_update(_pushed, THETA_PNV, PROB_PS, 2, seed=1, **options)
    assert not torch.equal(other.mean_D, drawn.mean_D)


def test_both_prompts_of_a_sampled_step_stand_side_by_side() -> None:
    prob_PS = TabularPolicy.random(3, 2, num_prompts=2).prob_PS()
    (groups,) = sample_groups(prob_PS, 3, 5, all_prompts=True)
    assert groups.prompt_MB.tolist() == [[0, 0, 0, 1, 1, 1]] * 5


def test_too_many_batches_are_refused_with_their_number_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prob_PS = TabularPolicy.random(5, 4).prob_PS()
    with pytest.raises(ValueError, match=rf"make {math.comb(341 + 3, 4):,} batches.*500,000.*num_samples"):
        next(enumerate_groups(prob_PS, 4))
    for options, number, words in (
        ({}, 12, "12 batches"),
        ({"ordered": True}, 18, "18 ordered batches"),
        ({"all_prompts": True}, 36, "36 batches"),
    ):
        monkeypatch.setattr(expectation, "MAX_GROUPS", number)
        assert sum(len(g.weight_M) for g in enumerate_groups(PROB_PS, 2, **options)) == number
        monkeypatch.setattr(expectation, "MAX_GROUPS", number - 1)
        with pytest.raises(ValueError, match=f"^2 prompts of 3 completions in groups of 2 make {words}; at most "):
            next(enumerate_groups(PROB_PS, 2, **options))
    monkeypatch.setattr(expectation, "MAX_GROUPS", 10)
    with pytest.raises(ValueError, match=r"8,000,000 ordered batches.*about 16 s for .*, 12,000 s for"):
        next(enumerate_groups(torch.full((1, 200), 1 / 200), 3, ordered=True))


def test_only_the_length_differs_is_told_from_another_direction() -> None:
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    shorter = compare(ExpectedUpdate(0.5 * target, 1.0, 1), target)
    assert (shorter.scale, shorter.cosine, shorter.bias) == pytest.approx((0.5, 1.0, 0.5))
    assert shorter.off_direction < 1e-15
    assert shorter.noise == pytest.approx(4.0)
    assert compare(ExpectedUpdate(0.25 * target, 1.0, 1), target).noise == pytest.approx(16.0)
    assert (shorter.bias_absolute, shorter.standard_error) == (2.5, 0.0)
    aside = compare(ExpectedUpdate(torch.tensor([-4.0, 3.0], dtype=torch.float64), 1.0, 1), target)
    assert (aside.scale, aside.cosine) == pytest.approx((0.0, 0.0))
    assert aside.bias == pytest.approx(math.sqrt(2))
    assert (aside.off_direction, aside.bias_absolute) == pytest.approx((1.0, math.sqrt(50)))
    between = compare(ExpectedUpdate(torch.tensor([6.0, 0.0], dtype=torch.float64), 1.0, 1, 2.0), target)
    assert (between.scale, between.cosine) == pytest.approx((18 / 25, 0.6))
    assert between.off_direction == pytest.approx(0.8)  # the sine
    assert between.standard_error == pytest.approx(2 / 5)


def test_an_update_of_zero_has_no_direction_and_no_length() -> None:
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    nothing = compare(ExpectedUpdate(torch.zeros(2, dtype=torch.float64), 1.0, 1), target)
    assert (nothing.scale, nothing.cosine, nothing.off_direction, nothing.noise) == (0.0, 0.0, 0.0, math.inf)
    assert nothing.bias == 1.0
    rounding = compare(ExpectedUpdate(1e-13 * target, 1.0, 1), target)
    assert (rounding.scale, rounding.cosine, rounding.off_direction) == (0.0, 0.0, 0.0)
    small = compare(ExpectedUpdate(torch.tensor([1e-9], dtype=torch.float64), 1.0, 1), torch.tensor([100.0]).double())
    assert (small.scale, small.cosine) == pytest.approx((1e-11, 1.0))


def test_a_gradient_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(ExpectedUpdate(torch.ones(2, dtype=torch.float64), 1.0, 1), torch.zeros(2, dtype=torch.float64))
