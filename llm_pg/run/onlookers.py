"""Who follows a run beside its metrics file: the terminal, the trackers, the doctor and the page. Only on the first
rank; none of them can end the run, and doctor and page together take about a hundredth of its time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..config import Config
from ..doctor.watch import Watch
from ..metrics import read_metrics
from ..report import LivePage
from ..sampling.native import NativeSampler
from ..sampling.protocol import Sampler
from ..terminal import Terminal
from ..terminal.plain import Plan
from ..training.update import Updater
from .folder import RunFolder
from .trackers import Trackers


def follow(terminal: Terminal, plan: Plan, updater: Updater, sampler: Sampler) -> None:
    """Let the terminal know what the steps will be, and follow them inside their phases where the engine tells."""
    terminal.begin(plan)
    updater.progress = terminal.trained
    if isinstance(sampler, NativeSampler):
        sampler.progress = terminal.sampled


class Onlookers:
    """Args: terminal: of the first rank. settings: of the run, without secrets. done: steps of an earlier process."""

    def __init__(
        self, terminal: Terminal, trackers: Trackers, folder: RunFolder, config: Config, settings: dict[str, Any]
    ) -> None:
        self.terminal, self.trackers = terminal, trackers
        earlier = read_metrics(folder.metrics) if folder.metrics.exists() else []
        self.watch = Watch(folder.path, settings, earlier)
        self.page = LivePage(folder.path, terminal.warn, seconds=config.run.report_seconds)
        self.table_steps = config.run.logging_steps
        self.last = time.perf_counter()

    def begin(self) -> None:
        """The first step begins now."""
        self.last = time.perf_counter()

    def step(self, values: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """A step's metrics, and its rows of completions/."""
        step, now = int(values["step"]), time.perf_counter()
        self.trackers.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step)
        if rows and step % self.table_steps == 0:
            self.trackers.table(rows, step)
        self.terminal.step(values, now - self.last)
        if rows:
            self.terminal.sample(step, rows)
        for finding in self.watch.observe(values):
            self.terminal.finding(finding)
        self.page.refresh(step)
        self.last = now

    def finish(self) -> None:
        """Findings that only the whole run shows."""
        for finding in self.watch.finish():
            self.terminal.finding(finding)
