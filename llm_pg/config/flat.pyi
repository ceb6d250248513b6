# Made by docs/generators/flat_stub.py from the tables of settings; do not edit.
from typing import Any, ClassVar, Literal, TypedDict, Union

from typing_extensions import Unpack

from pydantic.fields import FieldInfo

from .schema import Config


class Settings(TypedDict, total=False):
    model_name_or_path: str | None
    model_revision: str | None
    make: dict[str, Any] | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: str | None
    disable_dropout: bool
    use_peft: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: list[str] | str | None
    use_dora: bool
    use_rslora: bool
    load_in_4bit: bool
    teacher_model_name_or_path: str | None
    teacher_model_server_url: str | None
    teacher_model_revision: str | None
    teacher_model_init_kwargs: dict[str, Any]
    task: str | None
    task_options: dict[str, Any]
    num_train_prompts: int
    dataset_name: str | None
    dataset_config: str | None
    dataset_split: str
    dataset_eval_split: str | None
    dataset_streaming: bool
    data_files: str | list[str] | None
    eval_data_files: str | list[str] | None
    prompt_column: str
    prompt_template: str | None
    system_prompt: str | None
    chat: bool | None
    chat_template_kwargs: dict[str, Any]
    columns: dict[str, str]
    extract: dict[str, str]
    num_eval_prompts: int
    max_prompt_length: int | None
    long_prompts: Literal["error", "drop"]
    shuffle_dataset: bool
    curriculum: Literal["none", "pass_rate"]
    curriculum_floor: float
    curriculum_memory: float
    engine: Literal["native", "transformers", "vllm"]
    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: list[str]
    rollout_batch_size: int | None
    max_staleness: int
    environment: str | None
    environment_options: dict[str, Any]
    tools: list[str]
    environment_factory: str | dict[str, str] | None
    mcp_servers: dict[str, Any]
    max_tool_calling_iterations: int | None
    tool_timeout: float
    max_turns: int
    max_turn_length: int | None
    vllm_mode: Literal["server", "colocate"]
    vllm_enable_sleep_mode: bool
    vllm_enable_lora: bool
    vllm_urls: list[str]
    vllm_python: str | None
    vllm_gpu_memory_utilization: float
    vllm_tensor_parallel_size: int
    vllm_max_model_length: int | None
    vllm_options: dict[str, Any]
    vllm_server_timeout: float
    vllm_request_timeout: float
    vllm_max_logp_gap: float | None
    reward_funcs: list[Any]
    reward_weights: list[float] | None
    reward_clip_range: list[float] | None
    reward_timeout: float
    reward_workers: int
    reward_in_process: bool
    max_unscorable: float
    strict: bool
    audit_rewards: Literal["warn", "stop", "none"]
    skip_special_tokens: bool | None
    name: str
    returns: Literal["reward_to_go", "total"] | None
    baseline: Literal["none", "running_mean", "batch_mean", "group_mean", "leave_one_out", "length_weighted", "greedy", "value"] | None
    scale_rewards: Literal["none", "group", "batch", "leave_one_out", "group_mean"] | None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None
    pass_k: int | None
    normalize_advantages: Literal["none", "rollouts", "steps"] | None
    surrogate: Union[Literal["reinforce", "clip", "cispo", "gmpo", "dppo", "sapo", "vespo"], str, None]
    importance_sampling_level: Literal["token", "sequence", "sequence_sum"] | None
    loss_type: Literal["sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo"] | None
    epsilon: float | None
    epsilon_high: float | None
    divergence_type: Literal["binary_tv", "binary_kl"] | None
    delta: float | None
    sapo_temperature_pos: float | None
    sapo_temperature_neg: float | None
    vespo_k_pos: float | None
    vespo_lambda_pos: float | None
    vespo_k_neg: float | None
    vespo_lambda_neg: float | None
    vllm_importance_sampling_correction: bool | None
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_binary_kl"] | None
    vllm_importance_sampling_clip_max: float | None
    vllm_importance_sampling_clip_min: float | None
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float | None
    beta: float | None
    kl_placement: Literal["reward", "loss"] | None
    kl_estimator: Literal["k1", "k2", "k3"] | None
    use_bias_correction_kl: bool | None
    reward_coef: float | None
    teacher_coef: float | None
    teacher_discount: float | None
    kl_target: float | None
    entropy_coef: float | None
    entropy_coef_final: float | None
    use_adaptive_entropy: bool | None
    entropy_target: float | None
    entropy_coef_delta: float | None
    entropy_coef_min: float | None
    entropy_coef_max: float | None
    gamma: float | None
    lam: float | None
    lam_value: float | None
    lam_length_alpha: float | None
    vf_coef: float | None
    value_clip: float | None
    truncated: Literal["keep", "mask", "penalize", "bootstrap"] | None
    truncation_penalty: float | None
    baseline_decay: float | None
    baseline_column: str | None
    mask_truncated_completions: bool | None
    sync_ref_model: bool
    ref_model_mixup_alpha: float
    ref_model_sync_steps: int
    dynamic_sampling_max_rounds: int
    num_iterations: int
    steps_per_generation: int
    critic_kind: Literal["head", "model"]
    critic_trunk_gradient: bool
    critic_path: str | None
    critic_learning_rate: float | None
    critic_warmup_steps: int
    max_steps: int
    prompts_per_step: int | None
    per_device_train_batch_size: int | None
    gradient_accumulation_steps: int | None
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_anyprecision", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "stable_adamw", "grokadamw", "adafactor", "adagrad", "rmsprop", "sgd"]
    optim_args: str | None
    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    bf16: bool
    fp16: bool
    exact_on_policy: bool
    gradient_checkpointing: bool
    packing: Literal["auto", "padded", "shared_prefix"]
    router_aux_loss_coef: float | None
    use_cpu: bool
    warm_start_steps: int
    warm_start_learning_rate: float
    warm_start_batch_size: int
    warm_start_options: dict[str, Any]
    warm_start_data_files: str | list[str] | None
    eval_steps: int
    eval_on_start: bool
    eval_num_samples: int
    eval_batch_size: int
    pass_reward: str | None
    strict_reward: str | None
    lenient_reward: str | None
    pass_threshold: float
    run_name: str | None
    seed: int
    report_to: list[Literal["none", "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]]
    project: str
    tracker_group: str | None
    tracker_tags: list[str]
    logging_steps: int
    log_completions: int
    profile_steps: int
    noise_steps: int
    num_completions_to_print: int
    report_seconds: float
    try_longest_batch: bool | None
    save_steps: int
    save_at_end: bool
    merge_adapter: bool
    save_total_limit: int | None
    metric_for_best_model: str | None
    greater_is_better: bool
    load_best_model_at_end: bool
    overwrite: bool
    algorithm: str
    num_train_epochs: Any
    average_tokens_across_devices: Any
    auto_find_batch_size: Any
    optim_target_modules: Any
    label_smoothing_factor: Any
    neftune_noise_alpha: Any
    bf16_full_eval: Any
    fp16_full_eval: Any
    tf32: Any
    activation_checkpointing: Any
    activation_checkpointing_kwargs: Any
    gradient_checkpointing_kwargs: Any
    torch_compile: Any
    torch_compile_backend: Any
    torch_compile_mode: Any
    use_liger_kernel: Any
    liger_kernel_config: Any
    use_cache: Any
    torch_empty_cache_steps: Any
    logging_strategy: Any
    logging_first_step: Any
    log_on_each_node: Any
    logging_nan_inf_filter: Any
    include_num_input_tokens_seen: Any
    log_level: Any
    log_level_replica: Any
    disable_tqdm: Any
    trackio_space_id: Any
    trackio_bucket_id: Any
    trackio_static_space_id: Any
    debug: Any
    skip_memory_metrics: Any
    eval_strategy: Any
    eval_delay: Any
    per_device_eval_batch_size: Any
    prediction_loss_only: Any
    eval_do_concat_batches: Any
    eval_use_gather_object: Any
    eval_accumulation_steps: Any
    include_for_metrics: Any
    batch_eval_metrics: Any
    save_only_model: Any
    save_strategy: Any
    save_on_each_node: Any
    enable_jit_checkpoint: Any
    push_to_hub: Any
    hub_model_id: Any
    hub_token: Any
    hub_private_repo: Any
    hub_revision: Any
    hub_strategy: Any
    hub_always_push: Any
    ignore_data_skip: Any
    restore_callback_states_from_checkpoint: Any
    resume_from_checkpoint: Any
    full_determinism: Any
    data_seed: Any
    accelerator_config: Any
    parallelism_config: Any
    fsdp: Any
    fsdp_config: Any
    deepspeed: Any
    ddp_find_unused_parameters: Any
    ddp_bucket_cap_mb: Any
    ddp_broadcast_buffers: Any
    ddp_static_graph: Any
    ddp_backend: Any
    ddp_timeout: Any
    dataloader_drop_last: Any
    dataloader_num_workers: Any
    dataloader_pin_memory: Any
    dataloader_persistent_workers: Any
    dataloader_prefetch_factor: Any
    dataloader_multiprocessing_context: Any
    dataloader_in_order: Any
    remove_unused_columns: Any
    label_names: Any
    train_sampling_strategy: Any
    length_column_name: Any
    do_train: Any
    do_eval: Any
    do_predict: Any
    local_rank: Any
    model_init_kwargs: Any
    trust_remote_code: Any
    cast_lm_head_to_fp32: Any
    ds3_gather_for_generation: Any
    num_generations_eval: Any
    pad_to_multiple_of: Any
    generation_batch_size: Any
    generation_kwargs: Any
    cache_implementation: Any
    use_transformers_continuous_batching: Any
    transformers_continuous_batching_config: Any
    use_transformers_paged: Any
    use_vllm: Any
    vllm_model_impl: Any
    vllm_structured_outputs_regex: Any
    vllm_server_base_url: Any
    vllm_server_host: Any
    vllm_server_port: Any
    vllm_group_port: Any
    vllm_importance_sampling_cap: Any
    log_multimodal: Any
    log_unique_prompts: Any
    log_completions_hub_repo: Any

class Attributes:
    model_name_or_path: str | None
    model_revision: str | None
    make: dict[str, Any] | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: str | None
    disable_dropout: bool
    use_peft: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: list[str] | str | None
    use_dora: bool
    use_rslora: bool
    load_in_4bit: bool
    teacher_model_name_or_path: str | None
    teacher_model_server_url: str | None
    teacher_model_revision: str | None
    teacher_model_init_kwargs: dict[str, Any]
    task: str | None
    task_options: dict[str, Any]
    num_train_prompts: int
    dataset_name: str | None
    dataset_config: str | None
    dataset_split: str
    dataset_eval_split: str | None
    dataset_streaming: bool
    data_files: str | list[str] | None
    eval_data_files: str | list[str] | None
    prompt_column: str
    prompt_template: str | None
    system_prompt: str | None
    chat: bool | None
    chat_template_kwargs: dict[str, Any]
    columns: dict[str, str]
    extract: dict[str, str]
    num_eval_prompts: int
    max_prompt_length: int | None
    long_prompts: Literal["error", "drop"]
    shuffle_dataset: bool
    curriculum: Literal["none", "pass_rate"]
    curriculum_floor: float
    curriculum_memory: float
    engine: Literal["native", "transformers", "vllm"]
    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: list[str]
    rollout_batch_size: int | None
    max_staleness: int
    environment: str | None
    environment_options: dict[str, Any]
    tools: list[str]
    environment_factory: str | dict[str, str] | None
    mcp_servers: dict[str, Any]
    max_tool_calling_iterations: int | None
    tool_timeout: float
    max_turns: int
    max_turn_length: int | None
    vllm_mode: Literal["server", "colocate"]
    vllm_enable_sleep_mode: bool
    vllm_enable_lora: bool
    vllm_urls: list[str]
    vllm_python: str | None
    vllm_gpu_memory_utilization: float
    vllm_tensor_parallel_size: int
    vllm_max_model_length: int | None
    vllm_options: dict[str, Any]
    vllm_server_timeout: float
    vllm_request_timeout: float
    vllm_max_logp_gap: float | None
    reward_funcs: list[Any]
    reward_weights: list[float] | None
    reward_clip_range: list[float] | None
    reward_timeout: float
    reward_workers: int
    reward_in_process: bool
    max_unscorable: float
    strict: bool
    audit_rewards: Literal["warn", "stop", "none"]
    skip_special_tokens: bool | None
    name: str
    returns: Literal["reward_to_go", "total"] | None
    baseline: Literal["none", "running_mean", "batch_mean", "group_mean", "leave_one_out", "length_weighted", "greedy", "value"] | None
    scale_rewards: Literal["none", "group", "batch", "leave_one_out", "group_mean"] | None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None
    pass_k: int | None
    normalize_advantages: Literal["none", "rollouts", "steps"] | None
    surrogate: Union[Literal["reinforce", "clip", "cispo", "gmpo", "dppo", "sapo", "vespo"], str, None]
    importance_sampling_level: Literal["token", "sequence", "sequence_sum"] | None
    loss_type: Literal["sequence_sum", "grpo", "dapo", "bnpo", "dr_grpo"] | None
    epsilon: float | None
    epsilon_high: float | None
    divergence_type: Literal["binary_tv", "binary_kl"] | None
    delta: float | None
    sapo_temperature_pos: float | None
    sapo_temperature_neg: float | None
    vespo_k_pos: float | None
    vespo_lambda_pos: float | None
    vespo_k_neg: float | None
    vespo_lambda_neg: float | None
    vllm_importance_sampling_correction: bool | None
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_binary_kl"] | None
    vllm_importance_sampling_clip_max: float | None
    vllm_importance_sampling_clip_min: float | None
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float | None
    beta: float | None
    kl_placement: Literal["reward", "loss"] | None
    kl_estimator: Literal["k1", "k2", "k3"] | None
    use_bias_correction_kl: bool | None
    reward_coef: float | None
    teacher_coef: float | None
    teacher_discount: float | None
    kl_target: float | None
    entropy_coef: float | None
    entropy_coef_final: float | None
    use_adaptive_entropy: bool | None
    entropy_target: float | None
    entropy_coef_delta: float | None
    entropy_coef_min: float | None
    entropy_coef_max: float | None
    gamma: float | None
    lam: float | None
    lam_value: float | None
    lam_length_alpha: float | None
    vf_coef: float | None
    value_clip: float | None
    truncated: Literal["keep", "mask", "penalize", "bootstrap"] | None
    truncation_penalty: float | None
    baseline_decay: float | None
    baseline_column: str | None
    mask_truncated_completions: bool | None
    sync_ref_model: bool
    ref_model_mixup_alpha: float
    ref_model_sync_steps: int
    dynamic_sampling_max_rounds: int
    num_iterations: int
    steps_per_generation: int
    critic_kind: Literal["head", "model"]
    critic_trunk_gradient: bool
    critic_path: str | None
    critic_learning_rate: float | None
    critic_warmup_steps: int
    max_steps: int
    prompts_per_step: int | None
    per_device_train_batch_size: int | None
    gradient_accumulation_steps: int | None
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_anyprecision", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "stable_adamw", "grokadamw", "adafactor", "adagrad", "rmsprop", "sgd"]
    optim_args: str | None
    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    bf16: bool
    fp16: bool
    exact_on_policy: bool
    gradient_checkpointing: bool
    packing: Literal["auto", "padded", "shared_prefix"]
    router_aux_loss_coef: float | None
    use_cpu: bool
    warm_start_steps: int
    warm_start_learning_rate: float
    warm_start_batch_size: int
    warm_start_options: dict[str, Any]
    warm_start_data_files: str | list[str] | None
    eval_steps: int
    eval_on_start: bool
    eval_num_samples: int
    eval_batch_size: int
    pass_reward: str | None
    strict_reward: str | None
    lenient_reward: str | None
    pass_threshold: float
    run_name: str | None
    seed: int
    report_to: list[Literal["none", "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]]
    project: str
    tracker_group: str | None
    tracker_tags: list[str]
    logging_steps: int
    log_completions: int
    profile_steps: int
    noise_steps: int
    num_completions_to_print: int
    report_seconds: float
    try_longest_batch: bool | None
    save_steps: int
    save_at_end: bool
    merge_adapter: bool
    save_total_limit: int | None
    metric_for_best_model: str | None
    greater_is_better: bool
    load_best_model_at_end: bool
    overwrite: bool
    num_train_epochs: Any
    average_tokens_across_devices: Any
    auto_find_batch_size: Any
    optim_target_modules: Any
    label_smoothing_factor: Any
    neftune_noise_alpha: Any
    bf16_full_eval: Any
    fp16_full_eval: Any
    tf32: Any
    activation_checkpointing: Any
    activation_checkpointing_kwargs: Any
    gradient_checkpointing_kwargs: Any
    torch_compile: Any
    torch_compile_backend: Any
    torch_compile_mode: Any
    use_liger_kernel: Any
    liger_kernel_config: Any
    use_cache: Any
    torch_empty_cache_steps: Any
    logging_strategy: Any
    logging_first_step: Any
    log_on_each_node: Any
    logging_nan_inf_filter: Any
    include_num_input_tokens_seen: Any
    log_level: Any
    log_level_replica: Any
    disable_tqdm: Any
    trackio_space_id: Any
    trackio_bucket_id: Any
    trackio_static_space_id: Any
    debug: Any
    skip_memory_metrics: Any
    eval_strategy: Any
    eval_delay: Any
    per_device_eval_batch_size: Any
    prediction_loss_only: Any
    eval_do_concat_batches: Any
    eval_use_gather_object: Any
    eval_accumulation_steps: Any
    include_for_metrics: Any
    batch_eval_metrics: Any
    save_only_model: Any
    save_strategy: Any
    save_on_each_node: Any
    enable_jit_checkpoint: Any
    push_to_hub: Any
    hub_model_id: Any
    hub_token: Any
    hub_private_repo: Any
    hub_revision: Any
    hub_strategy: Any
    hub_always_push: Any
    ignore_data_skip: Any
    restore_callback_states_from_checkpoint: Any
    resume_from_checkpoint: Any
    full_determinism: Any
    data_seed: Any
    accelerator_config: Any
    parallelism_config: Any
    fsdp: Any
    fsdp_config: Any
    deepspeed: Any
    ddp_find_unused_parameters: Any
    ddp_bucket_cap_mb: Any
    ddp_broadcast_buffers: Any
    ddp_static_graph: Any
    ddp_backend: Any
    ddp_timeout: Any
    dataloader_drop_last: Any
    dataloader_num_workers: Any
    dataloader_pin_memory: Any
    dataloader_persistent_workers: Any
    dataloader_prefetch_factor: Any
    dataloader_multiprocessing_context: Any
    dataloader_in_order: Any
    remove_unused_columns: Any
    label_names: Any
    train_sampling_strategy: Any
    length_column_name: Any
    do_train: Any
    do_eval: Any
    do_predict: Any
    local_rank: Any
    model_init_kwargs: Any
    trust_remote_code: Any
    cast_lm_head_to_fp32: Any
    ds3_gather_for_generation: Any
    num_generations_eval: Any
    pad_to_multiple_of: Any
    generation_batch_size: Any
    generation_kwargs: Any
    cache_implementation: Any
    use_transformers_continuous_batching: Any
    transformers_continuous_batching_config: Any
    use_transformers_paged: Any
    use_vllm: Any
    vllm_model_impl: Any
    vllm_structured_outputs_regex: Any
    vllm_server_base_url: Any
    vllm_server_host: Any
    vllm_server_port: Any
    vllm_group_port: Any
    vllm_importance_sampling_cap: Any
    log_multimodal: Any
    log_unique_prompts: Any
    log_completions_hub_repo: Any
    device: Any
    n_gpu: Any
    world_size: Any
    process_index: Any
    local_process_index: Any
    should_save: Any
    should_log: Any
    distributed_state: Any
    train_batch_size: Any
    get_process_log_level: Any
    get_warmup_steps: Any
    output_dir: str

class FlatConfig(Attributes, Config):
    _algorithm: ClassVar[str]
    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ...
    @classmethod
    def own_fields(cls) -> dict[str, FieldInfo]: ...
    def __post_init__(self) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
    def to_json_string(self) -> str: ...
    def to_sanitized_dict(self) -> dict[str, Any]: ...
    def fit(self, num_rows: int, *, holds_out: bool) -> None: ...
    def settle(self, num_prompts: int, prompts_per_step: int) -> None: ...

class ReinforceConfig(FlatConfig):
    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ...

class RLOOConfig(FlatConfig):
    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ...

class GRPOConfig(FlatConfig):
    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ...

class ActorCriticConfig(FlatConfig):
    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ...
