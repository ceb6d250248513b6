"""TRL's arguments as settings of a run. What stays out of it, stays as it was given: these words are flat settings."""

from __future__ import annotations

import json
import math
import os
from enum import Enum
from typing import Any

from ...words import choices, nearest
from ..load import ConfigError
from .policy import POLICY
from .schedule import TrlSchedule
from .training import TRAINING
from .words import Word

WORDS: dict[str, Word] = {**TRAINING, **POLICY}
BATCH_WORDS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
Values = dict[str, Any]


def translate(given: Values) -> tuple[Values, TrlSchedule]:
    """Flat settings of the keywords given, and what is left to count when the data are read.

    Raises ConfigError, one paragraph, for an argument of TRL's that cannot be had here.
    """
    values = {name: _plain(value) for name, value in given.items()}
    for name in [name for name in values if name in WORDS and WORDS[name].kind in ("refused", "idle")]:
        value, word = values.pop(name), WORDS[name]
        if word.kind == "refused" and not word.asks_for_nothing(value):
            raise _refusal(name, value, word.note)
    schedule = TrlSchedule()
    for step in (_nothing, _batch, _steps, _model, _sampling, _vllm, _objective, _watching):
        step(values, schedule)
    return values, schedule


def _refusal(name: str, value: Any, what: str) -> ConfigError:
    return ConfigError(f"TRL's argument {name}={value!r} is refused: {what}.")


def _say(values: Values, name: str, value: Any, as_given: str) -> None:
    """Set what an argument of TRL's says; refuse it where another argument says otherwise."""
    if name in values and values[name] is not None and values[name] != value:
        raise ConfigError(
            f"{name} is given twice: {values[name]!r}, and {value!r} by {as_given}. Leave one of them out."
        )
    values[name] = value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _nothing(values: Values, schedule: TrlSchedule) -> None:
    """None where TRL's None says nothing; for a limit it says that there is none."""
    if "vllm_importance_sampling_clip_max" in values and values["vllm_importance_sampling_clip_max"] is None:
        raise _refusal("vllm_importance_sampling_clip_max", None, "an unbounded ratio; give a large number instead")
    for name in [name for name, value in values.items() if name in WORDS and value is None]:
        if name != "save_total_limit":
            del values[name]


def _batch(values: Values, schedule: TrlSchedule) -> None:
    """TRL counts a batch of rollouts and an optimiser step in passes: steps_per_generation and
    gradient_accumulation_steps of per_device_train_batch_size completions on each rank. Here a step is a batch of
    rollouts, cut into steps_per_generation minibatches."""
    if "prompts_per_step" in values:
        if "generation_batch_size" in values:
            raise _refusal(
                "generation_batch_size",
                values["generation_batch_size"],
                "prompts_per_step is given too; give one of them",
            )
        return
    if not any(name in values for name in BATCH_WORDS):
        return
    rows = int(values.get("per_device_train_batch_size", WORDS["per_device_train_batch_size"].default))
    accumulate = int(values.get("gradient_accumulation_steps", WORDS["gradient_accumulation_steps"].default))
    passes = _passes(values, rows, accumulate)
    if passes < accumulate:
        if accumulate % passes or int(values.get("num_iterations", 1)) > 1:
            raise _refusal(
                "steps_per_generation",
                passes,
                f"gradient_accumulation_steps is {accumulate}, so that an optimiser step "
                "would take parts of several batches of rollouts; take a multiple of gradient_accumulation_steps",
            )
        passes = accumulate  # several batches of the same weights are one batch
    if passes % accumulate:
        raise _refusal(
            "steps_per_generation",
            passes,
            f"it is no multiple of gradient_accumulation_steps {accumulate}, so that an "
            "optimiser step would straddle two batches of rollouts",
        )
    values["per_device_train_batch_size"] = rows
    values["gradient_accumulation_steps"] = passes
    values["steps_per_generation"] = passes // accumulate


def _passes(values: Values, rows: int, accumulate: int) -> int:
    """steps_per_generation in TRL's count, whichever way it was given."""
    whole, passes = values.pop("generation_batch_size", None), values.get("steps_per_generation")
    if whole is not None and passes is not None:
        raise _refusal("generation_batch_size", whole, "steps_per_generation is given too; give one of them")
    if whole is None:
        return accumulate if passes is None else int(passes)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if whole % (rows * ranks):
        raise _refusal(
            "generation_batch_size",
            whole,
            f"per_device_train_batch_size {rows} × {ranks} "
            f"rank{'s' if ranks > 1 else ''} does not divide it; take a multiple of {rows * ranks}",
        )
    return int(whole) // (rows * ranks)


def _steps(values: Values, schedule: TrlSchedule) -> None:
    """Counts of steps. TRL's are optimiser steps, several of which make a batch of rollouts that is reused or cut."""
    updates = 1
    if "prompts_per_step" not in values:
        updates = int(values.get("num_iterations", 1)) * int(values.get("steps_per_generation", 1))
    _strategies(values, schedule)
    epochs = values.pop("num_train_epochs", None)
    if values.get("max_steps", 1) <= 0:
        del values["max_steps"]
        epochs = WORDS["num_train_epochs"].default if epochs is None else epochs
    if epochs is not None and "max_steps" not in values:
        schedule.epochs = float(epochs)
    if "warmup_ratio" in values:  # of earlier versions
        _say(values, "warmup_steps", values.pop("warmup_ratio"), "warmup_ratio")
    if isinstance(values.get("warmup_steps"), float) and values["warmup_steps"] >= 1:
        values["warmup_steps"] = math.ceil(values["warmup_steps"])
    for name in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        if name in values and isinstance(values[name], float) and 0 < values[name] < 1:
            schedule.shares[name] = values.pop(name)
    for name in ("max_steps", "logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        if updates > 1 and name in values:
            values[name] = math.ceil(values[name] / updates)


def _strategies(values: Values, schedule: TrlSchedule) -> None:
    for name in ("logging", "save", "eval"):
        strategy, steps = values.pop(f"{name}_strategy", None), f"{name}_steps"
        if strategy in ("no", False):
            values.update(_OFF[name])
        elif strategy == "epoch":
            values.pop(steps, None)
            schedule.every_epoch.append(steps)
        elif strategy == "steps":
            fallback = values.get("logging_steps", WORDS["logging_steps"].default) if name == "eval" else None
            values.setdefault(steps, WORDS[steps].default if fallback is None else fallback)
        elif strategy is not None:
            raise _refusal(
                f"{name}_strategy",
                strategy,
                f"{choices(strategy, ('no', 'steps', 'epoch'))} The best model is chosen by `metric_for_best_model`",
            )


_OFF: dict[str, Values] = {
    "logging": {"logging_steps": 10**9},
    "save": {"save_steps": 0, "save_at_end": False},
    "eval": {"eval_steps": 0, "eval_on_start": False, "num_eval_prompts": 0},
}


def _model(values: Values, schedule: TrlSchedule) -> None:
    kwargs = _mapping(values.pop("model_init_kwargs", None), "model_init_kwargs")
    for key, value in kwargs.items():
        if key not in _MODEL_WORDS:
            if value is None or value in _MODEL_IDLE.get(key, ()):
                continue
            raise _refusal(
                f"model_init_kwargs[{key!r}]",
                value,
                f"it may have {', '.join(_MODEL_WORDS)}; load the model yourself and "
                f"give the object as `model`.{nearest(key, _MODEL_WORDS)}".rstrip("."),
            )
        if value is not None:
            value = str(value).removeprefix("torch.") if "dtype" in key else value
            _say(values, _MODEL_WORDS[key], value, f"model_init_kwargs[{key!r}]")
    if "activation_checkpointing" in values:
        _say(values, "gradient_checkpointing", values.pop("activation_checkpointing"), "activation_checkpointing")


_MODEL_WORDS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
}
# Words of from_pretrained that ask for what is the case anyway.
_MODEL_IDLE: dict[str, tuple[Any, ...]] = {"use_cache": (True, False), "trust_remote_code": (False,)}


def _mapping(value: Any, name: str) -> Values:
    """A dict, or the JSON text of one, as TRL takes it."""
    try:
        found = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise _refusal(name, value, f"it is no JSON ({error}); give a dict") from None
    if not isinstance(found, dict):
        raise _refusal(name, value, "give a dict")
    return found


def _sampling(values: Values, schedule: TrlSchedule) -> None:
    for key, value in _mapping(values.pop("generation_kwargs", None), "generation_kwargs").items():
        if value in _GENERATION_IDLE.get(key, ()) or key in _OF_BEAMS:
            continue
        if key not in _GENERATION_WORDS:
            raise _refusal(
                f"generation_kwargs[{key!r}]",
                value,
                "what is sampled must be what is trained, and the trainer knows "
                f"{', '.join(_GENERATION_WORDS)}; use one of these, or shape the reward",
            )
        stops = key in ("stop", "stop_strings") and isinstance(value, str)
        _say(values, _GENERATION_WORDS[key], [value] if stops else value, f"generation_kwargs[{key!r}]")
    for name in ("chat_template_kwargs", "lr_scheduler_kwargs"):
        if name in values:
            values[name] = _mapping(values[name], name)


# Keywords of generate that ask for what is the case anyway, and those that only beam search reads.
_GENERATION_IDLE: dict[str, tuple[Any, ...]] = {"do_sample": (True, None), "num_beams": (1, None), "use_cache": (True,)}
_OF_BEAMS = ("length_penalty", "early_stopping")
_GENERATION_WORDS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **{"stop": "stop", "stop_strings": "stop", "max_new_tokens": "max_completion_length"},
}


def _vllm(values: Values, schedule: TrlSchedule) -> None:
    theirs = bool(values.pop("use_vllm", False))
    if theirs:
        _say(values, "engine", "vllm", "use_vllm")
    base, host, port = (values.pop(f"vllm_server_{word}", None) for word in ("base_url", "host", "port"))
    mode = values.get("vllm_mode", "colocate" if theirs else "server")
    if mode == "server" and (theirs or base or host or port):
        host = "127.0.0.1" if host in (None, WORDS["vllm_server_host"].default) else host
        values.setdefault("vllm_urls", [base or f"http://{host}:{port or WORDS['vllm_server_port'].default}"])
    # Words of ours, which say that it runs elsewhere, count for more than TRL's default.
    elsewhere = mode == "colocate" and theirs and (values.get("vllm_python") or values.get("vllm_urls"))
    values["vllm_mode"] = "server" if elsewhere else mode
    implementation = values.pop("vllm_model_impl", "vllm")
    if implementation != "vllm":
        values["vllm_options"] = {**values.get("vllm_options", {}), "model-impl": implementation}
    cap = values.pop("vllm_importance_sampling_cap", None)
    if cap is not None:
        _say(values, "vllm_importance_sampling_clip_max", cap, "vllm_importance_sampling_cap")


def _objective(values: Values, schedule: TrlSchedule) -> None:
    if "scale_rewards" in values:
        scale = values["scale_rewards"]
        values["scale_rewards"] = {True: "group", False: "none", "mean": "group_mean"}.get(scale, scale)
    if values.get("multi_objective_aggregation") == "normalize_then_sum":
        values.update(baseline="batch_mean", scale_rewards="batch")  # TRL's reads scale_rewards of the other kind alone
    if isinstance(values.get("normalize_advantages"), bool):
        values["normalize_advantages"] = "rollouts" if values["normalize_advantages"] else "none"
    loss = values.get("loss_type")
    if loss in ("cispo", "sapo"):
        _say(values, "surrogate", loss, "loss_type")
        values["loss_type"] = {"cispo": "dapo", "sapo": "grpo"}[loss]
        if loss == "cispo":  # TRL's bound; the doctor says what so low a one does
            values.setdefault("epsilon_high", values.get("epsilon", WORDS["epsilon"].default))
    elif loss == "luspo":
        values["loss_type"] = "sequence_sum"
    elif loss == "vespo":
        level = values.pop("importance_sampling_level", "token")
        if level != "token":
            raise _refusal("importance_sampling_level", level, "vespo weighs whole completions by itself; leave it out")
        _say(values, "surrogate", "vespo", "loss_type")
        values.update(loss_type="dapo", importance_sampling_level="sequence_sum")


def _watching(values: Values, schedule: TrlSchedule) -> None:
    if isinstance(values.get("log_completions"), bool) and not values.pop("log_completions"):
        values["log_completions"] = 0
    for name in ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy"):
        given = values.pop(name, None)  # read of the config as they were given
        if name == "hub_strategy" and given is not None and given not in HUB_STRATEGIES:
            raise _refusal(name, given, choices(given, HUB_STRATEGIES).rstrip("."))
    for theirs, ours in _RENAMED.items():
        if theirs in values:
            _say(values, ours, values.pop(theirs), theirs)


_RENAMED = {"num_generations_eval": "eval_num_samples", "per_device_eval_batch_size": "eval_batch_size"}
