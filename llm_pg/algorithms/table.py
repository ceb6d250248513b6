"""The table of algorithms: each is a row of differences from plain REINFORCE. Imports no torch.

`llm-pg prove` says of every row whether its expected update is the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from ..words import annotations_of, check_fields, words_of

Returns = Literal["reward_to_go", "total"]
Baseline = Literal[
    "none", "running_mean", "batch_mean", "group_mean", "leave_one_out", "length_weighted", "greedy", "value"
]
ScaleRewards = Literal["none", "group", "batch", "group_mean"]
Normalize = Literal["none", "rollouts", "steps"]
Surrogate = Literal["reinforce", "clip", "cispo", "sapo"]
Level = Literal["token", "sequence", "sequence_sum"]
LossType = Literal["sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo"]
KlPlacement = Literal["reward", "loss"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Truncated = Literal["keep", "mask", "penalise", "bootstrap"]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Memory = Annotated[float, Ge(0), Lt(1)]
Discount = Annotated[float, Gt(0), Le(1)]
AboveOne = Annotated[float, Gt(1)]
GROUP_BASELINES = ("group_mean", "leave_one_out", "length_weighted")


@dataclass(frozen=True)
class Row:
    """How an algorithm weighs what was sampled. The defaults are plain REINFORCE, whose expected update is ∇J.

    Attributes:
        advantage: a function from `Rollouts` to weights (B,) or (B, T), in the place of returns and baseline; None =
            the row's own. See `algorithms.own`.
        loss: a function (logp_BT, batch) -> scalar in the place of surrogate and reduction, the sum over the rows that
            it is given: what `llm-pg prove --loss F` proves. Penalties, bonus and the critic's loss are added to it.
        returns: what a token is credited with: the rewards from it on, or all of the row's.
        baseline: what is subtracted; length_weighted: the group's mean weighted by length (OPO); greedy: the reward of
            the prompt's greedy completion (ReMax); `value` needs a critic and uses GAE(gamma, lam).
        baseline_per_step: compare the reward-to-go of step t with the group's rewards-to-go of step t, where steps
            have rewards of their own (group baselines only); otherwise with the group's returns.
        scale_rewards: what to divide by: none, the deviation of each group's returns, of the batch's, or each group's
            mean (MaxRL: the objective is then the likelihood of success, see `estimators.objectives`).
        pass_k: 0 = the mean reward is the objective; k = the best reward of k completions is, with the groups' other
            completions as baseline (k < group).
        normalize_advantages: weights shifted and scaled to mean 0, deviation 1 over rollouts or over steps.
        surrogate: reinforce (-w log π, no reuse), clip (PPO), cispo, sapo (a soft gate instead of clipping).
        importance_sampling_level: token, sequence (geometric mean), sequence_sum (product).
        loss_type: the reduction. sequence_sum: tokens summed, completions averaged (exact). grpo: mean over each
            completion's tokens, then over completions. dapo, bnpo: mean over all tokens of the batch. dr_grpo: sum
            divided by completions × max_completion_length.
        epsilon, epsilon_high, delta: clipping, see `estimators.losses.clipped`. sapo_temperature_pos, _neg: how fast
            the soft gate closes for positive and for other weights.
        vllm_importance_sampling_correction: multiply the policy term by π_trainer/π_sampler of the same weights, where
            the two compute differently; _mode, _clip_max, _clip_min: see `estimators.ratios.sampler_correction`. The
            names are TRL's; any sampler is corrected.
        off_policy_mask_threshold: nats a token; completions of negative weight that the policy has left by more are
            dropped from the policy term; None = none is.
        top_entropy_quantile: share of the batch's tokens, those of largest entropy, that keep their weight, and that
            the entropy bonus is a mean over, as in TRL; 1 = all.
        beta: weight of the KL penalty; 0 loads no reference. kl_placement, kl_estimator: see `estimators.kl`.
        use_bias_correction_kl: KL in the loss times the importance ratio, as TRL 1.16 does by default.
        kl_target: KL(old || new) of an update, nats a step, that an adaptive penalty keeps to; 0 = no penalty.
        entropy_coef: weight of the mean token entropy, moving linearly to `entropy_coef_final` by the end.
        gamma: discount in (0, 1]. lam: λ of GAE. lam_value: λ of the critic's targets where it differs (1 in VAPO: the
            critic then learns the returns themselves). lam_length_alpha: λ of the advantages by each row's length,
            see `estimators.critics.length_adaptive_lambda`; then `lam` serves the targets alone.
        vf_coef: weight of the value loss. value_clip: its clipping width; off, as it holds the critic back where the
            targets move most, and hurt at every width in Andrychowicz et al. 2021 (arXiv 2006.05990).
        truncated: completions that hit the length limit are kept, masked out of the loss, `truncation_penalty` is
            taken off their reward, or (with a critic) bootstrap: the value of the state they were cut in stands for
            their verdict. Kept unless asked otherwise, also with a critic: the limit belongs to the task that is
            evaluated, so its verdict is the true return, while a bootstrap pays a policy that never ends with its
            own critic's hopes.
        baseline_decay: memory of the running mean.

    Raises:
        ValueError: a word that is not known, with the nearest one that is, or a number outside its range.
    """

    name: str
    source: str
    advantage: Callable[[Any], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    returns: Returns = "reward_to_go"
    baseline: Baseline = "none"
    baseline_per_step: bool = False
    scale_rewards: ScaleRewards = "none"
    pass_k: Count = 0
    normalize_advantages: Normalize = "none"
    surrogate: Surrogate = "clip"
    importance_sampling_level: Level = "token"
    loss_type: LossType = "sequence_sum"
    epsilon: Positive = 0.2
    epsilon_high: Positive | None = None
    delta: AboveOne | None = None
    sapo_temperature_pos: Positive = 1.0
    sapo_temperature_neg: Positive = 1.05
    vllm_importance_sampling_correction: bool = False
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    vllm_importance_sampling_clip_max: Positive | None = 3.0
    vllm_importance_sampling_clip_min: Positive | None = None
    off_policy_mask_threshold: Positive | None = None
    top_entropy_quantile: Share = 1.0
    beta: NotNegative = 0.0
    kl_placement: KlPlacement = "reward"
    kl_estimator: KlEstimator = "k1"
    use_bias_correction_kl: bool = False
    kl_target: NotNegative = 0.0
    entropy_coef: NotNegative = 0.0
    entropy_coef_final: NotNegative | None = None
    gamma: Discount = 1.0
    lam: Share = 1.0
    lam_value: Share | None = None
    lam_length_alpha: Positive | None = None
    vf_coef: NotNegative = 0.5
    value_clip: Positive | None = None
    truncated: Truncated = "keep"
    truncation_penalty: NotNegative = 0.0
    baseline_decay: Memory = 0.9

    def __post_init__(self) -> None:
        check_fields(self, f"Row {self.name!r}")
        if self.baseline_per_step and self.baseline not in ("group_mean", "leave_one_out"):
            raise ValueError(
                f"Row {self.name!r}: baseline_per_step compares the steps of a group, and the baseline is "
                f"{self.baseline}. Use baseline leave_one_out or group_mean, or leave baseline_per_step out."
            )

        if self.loss is not None and (self.vllm_importance_sampling_correction or self.off_policy_mask_threshold):
            raise ValueError(
                f"Row {self.name!r} has a loss of its own, whose tokens cannot be corrected for the sampler one by "
                "one. Set vllm_importance_sampling_correction=false and off_policy_mask_threshold=null (with "
                "max_staleness the loss must correct by itself: batch.rollouts.logp_BT holds the log-probabilities of "
                "the sampler)."
            )

    @property
    def needs_group(self) -> bool:
        return self.baseline in GROUP_BASELINES or self.scale_rewards in ("group", "group_mean") or self.pass_k > 0

    @property
    def needs_critic(self) -> bool:
        return self.baseline == "value"


WORDS: dict[str, tuple[str, ...]] = {
    name: known for name, annotation in annotations_of(Row).items() if (known := words_of(annotation))
}

_GRPO = Row(
    "grpo",
    "Shao et al. 2024, arXiv 2402.03300; reduction and KL as TRL 1.16",
    returns="total",
    baseline="group_mean",
    scale_rewards="group",
    loss_type="dapo",
    kl_placement="loss",
    kl_estimator="k3",
    use_bias_correction_kl=True,
)

_ROWS = (
    Row("reinforce", "Williams 1992; reward-to-go: Sutton et al. 2000", surrogate="reinforce"),
    Row(
        "rloo",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        baseline="leave_one_out",
        importance_sampling_level="sequence_sum",
    ),
    _GRPO,
    dataclasses.replace(
        _GRPO, name="dr_grpo", source="Liu et al. 2025, arXiv 2503.20783", scale_rewards="none", loss_type="dr_grpo"
    ),
    dataclasses.replace(_GRPO, name="dapo", source="Yu et al. 2025, arXiv 2503.14476", epsilon_high=0.28),
    dataclasses.replace(
        _GRPO,
        name="gspo",
        source="Zheng et al. 2025, arXiv 2507.18071",
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=3e-4,
        epsilon_high=4e-4,
    ),
    dataclasses.replace(
        _GRPO, name="cispo", source="MiniMax-M1 2025, arXiv 2506.13585", surrogate="cispo", epsilon_high=5.0
    ),
    dataclasses.replace(
        _GRPO, name="sapo", source="Gao et al. 2025, arXiv 2511.20347", surrogate="sapo", loss_type="grpo"
    ),
    Row(
        "reinforce_plus_plus",
        "Hu et al. 2025, arXiv 2501.03262",
        normalize_advantages="steps",
        loss_type="dapo",
    ),
    Row(
        "reinforce_plus_plus_baseline",
        "Hu et al. 2025, arXiv 2501.03262, with baseline",
        returns="total",
        baseline="group_mean",
        normalize_advantages="steps",
        loss_type="dapo",
        kl_placement="loss",
        kl_estimator="k2",
    ),
    Row("remax", "Li et al. 2023, arXiv 2310.10505", baseline="greedy", surrogate="reinforce"),
    Row(
        "opo",
        "Hao et al. 2025, arXiv 2505.23585",
        returns="total",
        baseline="length_weighted",
        surrogate="reinforce",
    ),
    Row(
        "maxrl",
        "Maximum Likelihood Reinforcement Learning 2026, arXiv 2602.02710",
        returns="total",
        baseline="group_mean",
        scale_rewards="group_mean",
        kl_placement="loss",
        kl_estimator="k2",
    ),
    Row(
        "pass_at_k",
        "Walder and Karkhanis 2025, arXiv 2505.15201; baseline: k others",
        returns="total",
        baseline="leave_one_out",
        pass_k=2,
        kl_placement="loss",
        kl_estimator="k2",
    ),
    Row(
        "a2c",
        "Mnih et al. 2016, arXiv 1602.01783",
        baseline="value",
        surrogate="reinforce",
        loss_type="dapo",
        gamma=1.0,
    ),
    Row(
        "ppo",
        "Schulman et al. 2017, arXiv 1707.06347; GAE: arXiv 1506.02438",
        baseline="value",
        normalize_advantages="steps",
        loss_type="dapo",
        lam=0.95,
    ),
)

TABLE: dict[str, Row] = {row.name: row for row in _ROWS}
