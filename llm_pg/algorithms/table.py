"""The table of algorithms: each is a row of differences from plain REINFORCE. Imports no torch.

`llm-pg prove` says of every row whether its expected update is the gradient.
"""

from __future__ import annotations

import dataclasses

from .spec import AlgorithmSpec

_GRPO = AlgorithmSpec(
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

_OPD = AlgorithmSpec(
    "opd",
    "Gu et al. 2023, arXiv 2306.08543: policy gradient of the reverse KL",
    baseline="leave_one_out",
    reward_coef=0.0,
    teacher_coef=1.0,
)

_SPECS = (
    AlgorithmSpec("reinforce", "Williams 1992; reward-to-go: Sutton et al. 2000", surrogate="reinforce"),
    AlgorithmSpec(
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
    dataclasses.replace(
        _GRPO,
        name="luspo",
        source="Length-Unbiased Sequence Policy Optimization 2026, arXiv 2602.05261",
        importance_sampling_level="sequence",
        loss_type="sequence_sum",
    ),
    dataclasses.replace(
        _GRPO,
        name="vespo",
        source="Variational Sequence-Level Soft Policy Optimization 2026, arXiv 2602.10693",
        surrogate="vespo",
        importance_sampling_level="sequence_sum",
    ),
    dataclasses.replace(
        _GRPO,
        name="gdpo",
        source="GDPO 2026, arXiv 2601.05242",
        multi_objective_aggregation="normalize_then_sum",
        baseline="batch_mean",
        scale_rewards="batch",
    ),
    dataclasses.replace(
        _GRPO,
        name="gmpo",
        source="Zhao et al. 2025, arXiv 2507.20673",
        surrogate="gmpo",
        loss_type="grpo",
        epsilon=0.4,
        epsilon_high=0.4,
        use_bias_correction_kl=False,
    ),
    dataclasses.replace(_GRPO, name="dppo", source="Qi et al. 2026, arXiv 2602.04879", surrogate="dppo"),
    AlgorithmSpec(
        "reinforce_plus_plus",
        "Hu et al. 2025, arXiv 2501.03262",
        normalize_advantages="steps",
        loss_type="dapo",
    ),
    AlgorithmSpec(
        "reinforce_plus_plus_baseline",
        "Hu et al. 2025, arXiv 2501.03262, with baseline",
        returns="total",
        baseline="group_mean",
        normalize_advantages="steps",
        loss_type="dapo",
        kl_placement="loss",
        kl_estimator="k2",
    ),
    AlgorithmSpec("remax", "Li et al. 2023, arXiv 2310.10505", baseline="greedy", surrogate="reinforce"),
    AlgorithmSpec(
        "opo",
        "Hao et al. 2025, arXiv 2505.23585",
        returns="total",
        baseline="length_weighted",
        surrogate="reinforce",
    ),
    AlgorithmSpec(
        "maxrl",
        "Maximum Likelihood Reinforcement Learning 2026, arXiv 2602.02710",
        returns="total",
        baseline="group_mean",
        scale_rewards="group_mean",
        kl_placement="loss",
        kl_estimator="k2",
    ),
    AlgorithmSpec(
        "pass_at_k",
        "Walder and Karkhanis 2025, arXiv 2505.15201; baseline: k others",
        returns="total",
        baseline="leave_one_out",
        pass_k=2,
        kl_placement="loss",
        kl_estimator="k2",
    ),
    AlgorithmSpec(
        "rae",
        "Liu et al. 2025 (SPIRAL), arXiv 2506.24119",
        returns="total",
        baseline="running_mean",
        baseline_decay=0.95,
        surrogate="reinforce",
        kl_placement="loss",
        kl_estimator="k2",
    ),
    AlgorithmSpec(
        "flash_reinforce",
        "FlashREINFORCE 2026, as in NVIDIA-NeMo/labs-molt and OpenRLHF",
        returns="total",
        baseline="batch_mean",
        surrogate="reinforce",
        loss_type="grpo",
        kl_placement="loss",
        kl_estimator="k2",
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="sequence_binary_kl",
        vllm_importance_sampling_clip_max=3e-3,
    ),
    _OPD,
    dataclasses.replace(
        _OPD,
        name="opd_token",
        source="Lu and Thinking Machines Lab 2025, On-Policy Distillation; Agarwal et al. 2023, arXiv 2306.13649",
        teacher_discount=0.0,
    ),
    AlgorithmSpec(
        "a2c",
        "Mnih et al. 2016, arXiv 1602.01783",
        baseline="value",
        surrogate="reinforce",
        loss_type="dapo",
        gamma=1.0,
    ),
    AlgorithmSpec(
        "ppo",
        "Schulman et al. 2017, arXiv 1707.06347; GAE: arXiv 1506.02438",
        baseline="value",
        normalize_advantages="steps",
        loss_type="dapo",
        lam=0.95,
    ),
)

ALGORITHMS: dict[str, AlgorithmSpec] = {spec.name: spec for spec in _SPECS}
