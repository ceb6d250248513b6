"""A trace of a few steps, for chrome://tracing or Perfetto, and the operations that took most time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FIRST = 3  # the steps before it allocate, compile and fill caches
OPERATIONS = 40


class Profiler:
    """Traces `count` steps from the third on, into `folder`; with a count of 0 it does nothing.

    `trace.json` is the timeline, `operations.txt` the table. Tracing slows the steps that are traced.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.seen = folder, count, 0
        self._profile: Any = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of the trainer."""
        self.seen += 1
        if self.count and self.seen == FIRST:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.__enter__()
        try:
            yield
        finally:
            if self._profile is not None and self.seen == FIRST + self.count - 1:
                self.finish()

    def finish(self) -> None:
        """Write what was traced; also where a run ends before all its steps were."""
        traced, self._profile = self._profile, None
        if traced is None:
            return
        traced.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=OPERATIONS)
        (self.folder / "operations.txt").write_text(table)
