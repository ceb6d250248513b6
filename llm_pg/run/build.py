"""Objects made from a config: the distribution that is sampled, the reward functions, sampler and scorer as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import Config, ConfigError, nearest
from ..environments.partner import EnvironmentPartner
from ..environments.protocol import ENVIRONMENTS
from ..environments.rollout import EpisodeLimits
from ..environments.toolbox import Toolbox
from ..environments.writing import TurnWriter
from ..model.loading import end_token_ids
from ..model.policy import Policy
from ..rewards.scorer import Scorer
from ..rewards.specs import RewardFunction, resolve_all, with_processing_classes
from ..rollout.collector import Collector
from ..rollout.dual_scoring import make_dual_scoring
from ..rollout.episodes import EpisodeCollector, ToolCollector
from ..rollout.reading import make_reader
from ..sampling.protocol import SamplingEngine, SamplingParams
from ..words import choices
from .before.preflight import has_no_rewards, task_rewards
from .context import RunContext
from .engines import make_sampler
from .tools import make_partner


def sampling_params(config: Config) -> SamplingParams:
    """The distribution that is sampled and trained."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_completion_length=rollout.max_completion_length,
        stop=tuple(rollout.stop),
    )


def make_policy(context: RunContext, model: Any, tokenizer: Any) -> Policy:
    """The policy of a run, before its reference and critic are made."""
    config = context.config
    try:
        return Policy(
            model,
            params=sampling_params(config),
            tokenizer=tokenizer,
            autocast=context.autocast,
            packing=config.train.packing,
            router_aux_loss_coef=config.train.router_aux_loss_coef,
            exact_on_policy=config.train.exact_on_policy,
        )
    except ValueError as error:
        if not config.train.exact_on_policy:
            raise
        raise ConfigError(str(error)) from None


def make_scorer(
    config: Config,
    reward_funcs: Any,
    rows: Sequence[Mapping[str, Any]],
    processing_classes: Any = None,
    *,
    toolbox: Toolbox | None = None,
) -> Scorer:
    """The reward functions given, else those of the config or the task; each finds its columns in `rows` and can grade
    every one of them.

    processing_classes: tokenizers of reward models, as TRL pairs them; those are loaded with the first completions, or
    by `place_reward_models`. toolbox: tools of the run, whose environments the functions may read.
    """
    settings = config.reward
    if reward_funcs is None or (
        isinstance(reward_funcs, (list, tuple)) and not reward_funcs and has_no_rewards(config)
    ):
        funcs = task_rewards(config)
    elif config.rollout.environment is not None:
        raise ConfigError("reward_funcs are given and rollout.environment names what gives the rewards; give one.")
    else:
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    specs, weights = with_processing_classes(funcs, processing_classes, config.data.chat_template_kwargs), None
    if toolbox is not None:
        specs = [read_here(function) for function in resolve_all(specs)] if toolbox.environments else specs
        if toolbox.rewards:
            weights = [*(settings.reward_weights or [1.0] * len(specs)), *[1.0] * len(toolbox.rewards)]
            specs = [*specs, *toolbox.rewards]
    scorer = Scorer(
        specs,
        weights or settings.reward_weights,
        workers=settings.reward_workers,
        deadline=settings.reward_timeout,
        in_process=settings.reward_in_process,
        # A turn of few episodes may fail in all of them; episodes are counted over the batch.
        max_unscorable=settings.max_unscorable if config.rollout.environment is None else 1.0,
        strict=settings.strict,
        clip_range=settings.reward_clip_range,
    )
    scorer.check_columns(sorted([*rows[0], ENVIRONMENTS] if toolbox is not None and toolbox.environments else rows[0]))
    column = config.algorithm.baseline_column
    if column is not None and column not in rows[0]:
        present = sorted(rows[0])
        raise ConfigError(
            f"baseline_column is {column!r}, and the data have no such column.{nearest(column, present)} Present: "
            f"{', '.join(present)}."
        )
    scorer.check_rows(rows)
    decides, known = config.eval.pass_reward, [function.name for function in scorer.functions]
    if decides is not None and decides.split("/")[0] not in known:  # the word after the slash is a part of its answer
        raise ConfigError(f"eval.pass_reward cannot be {decides!r}; {choices(decides, known)}")
    return scorer


def place_reward_models(scorer: Scorer, device: torch.device) -> None:
    """Loads the reward models of a scorer onto a device. Raises ConfigError where one is none."""
    try:
        scorer.place_models(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_collector(
    config: Config, model: Any, tokenizer: Any, scorer: Scorer, *, gamma: float = 1.0, toolbox: Toolbox | None = None
) -> Collector:
    """Sampler and scorer as one, outside a run."""
    engine = make_sampler(config, model, tokenizer)
    return collector_of(config, engine, model, tokenizer, scorer, device=model.device, gamma=gamma, toolbox=toolbox)


def collector_of(
    config: Config,
    engine: SamplingEngine,
    model: Any,
    tokenizer: Any,
    scorer: Scorer,
    *,
    device: torch.device,
    gamma: float,
    toolbox: Toolbox | None = None,
) -> Collector:
    """Sampler and scorer as one: single completions, or episodes where the config names an environment or tools."""
    params, seed, rollout = sampling_params(config), config.run.seed, config.rollout
    ends = end_token_ids(model, tokenizer)
    reader = make_reader(config, tokenizer, ends, scorer.functions)
    if rollout.environment is None and toolbox is None:
        dual_scoring = make_dual_scoring(config, scorer.functions)
        return Collector(
            engine, scorer, tokenizer, params, seed=seed, gamma=gamma, dual_scoring=dual_scoring, reader=reader
        )
    limits = EpisodeLimits(rollout.max_turns, rollout.max_completion_length, rollout.max_turn_length)
    common: dict[str, Any] = {
        "seed": seed,
        "gamma": gamma,
        "max_unscorable": config.reward.max_unscorable,
        "device": device,
        "reader": reader,
    }
    if toolbox is not None:
        if rollout.max_tool_calling_iterations is not None:
            limits = replace(limits, max_turns=rollout.max_tool_calling_iterations + 1)
        partner = make_partner(config, toolbox, tokenizer, ends)
        return ToolCollector(engine, scorer, tokenizer, params, partner=partner, limits=limits, **common)
    environment = EnvironmentPartner(scorer, TurnWriter(tokenizer, ends, config.data.chat_template_kwargs))
    return EpisodeCollector(engine, scorer, tokenizer, params, partner=environment, limits=limits, **common)


def read_here(function: RewardFunction) -> RewardFunction:
    """The same function in this process, where it reads the objects that tools belong to: no worker has them."""
    takes = function.signature
    if function.target is None or not (takes.takes_any or ENVIRONMENTS in (*takes.required, *takes.optional)):
        return function
    return replace(function, target=None, function=function.loaded(), reason="it reads environments")
