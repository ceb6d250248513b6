"""One line of the table: an algorithm in a world, its exact expected update, and what is to blame where it is not ∇J.

Blame is measured, not asserted: each departure from the exact estimator is put in alone, and is named only if the
update is then off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..algorithms.algorithm import Algorithm
from ..algorithms.spec import AlgorithmSpec
from ..estimators.exact import TabularPolicy, completion_entropy
from ..estimators.expectation import (
    Comparison,
    ExpectedUpdate,
    Groups,
    compare,
    expected_update,
    updates,
)
from .reasons import DEPARTURES, OWN_DATA, Departure
from .world import Estimator, FixedMean, World, loss_of_groups
from .worlds import WorldSpec, build, less_truncated

EXACT, DIRECTION, BIASED, NOTHING = "exact", "right direction", "biased", "no effect"
TOLERANCE = 1e-10
RUNNING_MEAN = 0.3  # the value a running mean happens to have; any number is exact
STEP = 1.0  # size of the first update, where a second one follows on the same data


@dataclass(frozen=True)
class ProofCase:
    """A line to measure. `expect` is the kind of verdict it is known to get; `quick` puts it into the short table; `kl`
    names a penalty that `make` computes, which is none of the table's words."""

    section: str
    algorithm: str
    spec: AlgorithmSpec
    world_spec: WorldSpec
    expect: str
    detail: str = ""
    quick: bool = False
    second_pass: bool = False
    make: Callable[[AlgorithmSpec, int], Estimator] | None = None
    kl: str = ""


@dataclass(frozen=True)
class Line:
    """A measured line of the table; see `render.COLUMNS` for the units."""

    section: str
    algorithm: str
    detail: str
    baseline: str
    reduction: str
    mask: str
    kl: str
    placement: str
    data: str
    num_generations: int
    prompts_per_step: int
    batches: int
    bias: float
    bias_absolute: float
    cosine: float
    scale: float
    variance_ratio: float | None
    standard_error: float
    kind: str
    verdict: str
    reasons: tuple[tuple[str, str], ...]
    expected: bool

    @property
    def why(self) -> str:
        """The reasons' sentences."""
        return " ".join(sentence for _, sentence in self.reasons)

    def as_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "reasons"}
        return {**fields, "why": self.why}


def algorithm_of(spec: AlgorithmSpec, horizon: int) -> Algorithm:
    algorithm = Algorithm(spec, max_completion_length=horizon)
    algorithm.running_mean = FixedMean(RUNNING_MEAN)
    return algorithm


def target(spec: AlgorithmSpec, world: World) -> Tensor:
    """The gradient that the row's expected update should be: of reward_coef·J - beta·KL - teacher_coef·KL to the
    teacher + entropy_coef·entropy, less penalties.

    J is the mean return; with `pass_k` the best return of k completions; with `scale_rewards` group_mean the
    likelihood of success, cut off after G - 1 terms.
    """
    if spec.truncated == "penalize":
        world = world.replace(reward_PNV=less_truncated(world, spec.truncation_penalty))
    if spec.pass_k:
        gradient = world.gradient_of_best(spec.pass_k)
    elif spec.scale_rewards == "group_mean":
        gradient = world.gradient_of_likelihood(world.num_generations - 1)
    else:
        gradient = world.gradient(spec.beta, spec.reward_coef, spec.teacher_coef)
    if spec.entropy_coef:
        gradient = gradient + spec.entropy_coef * completion_entropy(world.policy).gradient_PNV
    return gradient


@lru_cache(maxsize=1024)
def measure(spec: AlgorithmSpec, world_spec: WorldSpec) -> tuple[Comparison, int]:
    """The row in the world, and how many batches were listed."""
    world = build(world_spec)
    update = expect_in(world, algorithm_of(spec, world_spec.horizon))
    return compare(update, target(spec, world)), update.num_groups


def expect_in(world: World, estimator: Estimator, *, side_by_side: bool = True) -> ExpectedUpdate:
    """The exact expected update of any estimator in any enumerable world."""
    return expected_update(
        loss_of_groups(world, estimator, side_by_side=side_by_side),
        world.policy.logits_PNV,
        world.sampled.prob_PS(),
        world.num_generations,
        all_prompts=world.all_prompts,
        ordered=world.ordered,
    )


def second_pass(spec: AlgorithmSpec, world_spec: WorldSpec) -> tuple[Comparison, int]:
    """The update of a second pass over the data that the first pass has already used.

    θ' = θ + STEP·g(group) depends on the group, so the comparison is between E[g'(group; θ')] and E[∇J(θ')].
    """
    world = build(world_spec)
    algorithm = algorithm_of(spec, world_spec.horizon)
    reused = world.replace(behaviour=world.policy)
    first = loss_of_groups(reused, algorithm)

    def theta_of(groups: Groups) -> Tensor:
        start = world.policy.logits_PNV.expand(len(groups.weight_M), -1, -1, -1)
        return start + STEP * updates(first, start, groups).reshape(start.shape)

    def minus_objective(theta_MPNV: Tensor, groups: Groups) -> Tensor:
        num, num_prompts = theta_MPNV.shape[:2]
        prob = TabularPolicy(theta_MPNV.flatten(0, 1), world_spec.horizon).prob_PS().reshape(num, num_prompts, -1)
        return -(prob * world.return_PS).sum(2).mean(1)

    arguments = (world.policy.logits_PNV, world.policy.prob_PS(), world.num_generations)
    update = expected_update(first, *arguments, all_prompts=world.all_prompts, theta_of=theta_of)
    gradient = expected_update(minus_objective, *arguments, all_prompts=world.all_prompts, theta_of=theta_of)
    return compare(update, gradient.mean_D), update.num_groups


def kind_of(comparison: Comparison) -> str:
    if comparison.bias < TOLERANCE:
        return EXACT
    if comparison.cosine == 0 and comparison.scale == 0:
        return NOTHING
    return DIRECTION if comparison.off_direction < TOLERANCE and comparison.scale > 0 else BIASED


def blame(spec: AlgorithmSpec, world_spec: WorldSpec, kind: str) -> list[Departure]:
    """The departures of (row, spec) that, put in alone, make the same kind of error."""
    present = [d for d in DEPARTURES if d.present(spec, world_spec)]
    guilty = []
    for departure in present:
        alone_spec, alone_world_spec = spec, world_spec
        for other in present:
            if other is not departure:
                alone_spec, alone_world_spec = other.remedy(alone_spec, alone_world_spec)
        alone = kind_of(measure(alone_spec, alone_world_spec)[0])
        if alone == kind or (kind == BIASED and alone == NOTHING):
            guilty.append(departure)
    return guilty or present


def _guilty_on_reused(spec: AlgorithmSpec, world_spec: WorldSpec) -> list[Departure]:
    reused = world_spec.replace(reused=True)
    kind = kind_of(measure(spec, reused)[0])
    return [] if kind == EXACT else blame(spec, reused, kind)


def plain(spec: AlgorithmSpec, world_spec: WorldSpec) -> tuple[AlgorithmSpec, WorldSpec]:
    """Plain REINFORCE (total return, no baseline, k1 in the reward) on fresh, wholly trained data of the same world."""
    reference = AlgorithmSpec(
        "plain",
        "",
        returns="total",
        surrogate="reinforce",
        beta=spec.beta,
        reward_coef=spec.reward_coef,
        teacher_coef=spec.teacher_coef,
    )
    return reference, world_spec.replace(
        reused=False, mismatch=False, trained=None, critic="none", train_eos=True, unscored=False
    )


def line_of(case: ProofCase) -> Line:
    """Measure a case."""
    spec, world_spec = case.spec, case.world_spec
    departures: list[Departure]
    if case.make is not None:
        world = build(world_spec)
        update = expect_in(world, case.make(spec, world_spec.horizon))
        comparison, batches = compare(update, target(spec, world)), update.num_groups
        kind, departures = kind_of(comparison), [d for d in DEPARTURES if d.present(spec, world_spec)]
    elif case.second_pass:
        comparison, batches = second_pass(spec, world_spec)
        kind = kind_of(comparison)
        departures = [OWN_DATA, *_guilty_on_reused(spec, world_spec)]
    else:
        comparison, batches = measure(spec, world_spec)
        kind = kind_of(comparison)
        departures = [] if kind == EXACT else blame(spec, world_spec, kind)
    same_objective = not spec.entropy_coef and not spec.pass_k and spec.scale_rewards != "group_mean"
    noise = measure(*plain(spec, world_spec))[0].noise if same_objective else math.inf
    comparable = math.isfinite(noise) and math.isfinite(comparison.noise) and comparison.scale > 0
    return describe(
        case,
        comparison,
        batches,
        kind,
        departures,
        comparison.noise / noise if comparable else None,
    )


def describe(
    case: ProofCase,
    comparison: Comparison,
    batches: int,
    kind: str,
    departures: list[Departure],
    variance_ratio: float | None,
) -> Line:
    spec, world_spec = case.spec, case.world_spec
    departures = [] if kind == EXACT else departures
    words = ", ".join(d.keyword for d in departures)
    first = "reused" if world_spec.reused else "mismatch" if world_spec.mismatch else "fresh"
    data = "second pass" if case.second_pass else first
    kl = case.kl or spec.kl_estimator + (" × ratio" if spec.use_bias_correction_kl else "")
    mask = "EOS left out" if not world_spec.train_eos else {"mask": "no truncated"}.get(spec.truncated, "all")
    return Line(
        section=case.section,
        algorithm=case.algorithm,
        detail=case.detail,
        baseline=spec.baseline,
        reduction=spec.loss_type,
        mask=mask,
        kl=kl if spec.beta else "none",
        placement=spec.kl_placement if spec.beta else "none",
        data=data,
        num_generations=world_spec.num_generations,
        prompts_per_step=world_spec.prompts_per_step,
        batches=batches,
        bias=comparison.bias,
        bias_absolute=comparison.bias_absolute,
        cosine=comparison.cosine,
        scale=comparison.scale,
        variance_ratio=variance_ratio,
        standard_error=comparison.standard_error,
        kind=kind,
        verdict=f"{kind}: {words}" if words else kind,
        reasons=tuple((d.keyword, d.sentence) for d in departures),
        expected=kind == case.expect,
    )
