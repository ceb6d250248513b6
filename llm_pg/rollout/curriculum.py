"""Which prompts a step trains on, chosen by how often each was passed so far.

A prompt that is always passed, or never, teaches a group baseline nothing: the variance of its verdicts, p(1-p), is 0,
and with it the gradient. The stream draws a step's prompts without replacement with weights 4·p̂(1-p̂) + floor.

p̂ = (passes + 1) / (tries + 2), from counts that fade by `memory` at each visit; an unseen prompt has p̂ = 1/2, and so
the largest weight: what is unknown is tried first. The floor keeps every prompt in play, as p̂ is of an older policy.

The objective is then the mean over prompts in proportion to these weights, which move with the policy: biased as an
estimate of the gradient of the mean over all prompts, on purpose. Held-out prompts are never drawn by it.

Source: the sampling by learnability p(1-p) of Foster et al. 2025 (arXiv 2502.12272) and of Rutherford et al. 2024
(arXiv 2408.15099); departures: running estimates instead of extra rollouts, and a floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError
from ..prompts import Prompt, Prompts
from ..sampling.random import stream_key, uniform
from .experience import Experience

_STREAM = 5


class CurriculumStream(Prompts):
    """A prompt stream that learns from the verdicts of its prompts. Its state is one pair of counts a prompt.

    The prompts of a step are a function of (seed, step, state at its beginning): the keys -log(u_i)/w_i of all prompts
    are sorted, u_i a hash of (seed, step, i), and the first n taken (an exponential race, which draws without
    replacement in proportion to w). Refills take those that follow.

    Args:
        floor: weight of a prompt without any variance; the largest weight is 1 + floor.
        memory: share of a prompt's counts that is kept when it is tried again, in [0, 1). Others: see `Prompts`.
    """

    learns = True

    def __init__(
        self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int, *, floor: float = 0.05, memory: float = 0.8
    ) -> None:
        super().__init__(prompts, per_step=prompts_per_step, seed=seed)
        self.floor, self.memory = floor, memory
        self.passes_N = torch.zeros(len(prompts), dtype=torch.float64)
        self.tries_N = torch.zeros(len(prompts), dtype=torch.float64)
        self._place = {prompt.index: place for place, prompt in enumerate(prompts)}
        self._ordered: tuple[int, list[int]] | None = None

    def pass_rates(self) -> Tensor:
        """p̂ of each prompt, (N,)."""
        return (self.passes_N + 1) / (self.tries_N + 2)

    def weights(self) -> Tensor:
        """In proportion to which prompts are drawn, (N,)."""
        rate_N = self.pass_rates()
        return 4 * rate_N * (1 - rate_N) + self.floor

    def observe(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        for index, passes, tries in attempts:
            if tries:
                place = self._place[index]
                self.passes_N[place] = self.memory * self.passes_N[place] + passes
                self.tries_N[place] = self.memory * self.tries_N[place] + tries
        self._ordered = None

    def metrics(self) -> dict[str, float]:
        tried_N = self.tries_N > 0
        out = {"prompts_tried": float(tried_N.double().mean())}
        return {**out, "prompt_pass_rate": float(self.pass_rates()[tried_N].mean())} if tried_N.any() else out

    def state_dict(self) -> dict[str, Any]:
        tried = self.tries_N.nonzero().squeeze(1)
        return {
            "places": tried.tolist(),
            "passes": self.passes_N[tried].tolist(),
            "tries": self.tries_N[tried].tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # of a run without a curriculum, gone on from all the same
            return
        places = torch.tensor(state["places"], dtype=torch.int64)
        for counts_N, name in ((self.passes_N, "passes"), (self.tries_N, "tries")):
            counts_N.zero_()[places] = torch.tensor(state[name], dtype=torch.float64)
        self._ordered = None

    def _taken(self, step: int) -> list[int]:
        return self._race(step)[: self.prompts_per_step]

    def _queue(self, step: int, length: int) -> list[int]:
        return self._race(step)[self.prompts_per_step :][:length]

    def _race(self, step: int) -> list[int]:
        if self._ordered is None or self._ordered[0] != step:
            u_N = uniform(stream_key(self.seed, _STREAM, step), torch.arange(len(self.prompts)))
            finish_N = -torch.log1p(-u_N) / self.weights()
            self._ordered = step, torch.argsort(finish_N, stable=True).tolist()
        return self._ordered[1]


def make_stream(config: Config, prompts: Sequence[Prompt], prompts_per_step: int) -> Prompts:
    """The stream of the config: every prompt once an epoch, or by what is learned of them."""
    data, seed = config.data, config.run.seed
    if data.curriculum == "none":
        return Prompts(prompts, per_step=prompts_per_step, seed=seed, shuffle=data.shuffle_dataset)
    return CurriculumStream(prompts, prompts_per_step, seed, floor=data.curriculum_floor, memory=data.curriculum_memory)


def attempts(experience: Experience, pass_reward: str | None, threshold: float) -> list[tuple[int, int, int]]:
    """(index of the prompt, passes, scorable completions) of all groups sampled, dropped ones too.

    pass_reward, threshold: what decides a pass; None = the first reward function, as in an evaluation.
    """
    reported = []
    for part in experience.collected or [experience]:
        name = pass_reward or next(iter(part.scores.parts))
        if name not in part.scores.parts:
            raise ConfigError(
                f"eval.pass_reward is {name!r}, which is none of the reward functions: {', '.join(part.scores.parts)}."
            )
        verdicts = part.scores.parts[name]
        for group, prompt in enumerate(part.prompts):
            of_group = verdicts[group * part.num_generations :][: part.num_generations]
            known = [value for value in of_group if value is not None and not math.isnan(value)]
            reported.append((prompt.index, sum(value >= threshold for value in known), len(known)))
    return reported
