"""Everything that can be found wrong with a run before torch is imported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from reward_fns.registry import tasks

from ...config import Config, ConfigError
from ...config.check import resolve_spec
from ...config.combinations import require_teacher
from ...config.load import check_model
from ...config.vllm import check_vllm
from ...doctor.sizes import checkpoint_bytes
from ...environments.episode import as_reward_function
from ...environments.protocol import ENVIRONMENTS
from ...prompts import check_data
from ...rewards.nothing import no_reward
from ...rewards.scorer import Scorer
from ...rewards.specs import resolve_all
from ...rewards.tally import RewardError
from ..logs.tracker_kinds import check_trackers
from ..saving.folder import RunFolder


def task_rewards(config: Config) -> list[Any]:
    """The config's environment, its reward functions, or the task's own."""
    if config.rollout.environment is not None:
        return [as_reward_function(config.rollout.environment, config.rollout.environment_options)]
    if config.reward.reward_funcs:
        return list(config.reward.reward_funcs)
    if config.rollout.environment_factory is not None and not config.data.task:
        return []  # it may pay by its get_reward
    if has_no_rewards(config):
        return [no_reward]
    if not config.data.task:
        raise ConfigError(
            "No reward function: set reward.reward_funcs (a shipped name, module:function or file.py:function), or "
            "pass reward_funcs to the trainer."
        )
    return [import_module(tasks()[config.data.task]).REWARD]


def has_no_rewards(config: Config) -> bool:
    """Whether a run of this config learns from a teacher alone, without any reward function."""
    spec, rollout = resolve_spec(config), config.rollout
    given = config.reward.reward_funcs or rollout.environment or rollout.environment_factory or config.data.task
    return bool(spec.teacher_coef) and not spec.reward_coef and not given


def preflight(config: Config, *, resume: bool = False) -> None:
    """Check model, data, reward functions and the run's folder. Raises ConfigError with one paragraph."""
    check_inputs(config)
    check_room(config)
    RunFolder(config).check(config, resume=resume)


def check_room(config: Config) -> None:
    """Has the disk room for one checkpoint, or for the model at the end? Predicted from sizes in names and headers.

    Raises ConfigError; says nothing where the size of the model is unknown (the trainer then asks once it is loaded).
    """
    need = checkpoint_bytes(config)
    path = RunFolder(config).path.absolute()
    place = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need is not None and need > free:
        what = "a checkpoint (weights and both moments of AdamW)" if config.run.save_steps else "the trained model"
        raise ConfigError(
            f"There is no room for {what}: it needs about {need:,} bytes at {path}, where {free:,} are free. "
            "Free some, or set run.output_dir elsewhere."
        )


def check_inputs(config: Config, *, read_hub: bool = False) -> list[int]:
    """Check model, data and reward functions. Raises ConfigError with one paragraph.

    Returns how many rows were read: to train on and, where they have a source of their own, held out; [] = none yet.

    read_hub: read a hub dataset too. Without it the trainer checks its rows, and that the reward functions can grade
    them, once it has loaded them.
    """
    check_model(config.model)
    check_trackers(config)
    tables: list[tuple[Sequence[Mapping[str, Any]], Callable[[int], str]]] = []
    check_data(config, read_hub=read_hub, check_rows=lambda rows, where: tables.append((rows, where)))
    try:
        require_teacher(resolve_spec(config), config)
        check_vllm(config)
        beside = [ENVIRONMENTS] if config.rollout.environment_factory is not None else []
        for function in resolve_all(task_rewards(config)):
            for rows, where in tables:
                function.check_columns([*rows[0], *beside])
                function.check_rows(rows, where)
        if config.rollout.environment is not None:
            _try_environment(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [len(rows) for rows, _ in tables]


def _try_environment(config: Config) -> None:
    """Make the environment once, in a worker."""
    try:
        with Scorer(task_rewards(config), workers=1, strict=True) as scorer:
            scorer.grade([""], [""], [[]], [{}])
    except RewardError as error:
        raise ConfigError(f"rollout.environment {config.rollout.environment!r} cannot be made. {error}") from None
