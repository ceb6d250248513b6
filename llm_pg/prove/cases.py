"""The lines of the table, and the verdict that each is known to get."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from ..algorithms.algorithm import Algorithm, Batch
from ..algorithms.spec import AlgorithmSpec, Correction, KlEstimator
from ..algorithms.table import ALGORITHMS
from ..estimators.baselines import leave_one_out_std
from ..estimators.masked import masked_sum
from ..estimators.returns import total_return
from ..rollouts import Rollouts
from .measure import BIASED, DIRECTION, EXACT, NOTHING, ProofCase
from .reasons import NO_CLIP
from .world import FixedMeans
from .worlds import Warp, WorldSpec

ONE = WorldSpec()
BOTH = WorldSpec(horizon=2, num_generations=3, prompts_per_step=2)
GRADED = BOTH.replace(rewards="graded")
PLAIN = AlgorithmSpec("reinforce", "", surrogate="reinforce")
TOTAL = dataclasses.replace(PLAIN, returns="total")
RLOO = ALGORITHMS["rloo"]
CRITIC = dataclasses.replace(PLAIN, baseline="value")


class SequenceK2(Algorithm):
    """½(log π(y) - log ref(y))² of whole completions, added to the loss: a KL in the loss that is exact."""

    def loss(self, logp_BT: Tensor, batch: Batch, **others: object) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = super().loss(logp_BT, batch, **others)  # type: ignore[arg-type]
        ref_logp_BT = batch.rollouts.ref_logp_BT
        assert ref_logp_BT is not None
        log_ratio_B = masked_sum(logp_BT - ref_logp_BT, batch.mask_BT, 1)
        return loss + (0.5 * log_ratio_B**2).mean(), stats


class WithoutEqualOthers(Algorithm):
    """Leaves out rollouts whose others are all equal, as a filter on the others' deviation does: the one success of a
    group of failures is among them."""

    def compute_advantages(self, rollouts: Rollouts, **others: Any) -> Batch:
        batch = super().compute_advantages(rollouts, **others)
        return_B = total_return(rollouts.reward_BT, rollouts.discount_BT)
        says_B = leave_one_out_std(return_B, rollouts.group_B, rollouts.valid_B) > 0
        return dataclasses.replace(batch, advantage_BT=batch.advantage_BT * says_B.unsqueeze(1))


def _by_role(spec: AlgorithmSpec, horizon: int) -> Algorithm:
    """Each prompt is a role with a mean of its own; any two numbers are exact."""
    algorithm = Algorithm(spec, horizon)
    algorithm.running_means = FixedMeans([0.3, 0.7])
    return algorithm


def _filtered(spec: AlgorithmSpec, horizon: int) -> Algorithm:
    return WithoutEqualOthers(spec, horizon)


def _shipped() -> Iterator[ProofCase]:
    expect = dict.fromkeys(("reinforce", "rloo", "remax", "maxrl", "pass_at_k", "rae", "opd"), EXACT) | {
        "dr_grpo": DIRECTION
    }
    for world_spec, title in (
        (ONE, "As shipped, one prompt a step"),
        (GRADED, "As shipped, two prompts a step, graded rewards"),
    ):
        for name, spec in ALGORITHMS.items():
            world = world_spec.replace(critic="exact") if spec.needs_critic else world_spec
            world = world.replace(teacher="far") if spec.teacher_coef else world
            detail = f"exact critic, λ {spec.lam:g}" if spec.needs_critic else _objective(spec, world_spec)
            verdict = BIASED if name == "maxrl" and world_spec is GRADED else expect.get(name, BIASED)
            yield ProofCase(title, name, spec, world, verdict, detail, quick=world_spec is ONE)


def _objective(spec: AlgorithmSpec, world_spec: WorldSpec) -> str:
    """The objective of a row, where it is not the mean reward."""
    if spec.teacher_coef:
        return "of -KL to the teacher" if not spec.reward_coef else "of the reward less the KL to the teacher"
    if spec.pass_k:
        return f"of the best of {spec.pass_k}"
    terms = world_spec.num_generations - 1
    return f"of log p, {terms} term{'s' if terms > 1 else ''}" if spec.scale_rewards == "group_mean" else ""


def _objectives() -> Iterator[ProofCase]:
    title = "Other objectives than the mean reward"
    best, likely = ALGORITHMS["pass_at_k"], ALGORITHMS["maxrl"]
    for k in (1, 3):
        spec = dataclasses.replace(best, pass_k=k)
        yield ProofCase(title, "pass_at_k", spec, ONE, EXACT, _objective(spec, ONE))
    for generations in (2, 3):
        world_spec = ONE.replace(num_generations=generations)
        yield ProofCase(title, "maxrl", likely, world_spec, EXACT, _objective(likely, world_spec))
    token_mean = dataclasses.replace(likely, loss_type="dapo")
    yield ProofCase(title, "maxrl", token_mean, ONE, BIASED, _objective(likely, ONE))


def _reductions() -> Iterator[ProofCase]:
    title = "Baseline × reduction, two prompts a step (bnpo = dapo)"
    for baseline in ("none", "running_mean", "batch_mean", "group_mean", "leave_one_out"):
        for reduction in ("sequence_sum", "dr_grpo", "grpo", "dapo"):
            spec = dataclasses.replace(PLAIN, baseline=baseline, loss_type=reduction)
            shrunk = baseline in ("batch_mean", "group_mean") or reduction == "dr_grpo"
            expect = BIASED if reduction in ("grpo", "dapo") else DIRECTION if shrunk else EXACT
            yield ProofCase(title, "reinforce", spec, BOTH, expect)


def _roles() -> Iterator[ProofCase]:
    title = "A running mean for each role (RAE), two prompts a step"
    roles = dataclasses.replace(ALGORITHMS["rae"], baseline_column="role")
    for rewards in ("binary", "graded", "dense"):
        world = BOTH.replace(rewards=rewards)
        yield ProofCase(title, "rae", roles, world, EXACT, f"{rewards} rewards", make=_by_role)
    to_go = dataclasses.replace(roles, returns="reward_to_go")
    yield ProofCase(title, "rae", to_go, BOTH.replace(rewards="dense"), EXACT, "dense rewards, to-go", make=_by_role)


def _scaling() -> Iterator[ProofCase]:
    title = "Scaled by a deviation"
    z_score = dataclasses.replace(TOTAL, baseline="group_mean", scale_rewards="group")
    short = WorldSpec(horizon=2)
    for generations in (2, 3, 4, 8):
        expect = DIRECTION if generations <= 3 else BIASED
        yield ProofCase(
            title, "z-score", z_score, short.replace(num_generations=generations), expect, f"G = {generations}"
        )
    yield ProofCase(title, "z-score", z_score, ONE.replace(prompts="one"), DIRECTION, "one prompt", quick=True)
    graded = ONE.replace(prompts="one", rewards="graded")
    yield ProofCase(title, "z-score", z_score, graded, BIASED, "one prompt, graded rewards")
    others = dataclasses.replace(RLOO, scale_rewards="leave_one_out")
    for prompts, expect in (("one", DIRECTION), ("two", BIASED)):
        world = ONE.replace(prompts=prompts)
        detail = f"{prompts} prompt{'s' * (prompts == 'two')}"
        yield ProofCase(title, "others' deviation", others, world, expect, detail)
        dropped = f"{detail}, equal others dropped"
        yield ProofCase(title, "others' deviation", others, world, expect, dropped, make=_filtered)
    two = ONE.replace(rewards="two")
    yield ProofCase(title, "gdpo", ALGORITHMS["gdpo"], two, BIASED, "two functions, each normalised, then the sum")
    yield ProofCase(title, "grpo", ALGORITHMS["grpo"], two, BIASED, "two functions, the sum normalised")
    batch = dataclasses.replace(RLOO, scale_rewards="batch")
    yield ProofCase(title, "batch deviation", batch, BOTH, BIASED, quick=True)
    for kind in ("rollouts", "steps"):
        yield ProofCase(
            title, f"normalised {kind}", dataclasses.replace(TOTAL, normalize_advantages=kind), BOTH, BIASED
        )


def _returns() -> Iterator[ProofCase]:
    title = "Credit, dense rewards"
    dense = ONE.replace(rewards="dense")
    yield ProofCase(title, "total return", TOTAL, dense, EXACT)
    yield ProofCase(title, "reward-to-go", PLAIN, dense, EXACT)
    yield ProofCase(title, "rloo", RLOO, dense, EXACT, "to-go less others' return")
    per_step = dataclasses.replace(RLOO, baseline_per_step=True)
    yield ProofCase(title, "rloo", per_step, dense, EXACT, "to-go less others' to-go")
    yield ProofCase(title, "total return", TOTAL, dense.replace(gamma=0.9), EXACT, "γ 0.9")
    yield ProofCase(title, "reward-to-go", PLAIN, dense.replace(gamma=0.9), BIASED, "γ 0.9")


def _masks() -> Iterator[ProofCase]:
    title = "What is trained"
    yield ProofCase(title, "reinforce", TOTAL, ONE.replace(train_eos=False), BIASED, "EOS left out", quick=True)
    dropped = dataclasses.replace(PLAIN, truncated="mask")
    yield ProofCase(title, "reinforce", dropped, ONE, BIASED, "truncated dropped", quick=True)
    fined = dataclasses.replace(PLAIN, truncated="penalize", truncation_penalty=0.5)
    yield ProofCase(title, "reinforce", fined, ONE, EXACT, "truncated fined, as objective")
    unscored = ONE.replace(unscored=True, prompts="one")
    yield ProofCase(title, "rloo", RLOO, unscored, DIRECTION, "unscored dropped, one prompt")
    yield ProofCase(title, "reinforce", PLAIN, unscored, BIASED, "unscored dropped, one prompt")
    cool: Warp = (("temperature", 0.6),)
    cut: Warp = (("top_k", 2),)
    nucleus: Warp = (("top_p", 0.7),)
    for warp, name in ((cool, "T 0.6"), (cut, "top-k 2"), (nucleus, "top-p 0.7")):
        wrong, right = ONE.replace(sampler=warp, trained=()), ONE.replace(sampler=warp)
        yield ProofCase(title, "reinforce", PLAIN, wrong, BIASED, f"sampled {name}, trained T 1", quick=True)
        yield ProofCase(title, "reinforce", PLAIN, right, EXACT, f"sampled {name}, trained {name}", quick=True)


def _critics() -> Iterator[ProofCase]:
    title = "Critic, GAE"
    for critic in ("exact", "wrong", "zero"):
        for lam in (0.0, 0.5, 0.95, 1.0):
            expect = EXACT if critic == "exact" or lam == 1.0 else BIASED
            spec = dataclasses.replace(CRITIC, lam=lam)
            yield ProofCase(title, "gae", spec, ONE.replace(critic=critic), expect, f"{critic} critic, λ {lam:g}")
    yield ProofCase(title, "a2c", ALGORITHMS["a2c"], ONE.replace(critic="wrong"), BIASED, "wrong critic, λ 1")


def _with_penalty() -> Iterator[ProofCase]:
    title = "With its KL penalty, beta 0.5"
    world = ONE.replace(reference="far")
    for name, expect in (("reinforce", EXACT), ("rloo", EXACT), ("grpo", BIASED), ("dr_grpo", BIASED)):
        spec = dataclasses.replace(ALGORITHMS[name], beta=0.5)
        detail = f"{spec.kl_estimator} in the {spec.kl_placement}"
        yield ProofCase(title, name, spec, world, expect, detail)
    summed = dataclasses.replace(RLOO, beta=0.5, returns="total")
    yield ProofCase(title, "rloo", summed, world, EXACT, "k1 in the reward, summed")


def _penalties() -> Iterator[ProofCase]:
    for distance in ("far", "near"):
        title = (
            "KL penalty alone, far from the reference" if distance == "far" else "KL penalty alone, near the reference"
        )
        world = ONE.replace(rewards="none", reference=distance)
        quick = distance == "far"

        case = partial(_penalty, title, world, quick)
        penalty = dataclasses.replace(PLAIN, beta=1.0)
        yield case(dataclasses.replace(penalty, returns="total"), EXACT, "k1 in the reward, summed")
        yield case(penalty, EXACT, "k1 in the reward, to-go")
        of_sequence = dataclasses.replace(penalty, kl_placement="loss", kl_estimator="k2")
        yield case(of_sequence, EXACT, "½(sequence k)² in the loss", make=_sequence_k2, kl="k2 of the sequence")
        kinds: tuple[KlEstimator, ...] = ("k2", "k3")
        for kind in kinds:
            in_loss = dataclasses.replace(penalty, kl_placement="loss", kl_estimator=kind)
            yield case(in_loss, BIASED, f"{kind} in the loss")
        corrected = dataclasses.replace(
            penalty, kl_placement="loss", kl_estimator="k3", use_bias_correction_kl=True, surrogate="clip"
        )
        yield case(corrected, BIASED, "k3 × ratio in the loss (grpo's)")
        yield case(dataclasses.replace(penalty, kl_placement="loss"), NOTHING, "k1 in the loss")
        for kind in kinds:
            yield case(dataclasses.replace(penalty, kl_estimator=kind), BIASED, f"{kind} in the reward")


def _penalty(
    title: str,
    world: WorldSpec,
    quick: bool,
    spec: AlgorithmSpec,
    expect: str,
    detail: str,
    make: Callable[[AlgorithmSpec, int], Algorithm] | None = None,
    kl: str = "",
) -> ProofCase:
    return ProofCase(title, "kl", spec, world, expect, detail, quick=quick, make=make, kl=kl)


def _sequence_k2(spec: AlgorithmSpec, horizon: int) -> Algorithm:
    return SequenceK2(dataclasses.replace(spec, beta=0.0), horizon)


def _taught() -> Iterator[ProofCase]:
    title = "With a teacher, far from it"
    world, near = ONE.replace(teacher="far"), ONE.replace(teacher="near")
    to_go = ALGORITHMS["opd"]
    alone = dataclasses.replace(to_go, baseline="none")
    yield ProofCase(title, "opd", alone, world, EXACT, "no baseline")
    shares = [(share, dataclasses.replace(to_go, teacher_discount=share)) for share in (1.0, 0.5, 0.0)]
    for share, spec in shares:
        yield ProofCase(title, "opd", spec, world, EXACT if share == 1 else BIASED, f"teacher_discount {share:g}")
    unscored = world.replace(unscored=True)
    yield ProofCase(title, "opd", to_go, unscored, EXACT, "some completions without a verdict")
    for name, expect in (("reinforce", EXACT), ("rloo", EXACT), ("grpo", BIASED)):
        both = dataclasses.replace(ALGORITHMS[name], teacher_coef=0.5)
        yield ProofCase(title, name, both, world, expect, "reward less half the KL to the teacher")
    yield ProofCase(title, "opd", to_go, world.replace(reused=True), BIASED, "data of an older policy, token ratio")
    title = "With a teacher, near it"
    for share, spec in shares:
        yield ProofCase(title, "opd", spec, near, EXACT if share == 1 else BIASED, f"teacher_discount {share:g}")


def _reused() -> Iterator[ProofCase]:
    title = "Data of an older policy"
    old = ONE.replace(reused=True)
    yield ProofCase(title, "reinforce", PLAIN, old, BIASED, "no ratio", quick=True)
    free = dataclasses.replace(RLOO, epsilon=NO_CLIP)
    yield ProofCase(title, "rloo", RLOO, old, BIASED, "completion's ratio", quick=True)
    yield ProofCase(title, "rloo", free, old, EXACT, "completion's ratio, no clipping", quick=True)
    token = dataclasses.replace(RLOO, importance_sampling_level="token")
    yield ProofCase(title, "rloo", token, old, BIASED, "token ratio")
    yield ProofCase(title, "rloo", dataclasses.replace(token, epsilon=NO_CLIP), old, BIASED, "token ratio, no clipping")
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo", "dppo", "sapo", "luspo", "vespo"):
        levels = {"token": "token ratio", "sequence": "geometric ratio", "sequence_sum": "completion's ratio"}
        yield ProofCase(title, name, ALGORITHMS[name], old, BIASED, levels[ALGORITHMS[name].importance_sampling_level])
    yield ProofCase(title, "ppo", ALGORITHMS["ppo"], old.replace(critic="exact"), BIASED, "exact critic, λ 0.95")
    luspo = dataclasses.replace(RLOO, importance_sampling_level="sequence")
    for detail, alone in (("luspo's loss", luspo), ("vespo's loss", dataclasses.replace(RLOO, surrogate="vespo"))):
        yield ProofCase(title, "rloo", alone, ONE, EXACT, f"{detail}, fresh data")
        yield ProofCase(title, "rloo", alone, old, BIASED, detail)
    title = "Second pass over a step's own data, after a first one of step size 1"
    yield ProofCase(title, "rloo", free, ONE, BIASED, "completion's ratio, no clipping", second_pass=True)
    yield ProofCase(title, "rloo", RLOO, ONE, BIASED, "completion's ratio", second_pass=True)
    yield ProofCase(title, "grpo", ALGORITHMS["grpo"], ONE, BIASED, "token ratio", second_pass=True)


def _mismatched() -> Iterator[ProofCase]:
    title = "A sampler that computes the policy differently"
    world = ONE.replace(mismatch=True)
    yield ProofCase(title, "rloo", RLOO, world, BIASED, "no correction", quick=True)
    yield _corrected(title, world, "sequence_truncate", NO_CLIP, EXACT)
    yield _corrected(title, world, "sequence_truncate", 1.2, BIASED)
    yield _corrected(title, world, "sequence_mask", 1.2, BIASED)
    yield _corrected(title, world, "sequence_mask", 3.0, EXACT)
    yield _corrected(title, world, "token_truncate", 3.0, BIASED)
    yield _corrected(title, world, "token_mask", 3.0, BIASED)
    yield _corrected(title, world, "sequence_binary_kl", 3e-3, BIASED)
    yield _corrected(title, world, "sequence_binary_kl", NO_CLIP, BIASED)
    title = "Tokens and completions left out"
    masked = dataclasses.replace(RLOO, off_policy_mask_threshold=0.05, epsilon=NO_CLIP)
    yield ProofCase(title, "rloo", masked, ONE, EXACT, "off-policy mask, fresh data")
    yield ProofCase(title, "rloo", masked, ONE.replace(reused=True), BIASED, "off-policy mask 0.05, older data")
    some = dataclasses.replace(RLOO, top_entropy_quantile=0.2)
    yield ProofCase(title, "rloo", some, ONE, BIASED, "a fifth of the tokens, by entropy")


def _corrected(title: str, world: WorldSpec, mode: Correction, bound: float, expect: str) -> ProofCase:
    spec = dataclasses.replace(
        RLOO,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=bound,
    )
    detail = f"{mode}, no bound" if bound == NO_CLIP else f"{mode} {bound:g}"
    return ProofCase(title, "rloo", spec, world, expect, detail, quick=expect == EXACT)


def _bonus() -> Iterator[ProofCase]:
    spec = dataclasses.replace(PLAIN, entropy_coef=1.0)
    yield ProofCase("Entropy bonus alone", "entropy", spec, ONE.replace(rewards="none"), BIASED, "mean token entropy")


def all_cases() -> list[ProofCase]:
    """Every line, in the order of the table."""
    parts = (
        _shipped,
        _objectives,
        _reductions,
        _roles,
        _scaling,
        _returns,
        _masks,
        _critics,
        _with_penalty,
        _penalties,
        _taught,
        _reused,
        _mismatched,
        _bonus,
    )
    return [case for part in parts for case in part()]
