"""The loop: collect, update, note a point of the curve, until the budget is spent or the environment is solved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from ..device import one_thread
from .asynchronous import train_asynchronously
from .prepare import prepare
from .record import ControlRun, CurveRecorder, Point
from .settings import ControlSettings


def train(settings: ControlSettings, *, on_point: Callable[[Point], None] | None = None) -> ControlRun:
    """Run an algorithm on an environment.

    Args:
        settings: see `ControlSettings`; make them with `settings.resolve`.
        on_point: called with each point of the curve.

    Raises:
        ValueError: what cannot work, before anything runs. FloatingPointError: the gradient is not finite.
    """
    if settings.asynchronous:
        return train_asynchronously(settings, on_point=on_point)
    with one_thread(), contextlib.ExitStack() as stack:
        run, collector, learner = prepare(settings)
        stack.callback(collector.envs.close)
        recorder = CurveRecorder(run, collector.episodes, on_point)
        begin = time.perf_counter()
        while not recorder.over:
            stretch = collector.collect()
            collected = time.perf_counter()
            stats = learner.update(stretch, recorder.progress)
            end = time.perf_counter()
            recorder.note(collector.steps, stats, {"sample": collected - begin, "update": end - collected})
            begin = end
        recorder.finish()
    return run
