"""Who follows a run: its metrics file, the terminal, the trackers, the doctor, the page and TRL's callbacks.

All but the callbacks work on the first rank, and none of those can end the run; doctor and page together take about a
hundredth of its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import Config
from ...doctor.watch import RunWatch
from ...evaluate import Evaluation
from ...learner.learner import Learner, Update
from ...metrics import MetricsFile, peak_memory_mb, read_metrics
from ...prompts import Prompts
from ...report import LivePage, leave_report
from ...rollout.experience import Experience
from ..context import RunContext
from ..guard import Signals
from ..ranks import merge_metrics
from ..saving.folder import full_disks_named
from .callbacks import Callbacks
from .throughput import Work, matmul_rate, tokens_to_train
from .tracker_kinds import TrackedRun, group_of
from .trackers import Trackers


def tracked_run(config: Config, folder: Path, start: int) -> TrackedRun:
    """The run as its trackers name it.

    Args:
        folder: of the run. start: steps that are done already.
    """
    run = config.run
    return TrackedRun(
        run.project, folder.name, folder, run.tracker_group or group_of(folder.name), tuple(run.tracker_tags), start
    )


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The summary's numbers, those of the evaluations before and after as before/..., after/..."""
    out: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            out.update({f"{name}/{key}": number for key, number in _numbers(value).items()})
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[name] = value
    return out


class Observers:
    """Tells all who follow the run of its steps.

    Args:
        context: of the run. learner: what is trained, of which the work of a step is counted.
        prompts: of the run; a curriculum's metrics are logged.
        callbacks: TRL's. signals: which this process has received.
        settings: of the run, without secrets. resume_step: step that the run goes on from; None = it begins.

    Attributes:
        received: number of a signal that any rank has received; None = there was none.
    """

    def __init__(
        self,
        context: RunContext,
        learner: Learner,
        prompts: Prompts,
        callbacks: Callbacks,
        signals: Signals,
        settings: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        self.context, self.learner, self.prompts = context, learner, prompts
        self.callbacks, self.signals = callbacks, signals
        self.received: int | None = None
        config, device = context.config, context.accelerator.device
        dtype = torch.bfloat16 if config.train.bf16 else learner.policy.model.dtype
        self.work = Work(learner.policy.model, matmul_rate(device, dtype))
        folder = context.folder
        self.trackers = Trackers(
            config.run.report_to if context.ranks.is_main else [],
            tracked_run(config, folder.path, resume_step or 0),
            say=context.terminal.say,
            warn=context.terminal.warn,
            clean=context.redactor,
            accelerator=context.accelerator,
        )
        self.trackers.start(settings)
        self.metrics = MetricsFile(folder.metrics, resume_step) if context.ranks.is_main else None
        earlier = read_metrics(folder.metrics) if self.metrics is not None else []
        self.watch = RunWatch(folder.path, settings, earlier)
        self.page = LivePage(folder.path, context.terminal.warn, seconds=config.run.report_seconds)
        self._step_began = self._last = time.perf_counter()

    def before(self, evaluation: Evaluation) -> None:
        """The model as it begins was evaluated: step 0 of the curves."""
        self.trackers.log(evaluation.metrics(), 0)

    def begin_steps(self) -> None:
        """The first step begins now."""
        self._last = time.perf_counter()
        self.context.clock.lap()

    def begin_step(self) -> None:
        self.callbacks.step_begin()
        self._step_began = time.perf_counter()

    def after_step(self, step: int, experience: Experience, update: Update, evaluation: Evaluation | None) -> None:
        """A step is over but for its checkpoint, which must not outlive the line of metrics that is written here."""
        readable = self._readable(step, experience, update)
        values: dict[str, Any] = {"step": step, **experience.metrics(), **self.prompts.metrics(), **update.metrics}
        evaluated = {} if evaluation is None else evaluation.metrics()
        values.update(evaluated)
        values.update(self._pace(values["tokens"], experience, update))
        self._write(values, experience, readable)
        if evaluation is not None:
            self.callbacks.evaluated(evaluation)
        self.callbacks.agree()

    def _readable(self, step: int, experience: Experience, update: Update) -> list[dict[str, Any]]:
        """The first groups as a person can read them, also written to the run's folder."""
        count = self.context.config.run.log_completions
        if not count or not self.context.ranks.is_main:
            return []
        numbers = update.seen.numbers(experience.rollouts.logp_BT)
        readable = experience.readable(update.batch.advantage_BT, count, numbers)
        try:
            self.context.folder.write_completions(step, readable)
        except OSError as error:  # a run is worth more than its completions
            self.context.terminal.warn(f"The completions of step {step} are not written: {error}.")
        return readable

    def _pace(self, sampled: int, experience: Experience, update: Update) -> dict[str, float]:
        """Seconds of the step by phase, and what was done in them. sampled: tokens."""
        clock = self.context.clock.lap()
        sampling, updating = clock.get("sample", 0.0), clock["update"]
        rows = self.learner.algorithm.contributes_B(update.batch).nonzero().squeeze(1)
        kept = experience.rollouts.rows(rows)  # the others were dropped before any pass
        trained = tokens_to_train(kept.prompt_ids_B, int(kept.context_length_B.sum()))
        passes = self.learner.updater.num_iterations
        self._flops = self.work.flops(passes * trained)
        memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mb()
        return {
            "seconds": time.perf_counter() - self._step_began,
            "tokens_per_second": sampled / max(sampling, 1e-9),
            "train_tokens_per_second": trained / max(updating, 1e-9),
            "mfu": self.work.utilisation(passes * trained, updating),
            "memory": memory,
            **{f"seconds/{phase}": seconds for phase, seconds in clock.items()},
        }

    def _write(self, values: dict[str, Any], experience: Experience, readable: list[dict[str, Any]]) -> None:
        """The step's line, from all ranks."""
        ranks, plan = self.context.ranks, self.context.plan
        from_ranks = ranks.gather((values, experience.scores.problems, self.signals.received, self._flops))
        self.callbacks.state.total_flos += math.fsum(flops for *_, flops in from_ranks)
        rows = [plan.num_generations * len(plan.share(rank, len(from_ranks))) for rank in range(len(from_ranks))]
        values = merge_metrics([each[0] for each in from_ranks], rows)
        self.callbacks.log(values)
        if self.metrics is not None:
            self.metrics.write(values)
            self._follow(values, readable)
        for rank, (_, problems, *_) in enumerate(from_ranks):
            for function, causes in problems.items():
                where = f" (rank {rank})" if rank else ""
                self.context.terminal.warn(f"Reward function {function}{where}: {causes}")
        self.received = next((number for _, _, number, _ in from_ranks if number is not None), None)

    def _follow(self, values: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        terminal, step, now = self.context.terminal, int(values["step"]), time.perf_counter()
        self.trackers.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step)
        if rows and step % self.context.config.run.logging_steps == 0:
            self.trackers.table(rows, step)
        terminal.step(values, now - self._last)
        if rows:
            terminal.sample(step, rows)
        for finding in self.watch.observe(values):
            terminal.finding(finding)
        self.page.refresh(step)
        self._last = now

    def finish(self, summary: dict[str, Any], before: Evaluation | None, after: Evaluation | None) -> None:
        """The run has come to its end: its summary, and the findings that only the whole run shows."""
        step = int(summary.get("steps") or 0)
        if after is not None:
            self.trackers.log(after.metrics(), step)
        self.trackers.summarise(_numbers(summary), step)
        self.trackers.finish()
        folder, terminal = self.context.folder, self.context.terminal
        if self.metrics is None:
            return
        with full_disks_named(folder.path):
            folder.write_summary(summary)
        for finding in self.watch.finish():
            terminal.finding(finding)
        places = [f"Model:   {folder.model}", f"Metrics: {folder.metrics}", *leave_report(folder.path, terminal.warn)]
        terminal.summary(summary, before, after, places)
