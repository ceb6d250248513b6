"""What a step trains on: its prompts, and the scored completions of them, sampled now or ahead of their step."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from ..ahead.engines import make_engine
from ..ahead.loop import Ahead
from ..ahead.shares import of_all
from ..collect.collector import Collector, Experience
from ..collect.curriculum import attempts
from ..collect.refill import refill
from ..metrics import Clock
from ..prompts import Prompt
from .guard import RunStopped
from .parts import Parts
from .resume import Saver


class Gathering(Parts):
    """See `trainer.PolicyGradientTrainer`, which makes these when a run begins."""

    saver: Saver
    optimizer: Any
    ahead_open: contextlib.ExitStack
    ahead: Ahead | None = None

    def _gather_experience(self, clock: Clock) -> Experience:
        """The step's batch on every rank, or an error on every rank. Whole weights stand here while it lasts: to sample
        with, or to be copied for whoever samples ahead."""
        with self.policy.gathered():
            experience = self.ranks.together(lambda: self._experience(clock))
        ages = self.ranks.gather(experience.staleness) if self.ahead is not None else []
        if len(set(ages)) > 1:
            raise RunStopped(
                f"At step {self.step} the ranks hold completions of different ages ({', '.join(map(str, ages))} "
                "updates, rank by rank), so that one gradient would be of two policies. Let all machines see one "
                "run.output_dir; --resume goes on from the newest checkpoint there."
            )
        return experience

    def _experience(self, clock: Clock) -> Experience:
        """The step's batch: sampled now, or ahead of its step."""
        # The last step's gradients are dead weight while keys and values are held.
        self.optimizer.zero_grad(set_to_none=True)
        if self.ahead is not None:
            self.ahead.begin(self.step)
            return self.ahead.take(self.step, clock)
        return self._collect(self.collector, self.step, self._prompts(self.step), clock)

    def _make_ahead(self) -> Ahead:
        """Batches sampled in the background, those of the checkpoint restored included. Every rank has an engine of
        its own for this, and samples its own prompts."""
        config, collector = self.config, copy.copy(self.collector)
        rank = f"-rank{self.ranks.number}" if self.ranks.count > 1 else ""
        log, staleness = self.folder.path / f"ahead{rank}.log", config.rollout.max_staleness
        collector.sampler = engine = make_engine(
            self.collector.sampler, self.model, self.tokenizer, max_staleness=staleness, log=log
        )
        ahead = Ahead(
            engine,
            lambda step, prompts, clock: self._collect(collector, step, prompts, clock),
            self._prompts,
            max_staleness=staleness,
            last=config.train.max_steps,
        )
        self.ahead_open.enter_context(ahead)
        by_index = {prompt.index: prompt for prompt in self.train_prompts}
        place = self.ranks.number, self.ranks.count
        ahead.restore(*self.saver.landed, by_index, collector.pieces, self.accelerator.device, place)
        self.saver.in_flight = lambda step: of_all(self.ranks.gather(ahead.state(step)))
        return ahead

    def _collect(self, collector: Collector, step: int, prompts: list[Prompt], clock: Clock) -> Experience:
        """Batch `step`. Where it is sampled ahead this runs beside the update: it reads nothing that changes."""
        greedy, first = self.row.baseline == "greedy", self._first_place
        experience = collector.collect(prompts, step, self.plan.num_generations, clock, first, greedy=greedy)
        if self.config.algorithm.dynamic_sampling_max_rounds:
            experience = self._refill(experience, collector, step, clock)
        self.algorithm.check_rewards(experience.rollouts)
        return experience

    def _refill(self, experience: Experience, collector: Collector, step: int, clock: Clock) -> Experience:
        """Its silent groups replaced; see `refill`."""
        each, scorer = len(experience.prompts), self.scorer

        def again(prompts: list[Prompt], places_P: Tensor) -> Experience:
            scorer.share = len(prompts) / each
            try:
                return collector.collect(prompts, step, self.plan.num_generations, clock, places_P)
            finally:
                scorer.share = 1.0

        return refill(
            experience,
            again,
            lambda number: self.stream.further(step - 1, number),
            self._first_place + torch.arange(each),
            rounds=self.config.algorithm.dynamic_sampling_max_rounds,
            truncation_penalty=self.row.truncation_penalty if self.row.truncated == "penalise" else 0.0,
            to_go=self.row.returns == "reward_to_go" and self.row.advantage is None,
        )

    @property
    def _first_place(self) -> int:
        """The place of this rank's first prompt among those of a step on all ranks."""
        return self.plan.share(self.ranks.number, self.ranks.count).start

    def _prompts(self, step: int) -> list[Prompt]:
        """This rank's prompts of a step, whole groups in order."""
        own = self.plan.share(self.ranks.number, self.ranks.count)
        return self.stream.take(step - 1)[own.start : own.stop]

    def _learn_of_prompts(self, experience: Experience) -> dict[str, float]:
        """The curriculum hears of the verdicts on all ranks."""
        if not self.stream.learns:
            return {}
        settings = self.config.eval
        own = attempts(experience, settings.pass_reward, settings.pass_threshold)
        self.stream.observe([each for told in self.ranks.gather(own) for each in told])
        return self.stream.metrics()
