"""The arguments that TRL's GRPOConfig and RLOOConfig add to transformers' TrainingArguments."""

from __future__ import annotations

from .words import Word, idle, mapped, refused, same

_BATCHING = "rollout.engine=native keeps no finished row in its batch; rollout.engine=vllm batches continuously"

MODEL: dict[str, Word] = {
    "model_init_kwargs": mapped(
        None,
        "`dtype` (or `torch_dtype`), `attn_implementation` and `revision`; other keys are refused: load the model "
        "yourself and give the object as `model`",
    ),
    "trust_remote_code": refused(
        False, "code of a hub repository is never run; load such a model yourself and give the object as `model`"
    ),
    "router_aux_loss_coef": same(
        None, "over all tokens of an optimiser step, where TRL takes each micro-batch by itself"
    ),
    "disable_dropout": same(False, "dropout makes the ratio of an on-policy step differ from 1, so it is off here"),
    "cast_lm_head_to_fp32": idle(
        False, "logits are float32 in any case: the output layer's product keeps its float32 result"
    ),
    "ds3_gather_for_generation": idle(True, "ZeRO-3 is not used here"),
}
SAMPLING: dict[str, Word] = {
    "num_generations": same(8, rloo=2),
    "num_generations_eval": mapped(None, "`eval_num_samples`, sampled answers a held-out prompt"),
    "max_completion_length": same(512),
    "shuffle_dataset": same(True),
    "pad_to_multiple_of": idle("auto", "passes are packed without padding where the model allows it"),
    "generation_batch_size": mapped(None, "completions of a batch of rollouts on all ranks; see the arithmetic above"),
    "steps_per_generation": mapped(
        None,
        "counted in passes of `per_device_train_batch_size`, as in TRL, unless "
        "`prompts_per_step` is given; see the arithmetic above",
    ),
    "temperature": same(1.0),
    "top_p": same(1.0, "enters the trained log-probability too"),
    "top_k": same(0, "enters the trained log-probability too"),
    "min_p": same(None, "enters the trained log-probability too; None = 0"),
    "generation_kwargs": mapped(
        None,
        "`temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `stop_strings` (`stop`) and `max_new_tokens` "
        "become settings; others are refused, because what is sampled must be what is trained",
    ),
    "chat_template_kwargs": same(None, "an argument that the chat template never reads is refused"),
    "repetition_penalty": same(1.0, "enters the trained log-probability too"),
    "cache_implementation": refused(None, "each engine has its own cache; choose one with `engine`"),
    "use_transformers_continuous_batching": refused(False, _BATCHING),
    "transformers_continuous_batching_config": refused(None, _BATCHING),
    "use_transformers_paged": refused(False, _BATCHING),
    "max_tool_calling_iterations": same(None, "None = `max_turns` - 1, 7 by default; TRL has no limit then"),
}
VLLM: dict[str, Word] = {
    "use_vllm": mapped(False, "`engine='vllm'`, vLLM's own server or class (`trl vllm-serve` is not needed)"),
    "vllm_mode": mapped(
        "colocate",
        "`colocate`: the same, vLLM in the trainer's process; with `vllm_python`, of an environment that has vLLM, a "
        "server is started beside the run instead; `server`: the server of the next lines",
    ),
    "vllm_model_impl": mapped("vllm", "`vllm_options={'model-impl': ...}` of the vLLM that is started"),
    "vllm_enable_sleep_mode": same(False, "with `vllm_mode='colocate'`; level 2, as in TRL"),
    "vllm_structured_outputs_regex": refused(
        None, "the constrained distribution would be sampled and the free one trained; reward the format instead"
    ),
    "vllm_server_base_url": mapped(
        None,
        "`vllm_urls`; the server is vLLM's own (`python -m "
        "vllm.entrypoints.openai.api_server` with VLLM_SERVER_DEV_MODE=1)",
    ),
    "vllm_server_host": mapped("0.0.0.0", "`vllm_urls`, where `vllm_mode='server'`"),
    "vllm_server_port": mapped(8000, "`vllm_urls`, where `vllm_mode='server'`"),
    "vllm_server_timeout": same(240.0),
    "vllm_group_port": idle(51216, "a free port of the trainer's machine is taken"),
    "vllm_gpu_memory_utilization": same(0.3),
    "vllm_max_model_length": same(None),
    "vllm_tensor_parallel_size": same(1, "of a server; a colocated vLLM has its rank's device alone"),
    "vllm_importance_sampling_correction": same(
        True,
        "off unless given: the ratio is 1 up to rounding where sampler and trainer agree; any sampler is corrected",
    ),
    "vllm_importance_sampling_mode": same("sequence_mask"),
    "vllm_importance_sampling_clip_max": same(3.0, "None (no bound) is refused: give a large number"),
    "vllm_importance_sampling_clip_min": same(None),
    "vllm_importance_sampling_cap": mapped(None, "`vllm_importance_sampling_clip_max`"),
}
OBJECTIVE: dict[str, Word] = {
    "beta": same(0.0, "KL in the loss (k3) for GRPO, in the reward (k1) for RLOO, as in TRL", rloo=0.05),
    "num_iterations": same(1),
    "epsilon": same(0.2),
    "delta": same(None),
    "epsilon_high": same(None),
    "sapo_temperature_neg": same(1.05),
    "sapo_temperature_pos": same(1.0),
    "vespo_k_pos": same(2.0),
    "vespo_lambda_pos": same(3.0),
    "vespo_k_neg": same(3.0),
    "vespo_lambda_neg": same(2.0),
    "importance_sampling_level": same("token"),
    "reward_weights": same(None),
    "normalize_advantages": mapped(False, "True: `rollouts`; False: `none`"),
    "reward_clip_range": same(None, "of the weighted sum, which is then the logged reward too"),
    "multi_objective_aggregation": same("sum_then_normalize", "`normalize_then_sum`: the row `gdpo`"),
    "scale_rewards": mapped("group", "True: `group`; False: `none`; `group`, `batch`, `none` as they are"),
    "loss_type": mapped(
        "dapo",
        "`grpo`, `dapo`, `dr_grpo`, `bnpo` as they are; `cispo` and `sapo`: `surrogate` of that "
        "name with TRL's reduction (and of `cispo` TRL's bound: without `epsilon_high` it is `epsilon`); `luspo`: "
        "`sequence_sum`, with `importance_sampling_level='sequence'`; `vespo`: the `surrogate` of that name "
        "at the level `sequence_sum`",
    ),
    "mask_truncated_completions": same(False),
    "sync_ref_model": same(False),
    "ref_model_mixup_alpha": same(0.6),
    "ref_model_sync_steps": same(512),
    "top_entropy_quantile": same(1.0),
    "entropy_coef": same(0.0),
    "use_adaptive_entropy": same(False, "once a batch, where TRL moves it once an optimiser step"),
    "entropy_coef_min": same(0.0),
    "entropy_coef_max": same(1.0),
    "entropy_coef_delta": same(0.005),
    "entropy_target": same(0.2),
    "off_policy_mask_threshold": same(None),
    "use_bias_correction_kl": same(True),
}
LOGGING: dict[str, Word] = {
    "log_completions": mapped(
        False,
        "True: 8 groups a step in `completions/` and the trackers' tables; False: none; a number: that many groups",
    ),
    "log_multimodal": idle(True, "there are no images here"),
    "num_completions_to_print": same(None, "None = 1"),
    "log_unique_prompts": refused(False, "a step has each prompt once, and `completions/` holds its whole group"),
    "log_completions_hub_repo": refused(None, "upload the run's folder `completions/` with huggingface_hub"),
}
POLICY: dict[str, Word] = {**MODEL, **SAMPLING, **VLLM, **OBJECTIVE, **LOGGING}
