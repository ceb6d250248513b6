"""What an algorithm can be: the fields of `AlgorithmSpec`, whose defaults are plain REINFORCE. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from ..words import annotations_of, check_fields, words_of

Returns = Literal["reward_to_go", "total"]
Baseline = Literal[
    "none", "running_mean", "batch_mean", "group_mean", "leave_one_out", "length_weighted", "greedy", "value"
]
ScaleRewards = Literal["none", "group", "batch", "leave_one_out", "group_mean"]
Normalize = Literal["none", "rollouts", "steps"]
Surrogate = Literal["reinforce", "clip", "cispo", "gmpo", "dppo", "sapo", "vespo"]
Divergence = Literal["binary_tv", "binary_kl"]
Level = Literal["token", "sequence", "sequence_sum"]
LossType = Literal["sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo"]
KlPlacement = Literal["reward", "loss"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_binary_kl"]
Truncated = Literal["keep", "mask", "penalize", "bootstrap"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Memory = Annotated[float, Ge(0), Lt(1)]
Discount = Annotated[float, Gt(0), Le(1)]
AboveOne = Annotated[float, Gt(1)]
GROUP_BASELINES = ("group_mean", "leave_one_out", "length_weighted")
GROUP_SCALES = ("group", "leave_one_out", "group_mean")
STEP_BASELINES = ("group_mean", "leave_one_out")  # those that can compare step with step


@dataclass(frozen=True)
class AlgorithmSpec:
    """An algorithm: how it differs from plain REINFORCE, whose expected update is ∇J and which the defaults are.

    The text of each field is beside it. All but `name`, `source`, `advantage` and `loss` are settings
    (`algorithm.baseline`), made from this table: see `llm_pg.config.algorithm`.

    Raises:
        ValueError: a word that is not known, with the nearest one that is, or a number outside its range.
    """

    name: Annotated[str, Doc("What the algorithm is called in configs.")]
    source: Annotated[str, Doc("Author, year and arXiv id.")]
    advantage: Annotated[
        Callable[[Any], Any] | None,
        Doc(
            "A function from `Rollouts` to advantages, (B,) or (B, T), in the place of returns and baseline; None = "
            "returns less baseline. See `llm_pg.algorithms.registry`."
        ),
    ] = None
    loss: Annotated[
        Callable[[Any, Any], Any] | None,
        Doc(
            "A function (logp_BT, batch) -> scalar in the place of surrogate and reduction: the sum over the rows that "
            "it is given, what `llm-pg prove --loss F` proves. Penalties, bonus and value loss are added to it."
        ),
    ] = None
    returns: Annotated[
        Returns, Doc("What a token is credited with: reward_to_go, the rewards from it on, or total, all of the row's.")
    ] = "reward_to_go"
    baseline: Annotated[
        Baseline,
        Doc(
            "What is subtracted: none, running_mean, batch_mean, group_mean, leave_one_out, length_weighted (the "
            "group's mean weighted by length, OPO), greedy (the reward of one greedy completion a prompt, ReMax), "
            "value (a critic and GAE)."
        ),
    ] = "none"
    baseline_per_step: Annotated[
        bool,
        Doc(
            "Compare the reward-to-go of step t with the group's rewards-to-go of step t, where steps have rewards of "
            "their own (baselines group_mean and leave_one_out); otherwise with the group's returns."
        ),
    ] = False
    scale_rewards: Annotated[
        ScaleRewards,
        Doc(
            "What to divide by: none, the deviation of each group's or of the batch's returns, leave_one_out (of the "
            "others of the group; 1 where they are equal), or group_mean (MaxRL: the objective is then the likelihood "
            "of success)."
        ),
    ] = "none"
    multi_objective_aggregation: Annotated[
        Aggregation,
        Doc(
            "With several reward functions: sum_then_normalize, the weighted sum is the reward; normalize_then_sum, "
            "each function's scores are first normalised in their group (GDPO), and baseline and scale are of that sum."
        ),
    ] = "sum_then_normalize"
    pass_k: Annotated[
        Count,
        Doc(
            "Objective: 0 = the mean reward, k = the best reward of k completions, with the group's others as the "
            "baseline (k < num_generations)."
        ),
    ] = 0
    normalize_advantages: Annotated[
        Normalize, Doc("Shift and scale advantages to mean 0, deviation 1 over rollouts or over steps; or none.")
    ] = "none"
    surrogate: Annotated[
        Surrogate,
        Doc(
            "reinforce (-advantage · logp, no reuse), clip (PPO), cispo, gmpo (geometric mean of clipped ratios), dppo "
            "(tokens past a divergence are dropped), sapo, vespo (soft gates, no clipping); in a "
            "config also file.py:function, a loss as `llm-pg prove --loss` takes it."
        ),
    ] = "clip"
    importance_sampling_level: Annotated[
        Level, Doc("Importance ratio of a token, of a sequence (geometric mean) or sequence_sum (product).")
    ] = "token"
    loss_type: Annotated[
        LossType,
        Doc(
            "Reduction. sequence_sum: tokens summed, completions averaged (exact). grpo: mean over each completion's "
            "tokens, then over completions. dapo, bnpo: mean over all tokens of the batch. dr_grpo: sum divided by "
            "completions × max_completion_length."
        ),
    ] = "sequence_sum"
    epsilon: Annotated[Positive, Doc("Clipping width below 1; of gmpo in log ratios, of dppo the divergence.")] = 0.2
    epsilon_high: Annotated[Positive | None, Doc("Clipping width above 1, likewise; None = epsilon.")] = None
    divergence_type: Annotated[
        Divergence,
        Doc(
            "Of dppo, between this token and any other: binary_tv, the change of its probability (0.2), or binary_kl, "
            "nats (0.05)."
        ),
    ] = "binary_tv"
    delta: Annotated[AboveOne | None, Doc("Upper bound of the ratio, if any (two-sided clipping).")] = None
    sapo_temperature_pos: Annotated[Positive, Doc("How fast SAPO's gate closes where the advantage is positive.")] = 1.0
    sapo_temperature_neg: Annotated[Positive, Doc("How fast it closes where the advantage is negative.")] = 1.05
    vespo_k_pos: Annotated[Positive, Doc("Exponent of VESPO's gate where the advantage is at least 0.")] = 2.0
    vespo_lambda_pos: Annotated[Positive, Doc("Decay of VESPO's gate where the advantage is at least 0.")] = 3.0
    vespo_k_neg: Annotated[Positive, Doc("Exponent of VESPO's gate where the advantage is negative.")] = 3.0
    vespo_lambda_neg: Annotated[Positive, Doc("Decay of VESPO's gate where the advantage is negative.")] = 2.0
    vllm_importance_sampling_correction: Annotated[
        bool,
        Doc(
            "Multiply the policy term by π_trainer/π_sampler of the same weights, where the two compute differently; "
            "for any sampler, not vLLM alone."
        ),
    ] = False
    vllm_importance_sampling_mode: Annotated[
        Correction,
        Doc(
            "Bound that ratio by token or sequence, and truncate or mask what is outside. sequence_binary_kl: tokens "
            "have their own ratios without a bound, and a completion whose mean divergence from the sampler (of this "
            "token against any other, nats) is above clip_max is masked (FlashREINFORCE)."
        ),
    ] = "sequence_mask"
    vllm_importance_sampling_clip_max: Annotated[Positive | None, Doc("Upper bound of that ratio, if any.")] = 3.0
    vllm_importance_sampling_clip_min: Annotated[Positive | None, Doc("Lower bound of that ratio, if any.")] = None
    off_policy_mask_threshold: Annotated[
        Positive | None,
        Doc(
            "Nats a token: completions of negative advantage that the policy has left by more are dropped from the "
            "policy term; None = none is."
        ),
    ] = None
    top_entropy_quantile: Annotated[
        Share,
        Doc(
            "Share of the batch's tokens, those of largest entropy, that the policy term and the entropy bonus keep; "
            "1 = all."
        ),
    ] = 1.0
    beta: Annotated[NotNegative, Doc("Weight of the KL to the frozen reference; 0 loads no reference.")] = 0.0
    kl_placement: Annotated[KlPlacement, Doc("Where the KL is: in the reward of each token, or in the loss.")] = (
        "reward"
    )
    kl_estimator: Annotated[KlEstimator, Doc("k1, k2 or k3: see `llm_pg.estimators.kl`.")] = "k1"
    use_bias_correction_kl: Annotated[
        bool, Doc("Multiply the KL in the loss by the importance ratio, as TRL 1.16 does by default.")
    ] = False
    reward_coef: Annotated[
        NotNegative,
        Doc(
            "Weight of the rewards; 0 = they are measured and not trained on, so that completions without a verdict "
            "are trained on too."
        ),
    ] = 1.0
    teacher_coef: Annotated[
        NotNegative,
        Doc(
            "Weight of KL(policy || teacher), which each sampled token is credited with as log π_teacher - log π; "
            "0 loads no teacher. See model.teacher_model_name_or_path."
        ),
    ] = 0.0
    teacher_discount: Annotated[
        Share,
        Doc(
            "How much of the teacher's verdict on the next token a token is credited with: 1 = of all that follow (the "
            "gradient of the KL of completions), 0 = its own alone (usual, biased, of less variance)."
        ),
    ] = 1.0
    kl_target: Annotated[
        NotNegative, Doc("KL(old || new), nats a token, that an adaptive penalty keeps updates to; 0 = no penalty.")
    ] = 0.0
    entropy_coef: Annotated[NotNegative, Doc("Weight of the mean token entropy.")] = 0.0
    entropy_coef_final: Annotated[
        NotNegative | None, Doc("Its value at the last step, reached linearly; None = the same.")
    ] = None
    use_adaptive_entropy: Annotated[
        bool,
        Doc(
            "Let entropy_coef follow the entropy: after each batch it rises by entropy_coef_delta where the entropy is "
            "at or under entropy_target, else falls, and it is applied at or under the target alone."
        ),
    ] = False
    entropy_target: Annotated[NotNegative, Doc("Of use_adaptive_entropy, nats a token.")] = 0.2
    entropy_coef_delta: Annotated[NotNegative, Doc("Of use_adaptive_entropy: the change of one batch.")] = 0.005
    entropy_coef_min: Annotated[NotNegative, Doc("Of use_adaptive_entropy: least weight.")] = 0.0
    entropy_coef_max: Annotated[NotNegative, Doc("Of use_adaptive_entropy: largest weight.")] = 1.0
    gamma: Annotated[Discount, Doc("Discount per token, in (0, 1].")] = 1.0
    lam: Annotated[Share, Doc("λ of GAE.")] = 1.0
    lam_value: Annotated[
        Share | None, Doc("λ of the critic's targets; None = lam. 1 learns the returns themselves (VAPO).")
    ] = None
    lam_length_alpha: Annotated[
        Positive | None,
        Doc(
            "λ of the advantages = 1 - 1/(this × length), as VAPO (0.05), and `lam` is for the targets alone; "
            "None = lam."
        ),
    ] = None
    vf_coef: Annotated[NotNegative, Doc("Weight of the value loss.")] = 0.5
    value_clip: Annotated[
        Positive | None,
        Doc(
            "Clipping width of the value; None = off, as it holds the critic back where targets move most, and hurt at "
            "every width in Andrychowicz et al. 2021 (arXiv 2006.05990)."
        ),
    ] = None
    truncated: Annotated[
        Truncated,
        Doc(
            "Completions cut by the length limit: keep; mask them out of the loss; penalize, truncation_penalty off "
            "their reward; bootstrap, the critic's value of the state they were cut in replaces their reward. The "
            "limit belongs to the task that is evaluated, so that keep is the true return."
        ),
    ] = "keep"
    truncation_penalty: Annotated[NotNegative, Doc("Taken off the reward of a truncated completion (penalize).")] = 0.0
    baseline_decay: Annotated[Memory, Doc("Memory of the running mean, in [0, 1).")] = 0.9
    baseline_column: Annotated[
        str | None,
        Doc(
            "Of running_mean: the column of the data (a game's role, a source of prompts) for each value of which "
            "there is a mean of its own (RAE); None = one mean of all."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self, f"Algorithm {self.name!r}")
        if self.baseline_per_step and self.baseline not in STEP_BASELINES:
            raise ValueError(
                f"Algorithm {self.name!r}: baseline_per_step compares the steps of a group, and the baseline is "
                f"{self.baseline}. Use baseline leave_one_out or group_mean, or leave baseline_per_step out."
            )

        if self.baseline_column is not None and self.baseline != "running_mean":
            raise ValueError(
                f"Algorithm {self.name!r}: baseline_column {self.baseline_column!r} names what has a running mean of "
                f"its own, and the baseline is {self.baseline}. Use algorithm=rae or baseline=running_mean, or leave "
                "baseline_column out."
            )
        if self.vllm_importance_sampling_mode == "sequence_binary_kl" and self.vllm_importance_sampling_clip_min:
            raise ValueError(
                f"Algorithm {self.name!r}: vllm_importance_sampling_clip_min is "
                f"{self.vllm_importance_sampling_clip_min:g}, and sequence_binary_kl bounds a divergence, which has no "
                "lower bound. Leave it out."
            )
        other = self.needs_critic or self.loss is not None or self.advantage is not None
        if self.teacher_coef and (other or self.pass_k or self.scale_rewards == "group_mean"):
            raise ValueError(
                f"Algorithm {self.name!r}: teacher_coef is {self.teacher_coef:g}, and the teacher's verdicts are added "
                "to the advantages that rewards and baseline make: not to those of a critic, of a function of yours, "
                "of pass_k or of the likelihood of success. Use algorithm=opd, rloo or grpo, or teacher_coef=0."
            )
        if not self.reward_coef and not self.teacher_coef:
            raise ValueError(
                f"Algorithm {self.name!r}: reward_coef is 0 and teacher_coef too, so nothing would be learned. Set one "
                "of them."
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            self._check_aggregation()
        if self.loss is not None and (self.vllm_importance_sampling_correction or self.off_policy_mask_threshold):
            raise ValueError(
                f"Algorithm {self.name!r} has a loss of its own, whose tokens cannot be corrected for the sampler one "
                "by one. Set vllm_importance_sampling_correction=false and off_policy_mask_threshold=null (with "
                "max_staleness the loss must correct by itself: batch.rollouts.logp_BT holds the log-probabilities of "
                "the sampler)."
            )

    def _check_aggregation(self) -> None:
        given = {
            f"returns {self.returns} (total)": self.returns != "total",
            f"beta {self.beta:g} in the reward (kl_placement=loss)": bool(self.beta) and self.kl_placement == "reward",
            "truncated penalize (mask or keep)": self.truncated == "penalize",
            f"pass_k {self.pass_k}": self.pass_k > 0,
            f"baseline {self.baseline} (batch_mean)": self.baseline in ("value", "greedy", "running_mean"),
            f"scale_rewards {self.scale_rewards} (batch)": self.scale_rewards == "group_mean",
        }
        odd = [text for text, holds in given.items() if holds]
        if odd:
            raise ValueError(
                f"Algorithm {self.name!r}: multi_objective_aggregation normalize_then_sum makes the return of a "
                f"completion from its functions' normalised scores, which does not go with {' and '.join(odd)}. Use "
                "algorithm=gdpo as it is."
            )

    @property
    def needs_group(self) -> bool:
        return (
            self.baseline in GROUP_BASELINES
            or self.scale_rewards in GROUP_SCALES
            or self.multi_objective_aggregation == "normalize_then_sum"
            or self.pass_k > 0
        )

    @property
    def needs_critic(self) -> bool:
        return self.baseline == "value"


WORDS: dict[str, tuple[str, ...]] = {
    name: known for name, annotation in annotations_of(AlgorithmSpec).items() if (known := words_of(annotation))
}
