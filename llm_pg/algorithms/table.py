"""The table of algorithms: each is a row of differences from plain REINFORCE. Imports no torch.

`llm-pg prove` says of every row whether its expected update is the gradient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

RETURNS = ("reward_to_go", "total")
BASELINES = ("none", "running_mean", "batch_mean", "group_mean", "leave_one_out", "value")
SCALE_REWARDS = ("none", "group", "batch")
NORMALIZE = ("none", "rollouts", "steps")
SURROGATES = ("reinforce", "clip", "cispo")
LEVELS = ("token", "sequence", "sequence_sum")
LOSS_TYPES = ("sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo")
KL_PLACEMENTS = ("reward", "loss")
KL_NAMES = ("k1", "k2", "k3")
TRUNCATED = ("keep", "mask", "penalise")
GROUP_BASELINES = ("group_mean", "leave_one_out")


@dataclass(frozen=True)
class Row:
    """How an algorithm weighs what was sampled. The defaults are plain REINFORCE, whose expected update is ∇J.

    Attributes:
        returns: what a token is credited with: the rewards from it on, or all of the row's.
        baseline: what is subtracted; `value` needs a critic and uses GAE(gamma, lam).
        baseline_per_step: compare the reward-to-go of step t with the group's rewards-to-go of step t, where steps
            have rewards of their own (group baselines only); otherwise with the group's returns.
        scale_rewards: deviation of the returns to divide by: none, each group's, the batch's.
        normalize_advantages: weights shifted and scaled to mean 0, deviation 1 over rollouts or over steps.
        surrogate: reinforce (-w log π, no reuse), clip (PPO), cispo.
        importance_sampling_level: token, sequence (geometric mean), sequence_sum (product).
        loss_type: the reduction. sequence_sum: tokens summed, completions averaged (exact). grpo: mean over each
            completion's tokens, then over completions. dapo, bnpo: mean over all tokens of the batch. dr_grpo: sum
            divided by completions × max_completion_length.
        epsilon, epsilon_high, delta: clipping, see `estimators.losses.clipped`.
        beta: weight of the KL penalty; 0 loads no reference. kl_placement, kl_estimator: see `estimators.kl`.
        use_bias_correction_kl: KL in the loss times the importance ratio, as TRL 1.16 does by default.
        kl_target: KL(old || new) of an update, nats a step, that an adaptive penalty keeps to; 0 = no penalty.
        entropy_coef: weight of the mean token entropy, moving linearly to `entropy_coef_final` by the end.
        gamma: discount in (0, 1]. lam: λ of GAE. vf_coef: weight of the value loss. value_clip: its clipping width.
        truncated: completions that hit the length limit are kept, masked out of the loss, or `truncation_penalty`
            is taken off their reward.
        baseline_decay: memory of the running mean.
    """

    name: str
    source: str
    returns: str = "reward_to_go"
    baseline: str = "none"
    baseline_per_step: bool = False
    scale_rewards: str = "none"
    normalize_advantages: str = "none"
    surrogate: str = "clip"
    importance_sampling_level: str = "token"
    loss_type: str = "sequence_sum"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_placement: str = "reward"
    kl_estimator: str = "k1"
    use_bias_correction_kl: bool = False
    kl_target: float = 0.0
    entropy_coef: float = 0.0
    entropy_coef_final: float | None = None
    gamma: float = 1.0
    lam: float = 1.0
    vf_coef: float = 0.5
    value_clip: float | None = None
    truncated: str = "keep"
    truncation_penalty: float = 0.0
    baseline_decay: float = 0.9

    @property
    def needs_group(self) -> bool:
        return self.baseline in GROUP_BASELINES or self.scale_rewards == "group"

    @property
    def needs_critic(self) -> bool:
        return self.baseline == "value"


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
