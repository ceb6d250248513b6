"""What is shown before the first step, so that no second passes in silence: long phases, as lines or as a bar."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Phases of `metrics.Clock` before the steps, and what is done in them.
STARTING = {
    "check": "Checking settings, data and rewards",
    "import": "Loading torch and transformers",
    "load": "Loading the model and the data",
    "warm_start": "Warm start",
    "trial": "Trying the longest batch",
    "eval": "Answering the held-out prompts",
}
LINE_S = 10.0  # between two lines about a phase that goes on


class StartingLines:
    """A line where a phase begins, and one now and then while it goes on, from a thread of its own: what loads for a
    minute does not come back to say so.

    Args:
        say: prints a line. now: the clock.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.perf_counter) -> None:
        self.say, self.now = say, now
        self.name: str | None = None
        self._began, self._done, self._total = 0.0, 0, 0
        self._over = threading.Event()

    def begin(self, name: str) -> None:
        self.end()
        self.name, self._began, self._done, self._total = name, self.now(), 0, 0
        self.say(f"{STARTING[name]} ...")
        self._over = threading.Event()
        threading.Thread(target=self._follow, args=(self._over,), daemon=True).start()

    def progress(self, done: int, total: int) -> None:
        """Inside a phase: so much of it is done; total 0 = nobody knows."""
        self._done, self._total = done, total

    def end(self) -> None:
        self.name = None
        self._over.set()

    def tick(self) -> None:
        """The line about the phase that goes on."""
        if self.name is None:
            return
        done = f"{self._done:,}{f' of {self._total:,}' if self._total else ''} after " if self._done else ""
        self.say(f"{STARTING[self.name]}: {done}{self.now() - self._began:.0f} s")

    def _follow(self, over: threading.Event) -> None:
        while not over.wait(LINE_S):
            self.tick()


class StartingBar:
    """A spinner with the seconds, and a bar where it is known how much there is to do; it leaves no trace."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: Progress | None = None

    def begin(self, name: str) -> None:
        self.end()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._shown = Progress(*columns, console=self.console, transient=True, refresh_per_second=8)
        self._shown.add_task(escape(STARTING[name]), total=None)
        self._shown.start()

    def progress(self, done: int, total: int) -> None:
        if self._shown is None:
            return
        if total and len(self._shown.columns) == 3:
            self._shown.columns = (*self._shown.columns[:2], BarColumn(), MofNCompleteColumn(), self._shown.columns[2])
        self._shown.update(self._shown.task_ids[0], completed=done, total=total or None)

    def end(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None
