"""The source of a run's rollouts: what its config asks for, around one another, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ..algorithms.algorithm import Algorithm
from ..config import Config
from ..model.policy import Policy
from ..prompts import Prompts
from ..rewards.tally import RewardError
from ..rollout.ahead.engines import make_engine
from ..rollout.ahead.loop import Ahead
from ..rollout.ahead.resharding import of_all
from ..rollout.collector import Collector
from ..rollout.curriculum import attempts
from ..rollout.experience import Experience
from ..rollout.source import DirectSource, DynamicSampling, RolloutSource
from .context import RunContext
from .guard import RunStopped
from .ranks import Ranks

InFlight = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


class AllRanks:
    """A source on every rank: a batch on each, or an error on each.

    Whole weights are on every rank while a batch is collected: to sample with, or to be copied for whoever samples
    ahead. The curriculum is given the verdicts of all ranks.

    Args:
        source: of this rank. algorithm: checks what rewards mean to it. config: what decides a pass, and how many
            completions may be without a score.
    """

    def __init__(
        self,
        source: RolloutSource,
        policy: Policy,
        algorithm: Algorithm,
        prompts: Prompts,
        ranks: Ranks,
        config: Config,
    ) -> None:
        self.source, self.policy, self.algorithm = source, policy, algorithm
        self.prompts, self.ranks, self.settings = prompts, ranks, config.eval
        self.max_unscorable = config.reward.max_unscorable

    @property
    def ahead(self) -> Ahead | None:
        """What samples ahead; None where batches are sampled at their step."""
        return self.source if isinstance(self.source, Ahead) else None

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block nothing is sampled or scored in the background."""
        return contextlib.nullcontext() if self.ahead is None else self.ahead.paused()

    def collect(self, step: int) -> Experience:
        """Raises RunStopped on the ranks that could go on where another could not."""
        with self.policy.gathered():
            experience = self.ranks.together(lambda: self._own(step))
        self._check_scored(step, experience)
        self._check_ages(step, experience)
        if self.prompts.learns:
            own = attempts(experience, self.settings.pass_reward, self.settings.pass_threshold)
            self.prompts.observe([each for of_rank in self.ranks.gather(own) for each in of_rank])
        return experience

    def _own(self, step: int) -> Experience:
        experience = self.source.collect(step)
        self.algorithm.check_rewards(experience.rollouts)
        return experience

    def _check_scored(self, step: int, experience: Experience) -> None:
        """RewardError, on every rank, where no completion of any rank has a score: with one rank the scorer says so."""
        if self.ranks.count == 1 or self.max_unscorable >= 1:
            return
        if not self.ranks.any_of([bool(experience.rollouts.on_host("valid_B").any())])[0]:
            raise RewardError(
                f"No completion of step {step} has a score, on any of {self.ranks.count} ranks: every reward function "
                f"returned None or failed, which is over the limit max_unscorable={self.max_unscorable:g}. Let one "
                "function apply to some rows of every step."
            )

    def _check_ages(self, step: int, experience: Experience) -> None:
        ages = self.ranks.gather(experience.staleness) if self.ahead is not None else []
        if len(set(ages)) > 1:
            raise RunStopped(
                f"At step {step} the ranks hold completions of different ages ({', '.join(map(str, ages))} "
                "updates, rank by rank), so that one gradient would be of two policies. Let all machines see one "
                "run.output_dir; --resume goes on from the newest checkpoint there."
            )


def make_source(context: RunContext, collector: Collector, prompts: Prompts) -> DirectSource | DynamicSampling:
    """This rank's source of batches that are sampled at their step."""
    spec, plan, ranks = context.spec, context.plan, context.ranks
    source = DirectSource(
        collector,
        prompts,
        plan.num_generations,
        share=plan.share(ranks.number, ranks.count),
        greedy=spec.baseline == "greedy",
        clock=context.clock,
    )
    rounds = context.config.algorithm.dynamic_sampling_max_rounds
    return DynamicSampling(source, rounds, spec) if rounds else source


def make_ahead(context: RunContext, policy: Policy, collector: Collector, prompts: Prompts) -> Ahead:
    """A source whose batches are sampled in the background. Every rank has an engine of its own for this, and samples
    its own prompts. It is a context manager: enter it, then `put_back` what a checkpoint held."""
    config, ranks = context.config, context.ranks
    rank = f"-rank{ranks.number}" if ranks.count > 1 else ""
    log, staleness = context.folder.path / f"ahead{rank}.log", config.rollout.max_staleness
    engine = make_engine(collector.engine, policy.model, collector.tokenizer, max_staleness=staleness, log=log)
    source = make_source(context, collector.with_engine(engine), prompts)
    direct = source.source if isinstance(source, DynamicSampling) else source
    steps = config.train.max_steps
    return Ahead(engine, source, direct.prompts_of, max_staleness=staleness, last=steps, clock=context.clock)


def put_back(context: RunContext, ahead: Ahead, landed: InFlight, prompts: Prompts, collector: Collector) -> None:
    """The batches in flight of the checkpoint that was restored. landed: `Checkpointer.landed`."""
    by_index = {prompt.index: prompt for prompt in prompts.prompts}
    place = context.ranks.number, context.ranks.count
    batches, tensors = landed
    ahead.restore(batches, tensors, by_index, collector.sampler.pieces, context.accelerator.device, place)


def in_flight(ahead: Ahead, ranks: Ranks) -> Callable[[int], InFlight]:
    """What all ranks hold of the batches after a step, for a checkpoint. All ranks must call it."""
    return lambda step: of_all(ranks.gather(ahead.state(step)))
