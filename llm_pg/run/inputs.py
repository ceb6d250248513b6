"""The model, the tokenizer and the prompts of a run, from what a trainer is given and from its config."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, flat
from ..model.adapters import check_passes, check_repeatable, check_trainable, has_adapter
from ..model.loading import (
    context_length,
    context_length_before,
    load_model,
    load_tokenizer,
    prepare_model,
    prepare_tokenizer,
)
from ..model.merging import check_merge
from ..model.policy import Policy
from ..model.precision import hold_trained_in_float32
from ..model.teacher import ScoresTokens, Teacher, check_tokens_of
from ..prompts import Prompt, load_prompts
from ..prompts.sources import read_object
from ..sampling.vllm.teacher import ServedTeacher
from .context import RunContext
from .saving.other_parts import other_parts


def fit_to_dataset(config: Config, train_dataset: Any, eval_dataset: Any) -> Any:
    """Fits the defaults of a flat config, as TRL's users know them, to the number of rows. Returns the dataset, read
    where it is a stream, whose length nobody knows before."""
    if not isinstance(config, flat.FlatConfig) or train_dataset is None or isinstance(train_dataset, dict):
        return train_dataset
    if not isinstance(train_dataset, Sized):
        cap = config.data.num_train_prompts + (config.data.num_eval_prompts if eval_dataset is None else 0)
        train_dataset = list(read_object(train_dataset, "train_dataset", config, cap).rows)
    config.fit(len(train_dataset), holds_out=eval_dataset is None)
    return train_dataset


def load_run_tokenizer(config: Config, model: Any, tokenizer: Any) -> Any:
    """The tokenizer of a run, before its model is loaded; a model's name is put into the config.

    Args:
        model: hub id, local folder, or a transformers model; None = what the config says.
        tokenizer: None = the model's own.
    """
    if isinstance(model, (str, Path)):
        _name(config, str(model))
        model = None
    return prepare_tokenizer(tokenizer) if tokenizer is not None else _own_tokenizer(config, model)


def is_foreseen(config: Config, model: Any) -> bool:
    """Whether the prompts can be checked before the weights of the run's model are loaded.

    model: as it is given to a trainer. An object is loaded already; what does not say its context must be.
    """
    named = model is None or isinstance(model, (str, Path))
    return named and context_length_before(config.model) is not None


def load_run_model(context: RunContext, model: Any, tokenizer: Any, peft_config: Any) -> Any:
    """The model in training, checked and on its device.

    Args:
        model: a transformers model; None, or a name = what the config says.
        tokenizer: of `load_run_tokenizer`. peft_config: of a new adapter; None = the config's.

    Raises:
        ConfigError: what cannot be trained as it is.
    """
    config = context.config
    # An adapter draws its first weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        if model is None or isinstance(model, (str, Path)):
            model = load_model(config.model, tokenizer, seed=config.run.seed, peft_config=peft_config)
        else:
            model = prepare_model(model, tokenizer, config.model, peft_config)
    check_trainable(model)
    held = hold_trained_in_float32(model, autocast=config.train.bf16 or config.train.fp16)
    if held is not None:
        context.terminal.say(held)
    beside = other_parts(model)
    if beside is not None:
        context.terminal.warn(beside.before())
    _check_model(context, model)
    if not config.model.load_in_4bit:
        context.strategy.place(model)
    if config.train.gradient_checkpointing:
        # transformers 5.23 renamed it; older ones know the second name alone.
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    return model


def name_teacher(config: Config, teacher: Any) -> None:
    """Puts into the config what a trainer was given as its teacher: a name, or that of an object."""
    name = str(teacher) if isinstance(teacher, (str, Path)) else getattr(teacher.config, "_name_or_path", "")
    config.model.teacher_model_name_or_path = name or type(teacher).__name__


def load_teacher(context: RunContext, given: Any, policy: Policy) -> ScoresTokens | None:
    """The teacher of a run; None where its algorithm has none.

    Args:
        given: a transformers model; a name was put into the config; None = the config's.
    """
    settings = context.config.model
    if not context.spec.teacher_coef:
        return None
    if given is not None and not isinstance(given, (str, Path)):
        return Teacher.of_policy(given, policy)
    if settings.teacher_model_server_url is not None:
        return ServedTeacher(settings.teacher_model_server_url, temperature=policy.params.temperature)
    assert settings.teacher_model_name_or_path is not None
    return Teacher.from_pretrained(
        settings.teacher_model_name_or_path,
        policy,
        revision=settings.teacher_model_revision,
        init_kwargs=settings.teacher_model_init_kwargs,
    )


def check_teacher(context: RunContext, given: Any, tokenizer: Any) -> None:
    """Raises ConfigError where the teacher of a run cannot teach these tokens, before any weights are loaded.

    Args:
        given: as for `load_teacher`. tokenizer: of the run.
    """
    settings = context.config.model
    if not context.spec.teacher_coef or not (given is None or isinstance(given, (str, Path))):
        return
    if settings.teacher_model_server_url is not None:
        ServedTeacher(settings.teacher_model_server_url, temperature=context.config.rollout.temperature)
    elif settings.teacher_model_name_or_path is not None:
        check_tokens_of(settings.teacher_model_name_or_path, tokenizer, settings.teacher_model_revision)


def load_run_prompts(
    context: RunContext, model: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those that are held out.

    model: in training; None = that of the config, which is not loaded yet.
    """
    config = context.config
    longest = context_length_before(config.model) if model is None else context_length(model)
    train, held_out = load_prompts(
        config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset, context_length=longest
    )
    if isinstance(config, flat.FlatConfig):
        config.settle(len(train), context.plan.prompts)
    return train, held_out


def _check_model(context: RunContext, model: Any) -> None:
    config, autocast = context.config, context.autocast
    if has_adapter(model):
        check_passes(model, autocast)
    if config.model.disable_dropout:
        check_repeatable(model, autocast)
    check_merge(config, model, sharded=context.strategy.shards_weights)
    if config.algorithm.sync_ref_model and has_adapter(model):
        raise ConfigError(
            "sync_ref_model is true and the model has an adapter: its reference is the same weights with the "
            "adapter off, which cannot move by themselves. Set sync_ref_model=false, or train without the adapter."
        )


def _own_tokenizer(config: Config, model: Any) -> Any:
    if model is not None:
        name = getattr(model.config, "_name_or_path", "")
        if not name:
            raise ConfigError(
                "The model was given as an object without a name: give its tokenizer as processing_class."
            )
        _name(config, name)
    return load_tokenizer(config.model)


def _name(config: Config, name: str) -> None:
    config.model.model_name_or_path = name
    config.model.make = None
