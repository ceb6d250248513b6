"""Engines that keep weights of their own: those of several versions of the policy, by number."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ...config import ConfigError
from ...config.engines import capabilities_of
from ...sampling.protocol import Completions, SamplingEngine, SamplingParams
from .sampler_process import SamplerProcess


class Engine(SamplingEngine, contextlib.AbstractContextManager[Any], Protocol):
    """A sampler that samples with the weights of a version that was kept. `keep` and `use_present` are called by the
    trainer, the others in the background; `use_present` while nothing is sampled there."""

    def keep(self, version: int) -> None:
        """Copy the present weights as those of `version`, which rises."""

    def use(self, version: int) -> None:
        """Sample with those of `version` from now on."""

    def use_present(self) -> None:
        """Let the run's own sampler have the present weights, for an evaluation."""

    def stop(self) -> None:
        """Cut short what is being sampled, where that can be done. Called by the trainer."""


class Frozen:
    """An engine whose attribute `model` is a copy of the model in training, which has the weights of one version.

    Args:
        sampler: of the run; from now on it follows the copy. count: versions that are kept.
    """

    def __init__(self, sampler: Any, count: int) -> None:
        self.sampler, self.live, self.count = sampler, sampler.model, count
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __enter__(self) -> Frozen:
        self.sampler.model = copy.deepcopy(self.live).requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self.sampler.model = self.live

    def keep(self, version: int) -> None:
        self._kept[version % self.count] = {name: x.detach().clone() for name, x in self._moving()}

    def use(self, version: int) -> None:
        self._copy(self._kept[version % self.count])

    def use_present(self) -> None:
        self._copy(dict(self._moving()))

    def stop(self) -> None:
        """A server ends its batch."""

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        done: Completions = self.sampler.sample(prompt_ids, num_generations, params, keys_B)
        return done

    def _moving(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in self.live.named_parameters() if x.requires_grad]

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        parameters = dict(self.sampler.model.named_parameters())
        for name, value in values.items():
            parameters[name].copy_(value)


def make_engine(sampler: SamplingEngine, model: Any, tokenizer: Any, *, max_staleness: int, log: Path) -> Engine:
    """For the run's own `sampler`. A version is needed until all that was sampled with it is trained on, and the
    next is kept before that: hence one slot more than the staleness."""
    count = max_staleness + 1
    how, given = capabilities_of(sampler).older_weights, cast(Any, sampler)
    if how == "copy":
        return Frozen(given, count)
    if how == "process":
        rows = given.rows_at_once
        return SamplerProcess(model, tokenizer, given.eos_ids, rows, count=count, log=log, dtype=given.dtype)
    raise ConfigError(
        f"rollout.max_staleness is {max_staleness}, and {type(sampler).__name__} keeps no older weights to sample "
        "with. Use rollout.max_staleness=0, or engine native or vllm."
    )
