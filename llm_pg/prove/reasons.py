"""The ways in which an estimator departs from ∇J: what each is called, why it matters, and what undoes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ..algorithms.spec import AlgorithmSpec
from .worlds import WorldSpec

NO_CLIP = 1e9


@dataclass(frozen=True, eq=False)
class Departure:
    """One departure.

    Attributes:
        keyword: its name in the verdict. sentence: why the update is off.
        present: whether a row in a world has it.
        remedy: the same row and world without it.
    """

    keyword: str
    sentence: str
    present: Callable[[AlgorithmSpec, WorldSpec], bool]
    remedy: Callable[[AlgorithmSpec, WorldSpec], tuple[AlgorithmSpec, WorldSpec]]


def _spec(**changes: object) -> Callable[[AlgorithmSpec, WorldSpec], tuple[AlgorithmSpec, WorldSpec]]:
    return lambda spec, world_spec: (dataclasses.replace(spec, **changes), world_spec)  # type: ignore[arg-type]


def _world_spec(**changes: object) -> Callable[[AlgorithmSpec, WorldSpec], tuple[AlgorithmSpec, WorldSpec]]:
    return lambda spec, world_spec: (spec, world_spec.replace(**changes))


def _kl(kind: str, placement: str, sentence: str) -> Departure:
    def present(spec: AlgorithmSpec, world_spec: WorldSpec) -> bool:
        shipped = spec.kl_estimator == kind and spec.kl_placement == placement and not spec.use_bias_correction_kl
        return bool(spec.beta) and shipped

    return Departure(f"{kind} in the {placement}", sentence, present, _spec(kl_placement="reward", kl_estimator="k1"))


def _has_ratio(spec: AlgorithmSpec, world_spec: WorldSpec) -> bool:
    return world_spec.reused and spec.surrogate != "reinforce"


def _is_corrected(spec: AlgorithmSpec, world_spec: WorldSpec) -> bool:
    return world_spec.mismatch and spec.vllm_importance_sampling_correction


_OWN_RATIOS = ("token_truncate", "token_mask", "sequence_binary_kl")  # of each token
_UNBOUNDED = {
    "vllm_importance_sampling_mode": "sequence_truncate",
    "vllm_importance_sampling_clip_max": NO_CLIP,
    "vllm_importance_sampling_clip_min": None,
}


OWN_DATA = Departure(
    "its own data",
    "After a first pass θ depends on the very rollouts that the second pass averages over, so no ratio, not even the "
    "exact one, makes the second update unbiased.",
    lambda spec, world_spec: False,
    lambda spec, world_spec: (spec, world_spec),
)

DEPARTURES: tuple[Departure, ...] = (
    Departure(
        "itself in the mean",
        "The mean that a rollout is compared with contains itself, which takes 1/n off the gradient.",
        lambda spec, world_spec: spec.baseline in ("group_mean", "batch_mean") and spec.scale_rewards != "group_mean",
        _spec(baseline="leave_one_out"),
    ),
    Departure(
        "own length in the mean",
        "The mean that a rollout is compared with contains itself, at a weight that is its own length.",
        lambda spec, world_spec: spec.baseline == "length_weighted",
        _spec(baseline="leave_one_out"),
    ),
    Departure(
        "graded rewards",
        "Over the group's mean only verdicts of 0 and 1 make the update a gradient, that of the likelihood of success.",
        lambda spec, world_spec: spec.scale_rewards == "group_mean" and world_spec.rewards not in ("binary", "none"),
        _world_spec(rewards="binary"),
    ),
    Departure(
        "group deviation",
        "Dividing by a group's deviation reweights prompts (and, where rewards are not 0/1, answers), the more so the "
        "larger the group.",
        lambda spec, world_spec: spec.scale_rewards == "group",
        _spec(scale_rewards="none"),
    ),
    Departure(
        "each function's deviation",
        "Dividing each reward function by its deviation in the group reweights functions and prompts.",
        lambda spec, world_spec: spec.multi_objective_aggregation == "normalize_then_sum",
        _spec(multi_objective_aggregation="sum_then_normalize"),
    ),
    Departure(
        "others' deviation",
        "Dividing by the deviation of the group's others reweights prompts, and where the others are equal divides by "
        "nothing.",
        lambda spec, world_spec: spec.scale_rewards == "leave_one_out",
        _spec(scale_rewards="none"),
    ),
    Departure(
        "batch deviation",
        "The batch's deviation is computed from the rollouts that it divides.",
        lambda spec, world_spec: spec.scale_rewards == "batch",
        _spec(scale_rewards="none"),
    ),
    Departure(
        "normalised advantages",
        "Mean and deviation of the batch's advantages are computed from the rollouts that they shift and divide.",
        lambda spec, world_spec: spec.normalize_advantages != "none",
        _spec(normalize_advantages="none"),
    ),
    Departure(
        "1/length",
        "Averaging over a completion's own tokens counts a long completion less: length bias.",
        lambda spec, world_spec: spec.loss_type == "grpo",
        _spec(loss_type="sequence_sum"),
    ),
    Departure(
        "token mean",
        "The number of tokens that happened to be sampled is a random denominator, correlated with what was sampled.",
        lambda spec, world_spec: spec.loss_type in ("dapo", "bnpo"),
        _spec(loss_type="sequence_sum"),
    ),
    Departure(
        "a constant",
        "The sum is divided by the constant max_completion_length.",
        lambda spec, world_spec: spec.loss_type == "dr_grpo",
        _spec(loss_type="sequence_sum"),
    ),
    Departure(
        "clipping",
        "Tokens (or completions) whose ratio left the trust region get no gradient, by design.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.surrogate == "clip" and spec.epsilon < NO_CLIP,
        _spec(epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "ratio cut from above",
        "Ratios over epsilon_high count as epsilon_high.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.surrogate == "cispo",
        _spec(surrogate="clip", epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "geometric mean",
        "A completion's terms have the geometric mean of its ratios in the place of its probability ratio, each ratio "
        "clipped.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.surrogate == "gmpo",
        _spec(surrogate="clip", epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "diverged dropped",
        "Tokens that moved further than a divergence get no gradient, by design.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.surrogate == "dppo",
        _spec(surrogate="clip", epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "soft gate",
        "The further a ratio leaves 1, the less gradient its token gets, by design.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.surrogate in ("sapo", "vespo"),
        _spec(surrogate="clip", epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "token ratio",
        "A token's ratio corrects its own choice, not that its prefix and what follows came from the older policy.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.importance_sampling_level == "token",
        _spec(importance_sampling_level="sequence_sum"),
    ),
    Departure(
        "geometric ratio",
        "The geometric mean of a completion's ratios is not its probability ratio.",
        lambda spec, world_spec: _has_ratio(spec, world_spec) and spec.importance_sampling_level == "sequence",
        _spec(importance_sampling_level="sequence_sum"),
    ),
    Departure(
        "no ratio",
        "The data came from an older policy and nothing corrects for it.",
        lambda spec, world_spec: world_spec.reused and spec.surrogate == "reinforce",
        _spec(surrogate="clip", importance_sampling_level="sequence_sum", epsilon=NO_CLIP, epsilon_high=None),
    ),
    Departure(
        "no correction",
        "The sampler computes other probabilities than the trainer, and nothing corrects for it.",
        lambda spec, world_spec: world_spec.mismatch and not spec.vllm_importance_sampling_correction,
        _spec(vllm_importance_sampling_correction=True, **_UNBOUNDED),
    ),
    Departure(
        "token correction",
        "A token's correction is for its own choice, not for the prefix that the sampler's policy led to.",
        lambda spec, world: _is_corrected(spec, world) and spec.vllm_importance_sampling_mode in _OWN_RATIOS,
        _spec(**_UNBOUNDED),
    ),
    Departure(
        "correction bounded",
        "Corrections past their bound count as the bound, or their completions are dropped, by design.",
        lambda spec, world_spec: _is_corrected(spec, world_spec) and spec.vllm_importance_sampling_clip_max != NO_CLIP,
        _spec(vllm_importance_sampling_clip_max=NO_CLIP, vllm_importance_sampling_clip_min=None),
    ),
    Departure(
        "off-policy dropped",
        "Completions of negative weight that the policy has left get no gradient, by design.",
        lambda spec, world: spec.off_policy_mask_threshold is not None and (world.reused or world.mismatch),
        _spec(off_policy_mask_threshold=None),
    ),
    Departure(
        "low entropy dropped",
        "Tokens at which the policy was sure get no gradient.",
        lambda spec, world_spec: spec.top_entropy_quantile < 1,
        _spec(top_entropy_quantile=1.0),
    ),
    Departure(
        "EOS not trained",
        "The choice to stop gets no credit.",
        lambda spec, world_spec: not world_spec.train_eos,
        _world_spec(train_eos=True),
    ),
    Departure(
        "truncated dropped",
        "Completions that met the limit leave the sum, so the update is blind to what leads into the limit.",
        lambda spec, world_spec: spec.truncated == "mask",
        _spec(truncated="keep"),
    ),
    Departure(
        "unscored dropped",
        "Rows without a verdict leave sum and denominator: with a leave-one-out baseline that is the gradient of "
        "E[R | scored] times the probability that two of the group are scored; without one it is not.",
        lambda spec, world_spec: world_spec.unscored,
        _world_spec(unscored=False),
    ),
    Departure(
        "another distribution",
        "The tokens were drawn from a tempered or cut distribution, and the log-probabilities of another are trained.",
        lambda spec, world_spec: world_spec.trained is not None and world_spec.trained != world_spec.sampler,
        _world_spec(trained=None),
    ),
    Departure(
        "critic",
        "Below λ = 1 the critic's error takes the place of rewards that were not waited for.",
        lambda spec, world_spec: spec.needs_critic and world_spec.critic != "exact",
        _world_spec(critic="exact"),
    ),
    Departure(
        "older log π",
        "The teacher's verdict is compared with the log-probabilities of the policy that sampled, not of the one in "
        "training.",
        lambda spec, world_spec: bool(spec.teacher_coef) and (world_spec.reused or world_spec.mismatch),
        _world_spec(reused=False, mismatch=False),
    ),
    Departure(
        "token by token",
        "A token is credited with the teacher's verdict on itself and not, or not wholly, with the tokens that it "
        "leads to: the KL of what follows is missed.",
        lambda spec, world_spec: bool(spec.teacher_coef) and spec.teacher_discount < 1,
        _spec(teacher_discount=1.0),
    ),
    _kl("k1", "loss", "The expected gradient of log π is 0, so this is no penalty at all."),
    _kl("k2", "loss", "Token by token it misses that a token also moves the KL of what follows it."),
    _kl("k3", "loss", "1 - exp(-k) is not k: far from the reference the gradient is another one."),
    Departure(
        "k3 × ratio in the loss",
        "At ratio 1 its gradient is that of k2: token by token, it misses the KL of what follows.",
        lambda spec, world_spec: bool(spec.beta) and spec.kl_placement == "loss" and spec.use_bias_correction_kl,
        _spec(kl_placement="reward", kl_estimator="k1", use_bias_correction_kl=False),
    ),
    _kl("k2", "reward", "Its expectation is not the KL: close to the reference its gradient is nearly 0."),
    _kl("k3", "reward", "Its score-function gradient is not the KL's: close to the reference the push is nearly 0."),
    Departure(
        "no γ^t",
        "The discounted objective weighs step t by γ^t; as everywhere in practice the estimator does not.",
        lambda spec, world_spec: world_spec.gamma < 1,
        _world_spec(gamma=1.0),
    ),
    Departure(
        "present states only",
        "The bonus raises the entropy where the policy is, and ignores that a token leads to states of other entropy; "
        "it is also a mean over tokens.",
        lambda spec, world_spec: bool(spec.entropy_coef),
        lambda spec, world_spec: (spec, world_spec),
    ),
)
