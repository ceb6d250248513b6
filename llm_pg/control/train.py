"""The loop: collect, update, note a point of the curve, until the budget is spent or the environment is solved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from .asynchronous import train_asynchronously
from .prepare import one_thread, prepare
from .record import Point, Recorder, Run
from .settings import Settings


def train(settings: Settings, *, on_point: Callable[[Point], None] | None = None) -> Run:
    """Run an algorithm on an environment.

    Args:
        settings: see `Settings`; make them with `settings.resolve`.
        on_point: called with each point of the curve.

    Raises:
        ValueError: what cannot work, before anything runs. FloatingPointError: the gradient is not finite.
    """
    if settings.asynchronous:
        return train_asynchronously(settings, on_point=on_point)
    with one_thread(), contextlib.ExitStack() as stack:
        run, collector, learner = prepare(settings)
        stack.callback(collector.envs.close)
        recorder = Recorder(run, collector.episodes, on_point)
        start = time.perf_counter()
        while not recorder.over:
            stretch = collector.collect()
            stats = learner.update(stretch, recorder.progress)
            recorder.note(collector.steps, stats, time.perf_counter() - start)
        recorder.finish()
    return run
