"""Every setting of a run, in sections. A leaf's name is unique, so `num_generations=4` and
`rollout.num_generations=4` mean the same on the command line and in Python.

Where TRL has an argument for a thing, the leaf has TRL's name.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, field_validator

from .algorithm import AlgorithmConfig
from .rollout import RolloutConfig
from .section import Section
from .train import TrainConfig

Tracker = Literal[
    "none", "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
]
TRACKERS: tuple[Tracker, ...] = (
    "wandb",
    "trackio",
    "tensorboard",
)  # what `all` means, where installed


class ModelConfig(Section):
    """The policy: where its weights come from and how they are held."""

    model_name_or_path: str | None = Field(None, description="Hub id or local folder of a causal LM.")
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    make: dict[str, Any] | None = Field(
        None,
        description="Make a small model with random weights instead: transformers config arguments with model_type "
        "(llama, qwen2, ...); its tokenizer reads single characters.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Type that the weights come in. Those that are trained are held in float32 all the same, and a "
        "model in bfloat16 is computed in it (train.bf16) unless train.bf16 or train.fp16 is set.",
    )
    attn_implementation: str | None = Field(
        None, description="transformers' attention: sdpa, eager, flash_attention_2."
    )
    disable_dropout: bool = Field(True, description="Set every dropout to 0, so that scores are a function of weights.")
    use_peft: bool = Field(False, description="Train a LoRA adapter; the reference is then the model without it.")
    lora_r: int = Field(16, gt=0, description="Rank of the adapter.")
    lora_alpha: int = Field(32, gt=0, description="Scale of the adapter, divided by the rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the adapter.")
    lora_target_modules: list[str] | str | None = Field(
        None, description="Modules that get an adapter; None = all linear."
    )
    use_dora: bool = Field(False, description="DoRA: the adapter also learns the length of each output's weights.")
    use_rslora: bool = Field(False, description="Divide lora_alpha by the root of the rank instead of the rank.")
    load_in_4bit: bool = Field(
        False, description="QLoRA: hold the frozen weights in 4 bits (NF4); needs bitsandbytes and use_peft."
    )
    teacher_model_name_or_path: str | None = Field(
        None,
        description="Hub id or folder of a frozen causal LM (or of an adapter of one) with the same tokenizer, which "
        "the policy is taught by: algorithm opd or opd_token, or teacher_coef with another.",
    )
    teacher_model_server_url: str | None = Field(
        None, description="Address of a vLLM server of the teacher, http://host:8000, in the place of its name."
    )
    teacher_model_revision: str | None = Field(None, description="Branch, tag or commit of a hub teacher.")
    teacher_model_init_kwargs: dict[str, Any] = Field(
        {}, description="Arguments of from_pretrained for the teacher; its dtype is auto unless given here."
    )


class DataConfig(Section):
    """The prompts: a task of reward_fns, a hub dataset, local files, or a `datasets` object from Python."""

    task: str | None = Field(None, description="Synthetic task by name: sort_letters, countdown, ...")
    task_options: dict[str, Any] = Field({}, description="Arguments of the task's prompts(seed, n, ...).")
    num_train_prompts: int = Field(
        4096, gt=0, description="Prompts to make for a synthetic task; the most to read from a generator or a stream."
    )
    dataset_name: str | None = Field(None, description="Hub dataset, for example openai/gsm8k.")
    dataset_config: str | None = Field(None, description="Its configuration, for example main.")
    dataset_split: str = Field("train", description="Split that is trained on.")
    dataset_eval_split: str | None = Field(
        None, description="Split held out; None = hold out rows of the training split."
    )
    dataset_streaming: bool = Field(
        False,
        description="Read the first num_train_prompts rows of the hub dataset, and those held out, and do not fetch "
        "the rest.",
    )
    data_files: str | list[str] | None = Field(None, description="Local JSONL, JSON, Parquet or CSV files.")
    eval_data_files: str | list[str] | None = Field(None, description="Local files held out.")
    prompt_column: str = Field("prompt", description="Column with the prompt: text, or a list of messages.")
    prompt_template: str | None = Field(None, description="Text with {column} fields that makes the prompt instead.")
    system_prompt: str | None = Field(None, description="System message; makes a plain prompt conversational.")
    chat: bool | None = Field(
        None,
        description="Put a plain prompt into the chat template as the user's message; None = only with system_prompt.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Arguments of the chat template, for example enable_thinking."
    )
    columns: dict[str, str] = Field({}, description="New name: column. What reward functions read under another name.")
    extract: dict[str, str] = Field(
        {},
        description="Column: regular expression; its first group replaces the column's text (GSM8K: '####\\s*(.+)').",
    )
    num_eval_prompts: int = Field(256, ge=0, description="Prompts held out and never trained on.")
    max_prompt_length: int | None = Field(
        None, gt=0, description="Longest prompt in tokens; None = the model's context."
    )
    long_prompts: Literal["error", "drop"] = Field(
        "error", description="What to do with longer ones; drops are counted."
    )
    shuffle_dataset: bool = Field(True, description="A new order every epoch, a function of (seed, epoch).")
    curriculum: Literal["none", "pass_rate"] = Field(
        "none",
        description="pass_rate = draw prompts by how open their outcome is: weight 4p(1-p) + curriculum_floor, p the "
        "running pass rate (of eval.pass_reward). Biased on purpose: hard and solved prompts count less.",
    )
    curriculum_floor: float = Field(
        0.05, gt=0, description="Weight of a prompt that is always or never passed; the largest is 1 + this."
    )
    curriculum_memory: float = Field(
        0.8, ge=0, lt=1, description="Share of a prompt's counts that is kept when it is tried again."
    )


class RewardConfig(Section):
    """What a completion is worth, and how the functions that say so are bounded."""

    reward_funcs: list[Any] = Field(
        [],
        description="Names of shipped functions, module:function, file.py:function, a reward model's hub id or folder; "
        "None or [] = the task's own.",
    )
    reward_weights: list[float] | None = Field(None, description="One weight per function; None = 1 each.")
    reward_clip_range: list[float] | None = Field(
        None, min_length=2, max_length=2, description="Lowest and highest weighted sum; the reward is clipped to them."
    )
    reward_timeout: float = Field(10.0, gt=0, description="Seconds one completion may take before it is unscorable.")
    reward_workers: int = Field(2, gt=0, description="Processes that run reward functions.")
    reward_in_process: bool = Field(False, description="Run them in the trainer instead: faster to debug, no deadline.")
    max_unscorable: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of completions on which a function fails that stops the run. Those for which all return "
        "None do not count, but a batch without any score does.",
    )
    strict: bool = Field(False, description="Stop at the first completion that cannot be scored.")
    audit_rewards: Literal["warn", "stop", "none"] = Field(
        "warn",
        description="Before the first step: right answers in many forms, and wrong ones that look like them, to 32 "
        "rows, in at most 2 seconds. Where a wrong one is paid: warn, stop the run, or none = do not try.",
    )
    skip_special_tokens: bool | None = Field(
        None,
        description="Take special tokens out of the completion that functions read. false = leave those in that are "
        "words of the model, such as <think> added as a special token (begin, end, padding and the tokens around turns "
        "are taken out in any case); None = false where a shipped function reads tags, else true.",
    )


class CriticConfig(Section):
    """The learned critic of the rows that have one (a2c, ppo); the other rows make none."""

    critic_kind: Literal["head", "model"] = Field(
        "head", description="head = a small network on the policy's hidden states, model = a copy of the policy's body."
    )
    critic_trunk_gradient: bool = Field(
        False,
        description="Let the value loss move the policy's body too (kind head). Off: the policy's gradient is then the "
        "algorithm's alone, whatever the size of the rewards, and an adapter learns nothing but the policy.",
    )
    critic_path: str | None = Field(
        None, description="Folder with the critic.safetensors of an earlier run, to begin with; None = a new critic."
    )
    critic_learning_rate: float | None = Field(
        None, gt=0, description="Constant rate of AdamW; None = 3e-3 for a head, twice train.learning_rate for a model."
    )
    critic_warmup_steps: int = Field(
        0, ge=0, description="First steps that train the critic alone; the policy's schedule begins after them."
    )


class WarmStartConfig(Section):
    """Supervised steps before reinforcement, by trl's SFTTrainer, on the task's demonstrations or a dataset."""

    warm_start_steps: int = Field(0, ge=0, description="Optimiser steps; 0 = none.")
    warm_start_learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate, linear to 0.")
    warm_start_batch_size: int = Field(64, gt=0, description="Demonstrations per step.")
    warm_start_options: dict[str, Any] = Field({}, description="Arguments of the task's demonstrations(seed, n, ...).")
    warm_start_data_files: str | list[str] | None = Field(
        None, description="JSONL with prompt and completion instead of the task's demonstrations."
    )


class EvalConfig(Section):
    """Held-out evaluation: before the first step, every eval_steps, and after the last."""

    eval_steps: int = Field(0, ge=0, description="Steps between evaluations; 0 = only before and after.")
    eval_on_start: bool = Field(True, description="Evaluate before the first step.")
    eval_num_samples: int = Field(
        4, ge=0, description="Sampled answers per held-out prompt, for pass@k; 0 = greedy only."
    )
    eval_batch_size: int = Field(1024, gt=0, description="Completions sampled at once.")
    pass_reward: str | None = Field(None, description="Reward function that decides a pass; None = the first.")
    strict_reward: str | None = Field(
        None,
        description="Function that wants the answer in its form, reported as eval/strict; None = what decides a pass, "
        "or its strict reading where one is shipped.",
    )
    lenient_reward: str | None = Field(
        None,
        description="Function that finds the answer in any form, reported as eval/lenient; None = likewise. Neither is "
        "trained on.",
    )
    pass_threshold: float = Field(
        1.0,
        description="Score of the deciding function from which a completion passes. A dense reward may never reach it: "
        "eval/reward is then the number to read.",
    )


class RunConfig(Section):
    """Where a run writes, and what it tells."""

    output_dir: str = Field("runs", description="Folder that holds the runs.")
    run_name: str | None = Field(None, description="Folder of this run; None = <task>-<algorithm>-seed<seed>.")
    seed: int = Field(0, ge=0, description="Of everything: data order, sampling, made models.")
    report_to: list[Tracker] = Field(
        [], description="Trackers of accelerate: wandb, trackio, tensorboard; none, or all that are installed."
    )
    project: str = Field("llm_pg", description="Project of the trackers.")
    tracker_group: str | None = Field(
        None, description="Group of the run at trackers that have groups; None = the run's name without its seed."
    )
    tracker_tags: list[str] = Field([], description="Words to find the run by, at trackers that have tags.")
    logging_steps: int = Field(
        1, gt=0, description="Steps between lines in the terminal; the metrics file has every step."
    )
    log_completions: int = Field(8, ge=0, description="Groups written to completions/ at each step; 0 = none.")
    profile_steps: int = Field(
        0, ge=0, description="Steps traced to profile/ from the third on (trace.json, operations.txt); 0 = none."
    )
    noise_steps: int = Field(
        10, ge=0, description="Steps between measurements of the gradient's signal and noise; 0 = never."
    )
    num_completions_to_print: int = Field(
        1, ge=0, description="Completions shown now and then in the terminal, with their score parts; 0 = none."
    )
    report_seconds: float = Field(
        30.0,
        ge=0,
        description="Least time between two writings of report.html while the run goes on, in at most 1 % of its time; "
        "0 = only at the end.",
    )
    try_longest_batch: bool | None = Field(
        None,
        description="Try one pass of the longest prompt and completions before the first step, so that what does not "
        "fit into memory shows at once; None = on an accelerator, or from 50 M parameters.",
    )
    save_steps: int = Field(0, ge=0, description="Steps between checkpoints; 0 = none before the end.")
    save_at_end: bool = Field(
        True,
        description="Write a checkpoint of the last step, from which --resume can make a missing evaluation or go on "
        "to a larger max_steps; it takes the room of the trainable weights and their moments.",
    )
    merge_adapter: bool = Field(
        False,
        description="At the end also save the model with its adapter merged in, to merged/, if its logits on held-out "
        "prompts are those that were trained; tried before the first step too. It needs memory for a second model for "
        "a moment (llm-pg merge RUN does it from the files).",
    )
    save_total_limit: int | None = Field(2, gt=0, description="Checkpoints that stay; None = all.")
    metric_for_best_model: str | None = Field(
        None,
        description="Keep the model of the best held-out evaluation in best/, by this metric: eval/greedy, "
        "eval/sampled, eval/pass@4, eval/reward, eval/length, or eval_reward, TRL's: the mean reward of sampled "
        "completions, of the greedy ones where none are sampled; None = keep none, or eval/greedy with "
        "load_best_model_at_end.",
    )
    greater_is_better: bool = Field(True, description="Whether a larger value of that metric is better.")
    load_best_model_at_end: bool = Field(False, description="End with the best model in place of the last.")
    overwrite: bool = Field(False, description="Start anew in a run folder that already holds a run.")

    @field_validator("metric_for_best_model", mode="after")
    @classmethod
    def _named_as_by_transformers(cls, name: str | None) -> str | None:
        """As transformers and TRL write it, with eval_ or without. eval_reward is what is logged by that name."""
        return name if name is None or name.startswith("eval/") else metric_of_ours(name)

    @field_validator("report_to", mode="after")
    @classmethod
    def _named_trackers(cls, names: list[Tracker]) -> list[Tracker]:
        """transformers' words none and all, as the trackers that they stand for."""
        if names == ["none"]:
            return []
        if "all" in names:
            return [name for name in TRACKERS if find_spec(name) is not None]
        return names


def metric_of_ours(name: str) -> str:
    """Returns our name of a number of the evaluation that has one by transformers' rule, with `eval_` or without.

    Args:
        name: such as eval_reward, reward, eval_greedy.
    """
    rest = name.removeprefix("eval_")
    names = {"reward": "eval_reward", "greedy_reward": "eval/reward"}
    return names.get(rest, f"eval/{rest}" if name.startswith("eval_") else name)


class Config(Section):
    """A run, whole."""

    model: ModelConfig = ModelConfig()  # type: ignore[call-arg]
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    rollout: RolloutConfig = RolloutConfig()  # type: ignore[call-arg]
    reward: RewardConfig = RewardConfig()  # type: ignore[call-arg]
    algorithm: AlgorithmConfig = AlgorithmConfig()  # type: ignore[call-arg]
    critic: CriticConfig = CriticConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    warm_start: WarmStartConfig = WarmStartConfig()  # type: ignore[call-arg]
    eval: EvalConfig = EvalConfig()  # type: ignore[call-arg]
    run: RunConfig = RunConfig()  # type: ignore[call-arg]


LEAVES: dict[str, str] = {
    leaf: section
    for section, field in Config.model_fields.items()
    for leaf in field.annotation.model_fields  # type: ignore[union-attr]
}
