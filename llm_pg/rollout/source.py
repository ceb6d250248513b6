"""Where the rollouts of a step come from: sampled now, with silent groups replaced, or ahead of their step.

Each source wraps another; none inherits. `collect(step)` is all that a loop needs.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor

from ..algorithms.spec import AlgorithmSpec
from ..metrics import Clock
from ..prompts import Prompt, Prompts
from .collector import Collector
from .experience import Experience
from .refill import refill


class RolloutSource(Protocol):
    """Step -> scored rollouts."""

    def collect(self, step: int) -> Experience:
        """Returns the scored completions that step `step` (from 1) trains on."""


class Batches(Protocol):
    """What can be asked for any batch, also beside the update of another: it reads nothing that changes."""

    def batch(self, step: int, prompts: list[Prompt], clock: Clock) -> Experience:
        """Returns scored completions of these prompts. clock: adds up the seconds of its phases."""


class DirectSource:
    """Samples and scores the prompts of a step when they are asked for.

    Args:
        collector: sampler and reward functions. prompts: of the run.
        num_generations: completions of each prompt.
        share: the places, among the prompts of a step on all ranks, that this rank samples; None = all.
        greedy: whether each prompt's greedy completion is scored too, for the baseline of that name.
        clock: seconds by phase.
    """

    def __init__(
        self,
        collector: Collector,
        prompts: Prompts,
        num_generations: int,
        *,
        share: range | None = None,
        greedy: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.collector, self.prompts, self.num_generations = collector, prompts, num_generations
        self.share = range(prompts.prompts_per_step) if share is None else share
        self.greedy, self.clock = greedy, clock or Clock()

    def prompts_of(self, step: int) -> list[Prompt]:
        """This rank's prompts of a step, in order."""
        return self.prompts.take(step - 1)[self.share.start : self.share.stop]

    def collect(self, step: int) -> Experience:
        return self.batch(step, self.prompts_of(step), self.clock)

    def batch(self, step: int, prompts: list[Prompt], clock: Clock) -> Experience:
        group, first = self.num_generations, self.share.start
        whole = len(self.share) == self.prompts.prompts_per_step
        with contextlib.nullcontext() if whole else self.collector.part_of_a_step():
            return self.collector.collect(prompts, step, group, clock, first, greedy=self.greedy)


class DynamicSampling:
    """Replaces groups that say nothing by groups of further prompts; see `refill`.

    Args:
        source: gives the step's own groups. rounds: the budget. spec: of the algorithm, which says what is silent.
    """

    def __init__(self, source: DirectSource, rounds: int, spec: AlgorithmSpec) -> None:
        self.source, self.rounds = source, rounds
        self.truncation_penalty = spec.truncation_penalty if spec.truncated == "penalize" else 0.0
        self.to_go = spec.returns == "reward_to_go" and spec.advantage is None

    def collect(self, step: int) -> Experience:
        return self.batch(step, self.source.prompts_of(step), self.source.clock)

    def batch(self, step: int, prompts: list[Prompt], clock: Clock) -> Experience:
        source = self.source
        collector, each = source.collector, len(prompts)

        def again(further: list[Prompt], places_P: Tensor) -> Experience:
            with collector.part_of_a_step(len(further) / each):
                return collector.collect(further, step, source.num_generations, clock, places_P)

        return refill(
            source.batch(step, prompts, clock),
            again,
            lambda number: source.prompts.further(step - 1, number),
            source.share.start + torch.arange(each),
            rounds=self.rounds,
            truncation_penalty=self.truncation_penalty,
            to_go=self.to_go,
        )
