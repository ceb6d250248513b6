"""What a run measures: the table of names and units, the local JSONL (the truth), and the phases' seconds."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

log = logging.getLogger("llm_pg.phases")

Minibatches = Literal["mean", "sum", "sum of seen tokens"]
AcrossRanks = Literal["mean", "mean of scored", "mean of ended", "mean of tokens", "sum", "max", "min", "deviation"]


class Metric(NamedTuple):
    """One thing that a run measures.

    Attributes:
        unit: as it is printed; "" = none.
        meaning: one or two sentences.
        minibatches: how the values of the optimiser steps of one batch become one. mean: over the steps. sum: each is
            a sum over its minibatch with the denominator of the batch, so those of a pass add up, and passes are
            averaged. sum of seen tokens: the same, over the tokens of rows that had a forward pass.
        ranks: how the values of the ranks become one: mean by completions, by scored ones, by those that ended or by
            tokens; sum, where the denominator is already that of all ranks; max; min, without a rank that has 0;
            deviation of all rewards together.
    """

    unit: str
    meaning: str
    minibatches: Minibatches = "mean"
    ranks: AcrossRanks = "mean"


# A name that ends in "/" is for all names that begin with it.
METRICS: dict[str, Metric] = {
    "step": Metric("steps", "Batches of rollouts trained on so far."),
    "reward": Metric(
        "reward",
        "Mean reward of the scorable completions, before any KL penalty.",
        ranks="mean of scored",
    ),
    "reward_std": Metric("reward", "Standard deviation of the same.", ranks="deviation"),
    "reward/": Metric("reward", "Mean of one reward function, unweighted.", ranks="mean of scored"),
    "rewards/": Metric(
        "reward", "`<function>/std`: standard deviation of one reward function, unweighted.", ranks="deviation"
    ),
    "log/": Metric("", "What reward functions reported through log_metric."),
    "unscorable": Metric("share", "Completions that could not be scored; they carry no gradient."),
    "failed/": Metric(
        "completions",
        "Of all that were sampled, those that this reward function failed on (raised, NaN, late, died); absent at 0.",
        ranks="sum",
    ),
    "uniform_groups": Metric("share", "Groups whose scorable rewards are all equal: no signal under a group baseline."),
    "refill_rounds": Metric(
        "rounds",
        "Rounds of further prompts that dynamic sampling took in this step.",
        ranks="max",
    ),
    "groups_dropped": Metric(
        "groups",
        "Groups that were sampled and not trained on, by dynamic sampling.",
        ranks="sum",
    ),
    "sampled_reward": Metric(
        "reward",
        "Mean reward of the step's own prompts where dynamic sampling replaced some; that of the batch is then biased.",
    ),
    "prompts_tried": Metric("share", "Training prompts that a curriculum has met so far."),
    "prompt_pass_rate": Metric("share", "Mean of the running pass rates of those."),
    "staleness": Metric("updates", "Age of the completions: updates since the weights that they were sampled with."),
    "steps": Metric("steps", "Classic control: environment steps so far, of all rows; its curves are drawn over them."),
    "episodes": Metric("episodes", "Classic control: episodes that have ended so far."),
    "return_mean": Metric("reward", "Mean return of the last episodes (`window` of them), as the environment pays it."),
    "return_std": Metric("reward", "Standard deviation of the same."),
    "true_return_mean": Metric(
        "reward",
        "The same of the true reward, where the environment's own is only a proxy of it.",
    ),
    "progress": Metric("share", "Classic control: how much of the run is over, by steps or episodes."),
    "completion_length": Metric("tokens", "Mean length, the end token included."),
    "completions/min_length": Metric("tokens", "Of the shortest completion.", ranks="min"),
    "completions/max_length": Metric("tokens", "Of the longest.", ranks="max"),
    "completions/mean_terminated_length": Metric(
        "tokens", "Mean over those that ended by themselves; 0 where none did.", ranks="mean of ended"
    ),
    "completions/min_terminated_length": Metric("tokens", "Of the shortest of those.", ranks="min"),
    "completions/max_terminated_length": Metric("tokens", "Of the longest of those.", ranks="max"),
    "truncated": Metric("share", "Completions that hit max_completion_length."),
    "kl": Metric("nats/token", "Mean KL to the reference (k3), where there is one.", ranks="mean of tokens"),
    "teacher_kl": Metric(
        "nats/token",
        "KL to the teacher: mean of log π - log π_teacher of the sampled tokens (k1, which chance can push below 0).",
        ranks="mean of tokens",
    ),
    "entropy": Metric(
        "nats/token",
        "Mean entropy of the sampled distribution at completion tokens.",
        minibatches="sum of seen tokens",
        ranks="sum",
    ),
    "clip_fraction": Metric("share", "Tokens whose ratio was clipped.", minibatches="sum", ranks="sum"),
    "clip_ratio/low_mean": Metric(
        "share", "Tokens whose ratio was clipped and whose advantage is below 0.", minibatches="sum", ranks="sum"
    ),
    "clip_ratio/high_mean": Metric("share", "The same above 0.", minibatches="sum", ranks="sum"),
    "clip_ratio/low_min": Metric("share", "The least low_mean of a rank, of its own tokens."),
    "clip_ratio/high_max": Metric("share", "The largest high_mean of a rank, of its own tokens."),
    "approx_kl": Metric(
        "nats/token",
        "Mean KL between the policy before the batch and the one in training (0 in its first pass).",
        minibatches="sum of seen tokens",
        ranks="sum",
    ),
    "kl_penalty": Metric("", "Weight of the adaptive penalty that keeps updates to kl_target."),
    "off_policy_masked": Metric(
        "share",
        "Tokens of completions dropped by off_policy_mask_threshold.",
        minibatches="sum",
        ranks="sum",
    ),
    "correction_bounded": Metric(
        "share",
        "Tokens whose correction for the sampler was truncated or masked.",
        minibatches="sum of seen tokens",
        ranks="sum",
    ),
    "sampler_gap": Metric(
        "nats/token",
        "Mean |log-probability of the sampler - of the trainer|; at the same weights where staleness is 0.",
        minibatches="sum of seen tokens",
        ranks="sum",
    ),
    "loss": Metric(
        "",
        "What is minimised: policy_loss less the entropy bonus, with the critic's and the load-balancing loss times "
        "their weights.",
        minibatches="sum",
        ranks="sum",
    ),
    "policy_loss": Metric(
        "",
        "The surrogate; its value says little, its gradient is what counts.",
        minibatches="sum",
        ranks="sum",
    ),
    "value_loss": Metric("reward²", "Of the critic.", minibatches="sum", ranks="sum"),
    "aux_loss": Metric(
        "",
        "Load-balancing loss of a mixture of experts, without its coefficient; the number of experts of a token "
        "where all are used alike.",
        ranks="sum",
    ),
    "explained_variance": Metric(
        "share",
        "1 - Var[return - value] / Var[return] over tokens, values of before the step; absent where returns are equal.",
    ),
    "critic_grad_norm": Metric("", "Norm of the critic's gradient before clipping, which is its own."),
    "grad_norm": Metric("", "Norm of the gradient before clipping."),
    "gradient_signal": Metric("", "Squared length of the expected gradient, from two halves of a step; average it."),
    "gradient_noise": Metric("", "Variance of one group's gradient; over the signal it is the simple noise scale."),
    "learning_rate": Metric("", "Of this step."),
    "entropy_coef": Metric("", "Weight of the entropy bonus in this step."),
    "skipped_updates": Metric("steps", "Optimiser steps skipped because loss or gradient was not finite."),
    "oom_splits": Metric(
        "",
        "Times that a micro-batch did not fit into memory and was halved; absent where none was.",
        ranks="sum",
    ),
    "tokens": Metric("tokens", "Completion tokens sampled.", ranks="sum"),
    "prompt_tokens": Metric("tokens", "Of the prompts, each as often as it has completions.", ranks="sum"),
    "tokens_per_second": Metric("tokens/s", "Of the sampling phase.", ranks="sum"),
    "train_tokens_per_second": Metric(
        "tokens/s",
        "Of the update phase, each distinct prompt and each completion token once, less rows of weight 0.",
        ranks="sum",
    ),
    "mfu": Metric("share", "Model FLOPs of the update over its seconds and the machine's measured matrix products."),
    "memory": Metric("MB", "Peak memory of this process so far (of the accelerator where there is one).", ranks="max"),
    "seconds": Metric("s", "The whole step.", ranks="max"),
    "seconds/": Metric(
        "s",
        "One phase of it: sample, reward, reference, teacher, value, update, eval; save is that of the step before. "
        "With max_staleness sample and reward of the batch went on in the background; wait is for what was left of "
        "them.",
        ranks="max",
    ),
    "eval/": Metric(
        "share",
        "Held out: greedy, sampled, pass@k (unbiased), with 95 % intervals; strict (the answer in its form) and "
        "lenient (in any form); reward and sampled_reward, the mean rewards; highest_score, of those that decide "
        "a pass; length in tokens.",
    ),
}


def metric(name: str) -> Metric | None:
    """Returns the row of a name, or of the longest prefix that it begins with; None where there is none."""
    prefixes = [prefix for prefix in METRICS if prefix.endswith("/") and name.startswith(prefix)]
    return METRICS.get(name) or (METRICS[max(prefixes, key=len)] if prefixes else None)


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
            seconds = time.perf_counter() - begin
            self.add({phase: seconds})
            log.debug("%s took %.3f s", phase, seconds)
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
        unknown = [name for name in values if metric(name) is None]
        assert not unknown, f"metrics without a line in the table: {unknown}"
        with self.path.open("a") as file:
            file.write(as_line(values) + "\n")


def sync(path: Path) -> None:
    """Bring a file onto the disk: a checkpoint must not outlive the lines of its steps."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak_memory_mb() -> float:
    """Peak resident set of this process in MB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate needs it

        facts = psutil.Process().memory_info()
        return float(getattr(facts, "peak_wset", facts.rss)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, one a step, in their order; names and units are those of `METRICS`.

    Args:
        path: the file.
    """
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
