"""The arguments that TRL's configs inherit from transformers' TrainingArguments, with the defaults TRL gives them."""

from __future__ import annotations

from .words import Word, idle, mapped, refused, same

_SHARDED = (
    "the launcher says how weights are cut over GPUs: FSDP2, `accelerate launch --config_file "
    "configs/accelerate/fsdp2.yaml`"
)
_LOADER = "prompts are tokenised once and held in memory: there is no data loader"
_DDP = "gradients are summed over the ranks without DistributedDataParallel"
_COMPUTE = "there is no compute_metrics: evaluation scores sampled completions"
_COMPILE = "compile the model yourself and give the object as `model`"
_LOG_LEVEL = "set the level of the logger yourself (`logging.getLogger('llm_pg')`)"
_TRACKIO = "trackio is started through accelerate: set its own environment variables"
_SCRIPT = "a flag for scripts; the trainer does not read it, in TRL either"

BATCH: dict[str, Word] = {
    "output_dir": same(None, "a run has a folder of its own in it: `<output_dir>/<run_name>`"),
    "per_device_train_batch_size": mapped(8, "completions of one pass; see the arithmetic above"),
    "gradient_accumulation_steps": mapped(1, "passes of an optimiser step; see the arithmetic above"),
    "num_train_epochs": mapped(
        3.0, "`max_steps`, from the number of prompts: ⌈epochs × ⌊prompts / prompts of a step⌋⌉"
    ),
    "max_steps": mapped(-1, "optimiser steps, rounded up to whole batches of rollouts; -1: `num_train_epochs` counts"),
    "average_tokens_across_devices": idle(True, "denominators are always those of the whole batch on all ranks"),
    "auto_find_batch_size": refused(
        False, "a pass that runs out of memory is halved by itself, with the same gradient; TRL refuses it too"
    ),
}
OPTIMISER: dict[str, Word] = {
    "learning_rate": same(1e-6),
    "lr_scheduler_type": same(
        "linear", "`reduce_lr_on_plateau` and `greedy`, which follow an evaluation's loss, are refused"
    ),
    "lr_scheduler_kwargs": same(None),
    "warmup_steps": mapped(0, "below 1 a share of all steps"),
    "optim": same(
        "adamw_torch_fused",
        "by transformers' own factory. GaLore, APOLLO, LOMO and schedule-free ones are refused: they own the backward "
        "pass, or sample with other weights than they train",
    ),
    "optim_args": same(None),
    "optim_target_modules": refused(None, "use a LoRA adapter (`peft_config`)"),
    "weight_decay": same(0.0, "of matrices; biases and norms are left out, as in transformers"),
    "adam_beta1": same(0.9),
    "adam_beta2": same(0.999),
    "adam_epsilon": same(1e-8),
    "max_grad_norm": same(1.0, "0 = never"),
    "label_smoothing_factor": refused(0.0, "there are no labels in a policy gradient"),
    "neftune_noise_alpha": refused(
        None, "noise in the embeddings makes the trained policy another than the sampled one"
    ),
}
PRECISION: dict[str, Word] = {
    "bf16": same(None, "TRL's None means on; here it is off unless given"),
    "fp16": same(False),
    "bf16_full_eval": refused(False, "evaluation samples with the weights as they are; set `dtype='bfloat16'`"),
    "fp16_full_eval": refused(False, "evaluation samples with the weights as they are; set `dtype='float16'`"),
    "tf32": refused(None, "set `torch.backends.cuda.matmul.allow_tf32` in the script, before the trainer", False),
    "activation_checkpointing": mapped(None, "`gradient_checkpointing`"),
    "activation_checkpointing_kwargs": refused(None, "checkpointing is never reentrant here", {"use_reentrant": False}),
    "gradient_checkpointing": same(True),
    "gradient_checkpointing_kwargs": refused(None, "checkpointing is never reentrant here", {"use_reentrant": False}),
    "torch_compile": refused(False, _COMPILE),
    "torch_compile_backend": refused(None, _COMPILE),
    "torch_compile_mode": refused(None, _COMPILE),
    "use_liger_kernel": refused(
        False, "the head is computed in pieces as it is, so that logits are never in memory whole; leave it out"
    ),
    "liger_kernel_config": refused(None, "use_liger_kernel is refused; leave it out"),
    "use_cache": idle(False, "sampling keeps keys and values, training does not"),
    "torch_empty_cache_steps": refused(None, "the cache is emptied where a pass runs out of memory; leave it out"),
}
LOGGING: dict[str, Word] = {
    "logging_strategy": mapped(
        "steps",
        "`no`: nothing in the terminal between start and end; `epoch`: `logging_steps` = "
        "the steps of an epoch; metrics.jsonl has every step in any case",
    ),
    "logging_steps": mapped(10, "below 1 a share of all steps"),
    "logging_first_step": idle(False, "metrics.jsonl has every step"),
    "log_on_each_node": idle(True, "the first rank speaks for all"),
    "logging_nan_inf_filter": idle(True, "not-a-number is written as null with its name"),
    "include_num_input_tokens_seen": idle("no", "each step's `tokens` are in metrics.jsonl"),
    "log_level": idle("passive", _LOG_LEVEL),
    "log_level_replica": idle("warning", _LOG_LEVEL),
    "disable_tqdm": idle(None, "there is no tqdm: give `terminal=Terminal(quiet=True)` to the trainer"),
    "report_to": mapped(
        "none",
        "a name or a list; `none`: no tracker; `all`: those of wandb, trackio and tensorboard that are installed",
    ),
    "run_name": same(None, "also the name of the run's folder"),
    "project": same("huggingface", "of wandb and trackio"),
    "trackio_space_id": refused(None, _TRACKIO),
    "trackio_bucket_id": refused(None, _TRACKIO),
    "trackio_static_space_id": refused(None, _TRACKIO),
    "debug": refused("", "use `llm-pg train --profile`, and `crash/` of a run that failed", []),
    "skip_memory_metrics": idle(True, "each step's `memory` is in metrics.jsonl"),
}
EVALUATION: dict[str, Word] = {
    "eval_strategy": mapped(
        "no",
        "`no`: nothing is held out or evaluated, not even at the end; `steps`: `eval_steps` (else "
        "`logging_steps`); `epoch`: `eval_steps` = the steps of an epoch. Not given: as here, before "
        "and after",
    ),
    "eval_steps": mapped(None, "below 1 a share of all steps; given without `eval_strategy` it counts too"),
    "eval_delay": refused(0, "use `eval_on_start=False` and larger `eval_steps`", 0.0),
    "per_device_eval_batch_size": mapped(8, "`eval_batch_size`, completions sampled at once"),
    "prediction_loss_only": refused(False, _COMPUTE),
    "eval_on_start": same(False),
    "eval_do_concat_batches": refused(True, _COMPUTE),
    "eval_use_gather_object": refused(False, _COMPUTE),
    "eval_accumulation_steps": refused(None, _COMPUTE),
    "include_for_metrics": refused([], _COMPUTE),
    "batch_eval_metrics": refused(False, _COMPUTE),
    "load_best_model_at_end": same(False),
    "metric_for_best_model": same(
        None, "a name of our evaluation: `eval_reward`, `eval_<set>_reward`, or `eval/greedy`, the pass rate"
    ),
    "greater_is_better": same(None, "None = True"),
}
SAVING: dict[str, Word] = {
    "save_only_model": refused(
        False, "a checkpoint is there to go on from; `trainer.save_model(folder)` saves the model alone"
    ),
    "save_strategy": mapped(
        "steps",
        "`no`: no checkpoints; `steps`: `save_steps` (500 where it is not given); `epoch`: "
        "the steps of an epoch; `best` is refused: pick the checkpoint by metrics.jsonl",
    ),
    "save_steps": mapped(500, "below 1 a share of all steps"),
    "save_on_each_node": refused(False, "the first rank saves; its folder must be seen by all that resume"),
    "save_total_limit": same(None, "None = all"),
    "enable_jit_checkpoint": idle(False, "SIGTERM and SIGINT end a run with a checkpoint in any case"),
    "push_to_hub": mapped(False, "True: model and card are uploaded when a run ends, as by `trainer.push_to_hub()`"),
    "hub_model_id": mapped(None, "of the repository; None = the name of `output_dir`"),
    "hub_token": mapped(None, "None = that of `hf auth login`; it is never written"),
    "hub_private_repo": mapped(None, "of a repository that is made"),
    "hub_revision": mapped(None, "branch of the upload"),
    "hub_strategy": mapped(
        "every_save",
        "`every_save`: the model with each checkpoint too; `checkpoint`, `all_checkpoints`: and the checkpoint, to go "
        "on from, as `last-checkpoint` or each by its step; `end`: when a run ends alone. One that fails warns",
    ),
    "hub_always_push": idle(False, "every upload is waited for"),
    "ignore_data_skip": refused(False, "a resumed run goes on bit for bit; leave it out"),
    "restore_callback_states_from_checkpoint": refused(
        False, "callbacks are made anew; let them read `state.log_history`"
    ),
    "resume_from_checkpoint": idle(
        None, "kept on the config; give it to `trainer.train(resume_from_checkpoint=...)`, as with TRL"
    ),
}
MACHINE: dict[str, Word] = {
    "full_determinism": refused(
        False,
        "call `transformers.enable_full_determinism(seed)` in the script",
    ),
    "seed": same(42),
    "data_seed": refused(None, "`seed` orders the data too; leave it out"),
    "use_cpu": same(False),
    "accelerator_config": refused(None, "there is no data loader to split; leave it out", {}),
    "parallelism_config": refused(None, _SHARDED),
    "fsdp": refused(None, _SHARDED, "", False),
    "fsdp_config": refused(None, _SHARDED, {}),
    "deepspeed": refused(None, _SHARDED),
    "ddp_find_unused_parameters": idle(None, _DDP),
    "ddp_bucket_cap_mb": idle(None, _DDP),
    "ddp_broadcast_buffers": idle(None, _DDP),
    "ddp_static_graph": idle(None, _DDP),
    "ddp_backend": refused(None, "accelerate chooses it; set ACCELERATE_* in the environment of the launch"),
    "ddp_timeout": refused(1800, "init the process group in the script, before the trainer"),
    "dataloader_drop_last": idle(False, _LOADER),
    "dataloader_num_workers": idle(0, _LOADER),
    "dataloader_pin_memory": idle(True, _LOADER),
    "dataloader_persistent_workers": idle(False, _LOADER),
    "dataloader_prefetch_factor": idle(None, _LOADER),
    "dataloader_multiprocessing_context": idle(None, _LOADER),
    "dataloader_in_order": idle(True, _LOADER),
    "remove_unused_columns": refused(False, "reward functions get every column they name; leave it out"),
    "label_names": refused(None, "there are no labels; reward functions read columns by their names"),
    "train_sampling_strategy": refused("random", "set `shuffle_dataset`"),
    "length_column_name": idle("length", "prompts are not grouped by length"),
    "do_train": idle(False, _SCRIPT),
    "do_eval": idle(False, _SCRIPT),
    "do_predict": idle(False, _SCRIPT),
    "local_rank": idle(-1, "the launcher's environment says it"),
}
TRAINING: dict[str, Word] = {**BATCH, **OPTIMISER, **PRECISION, **LOGGING, **EVALUATION, **SAVING, **MACHINE}
