"""What a run measures: the table of names and units, the local JSONL (the truth), and the phases' seconds."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# name -> (unit, meaning). A name that ends in "/" stands for all names that begin with it.
METRICS: dict[str, tuple[str, str]] = {
    "step": ("steps", "Batches of rollouts trained on so far."),
    "reward": ("reward", "Mean reward of the scorable completions, before any KL penalty."),
    "reward_std": ("reward", "Standard deviation of the same."),
    "reward/": ("reward", "Mean of one reward function, unweighted."),
    "log/": ("", "What reward functions reported through log_metric."),
    "unscorable": ("share", "Completions that could not be scored; they carry no gradient."),
    "failed/": (
        "completions",
        "Of all that were sampled, those that this reward function failed on (raised, NaN, late, died); absent at 0.",
    ),
    "uniform_groups": ("share", "Groups whose scorable rewards are all equal: no signal under a group baseline."),
    "refill_rounds": ("rounds", "Rounds of further prompts that dynamic sampling took in this step."),
    "groups_dropped": ("groups", "Groups that were sampled and not trained on, by dynamic sampling."),
    "sampled_reward": (
        "reward",
        "Mean reward of the step's own prompts where dynamic sampling replaced some; that of the batch is then biased.",
    ),
    "prompts_tried": ("share", "Training prompts that a curriculum has met so far."),
    "prompt_pass_rate": ("share", "Mean of the running pass rates of those."),
    "staleness": ("updates", "Age of the completions: updates since the weights that they were sampled with."),
    "steps": ("steps", "Classic control: environment steps so far, of all rows; its curves are drawn over them."),
    "episodes": ("episodes", "Classic control: episodes that have ended so far."),
    "return_mean": ("reward", "Mean return of the last episodes (`window` of them), as the environment pays it."),
    "return_std": ("reward", "Standard deviation of the same."),
    "true_return_mean": ("reward", "The same of the true reward, where the environment's own is only a proxy of it."),
    "progress": ("share", "Classic control: how much of the run is over, by steps or episodes."),
    "completion_length": ("tokens", "Mean length, the end token included."),
    "truncated": ("share", "Completions that hit max_completion_length."),
    "kl": ("nats/token", "Mean KL to the reference (k3), where there is one."),
    "entropy": ("nats/token", "Mean entropy of the sampled distribution at completion tokens."),
    "clip_fraction": ("share", "Tokens whose ratio was clipped."),
    "approx_kl": (
        "nats/token",
        "Mean KL between the policy before the batch and the one in training (0 in its first pass).",
    ),
    "kl_penalty": ("", "Weight of the adaptive penalty that keeps updates to kl_target."),
    "off_policy_masked": ("share", "Tokens of completions dropped by off_policy_mask_threshold."),
    "correction_bounded": ("share", "Tokens whose correction for the sampler was truncated or masked."),
    "sampler_gap": (
        "nats/token",
        "Mean |log-probability of the sampler - of the trainer|; at the same weights where staleness is 0.",
    ),
    "policy_loss": ("", "The surrogate; its value says little, its gradient is what counts."),
    "value_loss": ("reward²", "Of the critic."),
    "aux_loss": (
        "",
        "Load-balancing loss of a mixture of experts, without its coefficient; the number of experts of a token where "
        "all are used alike.",
    ),
    "explained_variance": (
        "share",
        "1 - Var[return - value] / Var[return] over tokens, values of before the step; absent where returns are equal.",
    ),
    "critic_grad_norm": ("", "Norm of the critic's gradient before clipping, which is its own."),
    "grad_norm": ("", "Norm of the gradient before clipping."),
    "gradient_signal": (
        "",
        "Squared length of the expected gradient, from two halves of a step; average it.",
    ),
    "gradient_noise": (
        "",
        "Variance of one group's gradient; over the signal it is the simple noise scale.",
    ),
    "learning_rate": ("", "Of this step."),
    "entropy_coef": ("", "Weight of the entropy bonus in this step."),
    "skipped_updates": ("steps", "Optimiser steps skipped because loss or gradient was not finite."),
    "oom_splits": ("", "Times that a micro-batch did not fit into memory and was halved; absent where none was."),
    "tokens": ("tokens", "Completion tokens sampled."),
    "tokens_per_second": ("tokens/s", "Of the sampling phase."),
    "train_tokens_per_second": (
        "tokens/s",
        "Of the update phase, each distinct prompt and each completion token once, less rows of weight 0.",
    ),
    "mfu": ("share", "Model FLOPs of the update over its seconds and the machine's measured matrix products."),
    "memory": ("MB", "Peak memory of this process so far (of the accelerator where there is one)."),
    "seconds": ("s", "The whole step."),
    "seconds/": (
        "s",
        "One phase of it: sample, reward, reference, value, update, eval; save is that of the step before. With "
        "max_staleness sample and reward of the batch went on in the background; wait is for what was left of them.",
    ),
    "eval/": (
        "share",
        "Held out: greedy, sampled, pass@k (unbiased), with 95 % intervals; strict (the answer in its form) and "
        "lenient (in any form); reward and sampled_reward, the mean rewards; highest_score, of those that decide a "
        "pass; length in tokens.",
    ),
}


def described(name: str) -> bool:
    return name in METRICS or any(name.startswith(prefix) for prefix in METRICS if prefix.endswith("/"))


class Clock:
    """Seconds by phase, in total and since the last `lap`.

    Args:
        watch: called with (phase, True) where a phase begins and (phase, False) where it ends.
        seconds: by phase, of before.
    """

    def __init__(
        self, watch: Callable[[str, bool], None] | None = None, seconds: dict[str, float] | None = None
    ) -> None:
        self.seconds = dict(seconds or {})
        self.watch = watch
        self._lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.watch is not None:
            self.watch(phase, True)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add({phase: time.perf_counter() - begin})
            if self.watch is not None:
                self.watch(phase, False)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase that were measured elsewhere."""
        for phase, more in seconds.items():
            for total in (self.seconds, self._lap):
                total[phase] = total.get(phase, 0.0) + more

    def state_dict(self) -> dict[str, float]:
        """The totals, for a checkpoint."""
        return dict(self.seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Add the totals of the process that this one goes on from."""
        self.add(state)

    def lap(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call of `lap`, and begins a new lap."""
        lap, self._lap = self._lap, {}
        return lap


def as_line(values: dict[str, Any]) -> str:
    """One JSON object. Not-a-number is written as null with its name under "nan"."""
    nan = [name for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    clean = {name: None if name in nan else v for name, v in values.items()}
    return json.dumps({**clean, "nan": nan} if nan else clean)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, as `as_line` writes it."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        if resume_step is None:
            path.write_text("")
        else:
            self._cut_after(resume_step)

    def _cut_after(self, step: int) -> None:
        """Drop the lines of steps that are going to be done again, and a half-written last line."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        # Beside it first: a kill in the middle must not lose the lines that are there.
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(self.path)

    def write(self, values: dict[str, Any]) -> None:
        unknown = [name for name in values if not described(name)]
        assert not unknown, f"metrics without a line in the table: {unknown}"
        with self.path.open("a") as file:
            file.write(as_line(values) + "\n")


def sync(path: Path) -> None:
    """Bring a file onto the disk: a checkpoint must not outlive the lines of its steps."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak_memory_mb() -> float:
    """Peak resident set of this process in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, one a step, in their order; names and units are those of `METRICS`."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
