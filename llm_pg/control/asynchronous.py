"""A3C: workers in processes of their own, each at its own pace, one gradient a stretch (Mnih et al. 2016, 1602.01783).

The parent holds the parameters and the optimiser and applies gradients in the order in which they arrive; a worker
reads the newest parameters before each stretch. Staleness is the number of updates that were made in between: 0 means
that the gradient belongs to the parameters that it moves. The order of arrival is chance, so a seed does not fix a run.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .collect import Episodes
from .learner import ControlLearner
from .prepare import begin_run, make_collector, one_thread
from .record import ControlRun, CurveRecorder, Point
from .settings import ControlSettings

PATIENCE_S = 1.0


class SharedParameters:
    """Parameters, their version and the progress of the run, in memory that all processes see."""

    def __init__(self, context: Any, theta: NDArray[np.float32]) -> None:
        self._theta = context.RawArray("f", len(theta))
        self._version = context.RawValue("q", 0)
        self._progress = context.RawValue("d", 0.0)
        self._lock = context.Lock()
        self.stop = context.Event()
        np.frombuffer(self._theta, dtype=np.float32)[:] = theta

    def write(self, theta: NDArray[np.float32], progress: float) -> None:
        with self._lock:
            np.frombuffer(self._theta, dtype=np.float32)[:] = theta
            self._version.value += 1
            self._progress.value = progress

    def read(self, into: NDArray[np.float32]) -> tuple[int, float]:
        """Copies the newest parameters and returns their version and the progress."""
        with self._lock:
            into[:] = np.frombuffer(self._theta, dtype=np.float32)
            return self._version.value, self._progress.value

    @property
    def version(self) -> int:
        return self._version.value


@dataclass
class GradientMessage:
    """What a worker sends after a stretch; `error` in the place of everything else where it failed."""

    gradient: NDArray[np.float32] | None = None
    version: int = 0
    steps: int = 0
    stats: dict[str, float] = dataclasses.field(default_factory=dict)
    episodes: list[tuple[float, int, float | None]] = dataclasses.field(default_factory=list)
    error: str = ""


def work(settings: ControlSettings, number: int, shared: SharedParameters, messages: Any) -> None:
    """The life of a worker: read, collect, send, until told to stop."""
    torch.set_num_threads(1)
    try:
        run = begin_run(settings)
        policy = run.policy
        assert policy is not None
        learner = ControlLearner(settings, policy, run.interface.horizon, optimize=False)
        collector = make_collector(run, settings.seed * 1009 + number)
        while not shared.stop.is_set():
            version, progress = shared.read(policy.theta.numpy())
            known, before = len(collector.episodes.returns), collector.steps
            gradient, stats = learner.gradient(collector.collect(), progress)
            done = collector.episodes
            trues: list[float | None] = [*done.true_returns[known:]] or [None] * len(done.returns[known:])
            ended = list(zip(done.returns[known:], done.lengths[known:], trues, strict=True))
            _send(messages, GradientMessage(gradient.numpy(), version, collector.steps - before, stats, ended), shared)
        collector.envs.close()
    except Exception:  # noqa: BLE001 - sent to the parent, which raises it
        _send(messages, GradientMessage(error=traceback.format_exc()), shared)


def _send(messages: Any, message: GradientMessage, shared: SharedParameters) -> None:
    while not shared.stop.is_set():
        try:
            messages.put(message, timeout=PATIENCE_S)
            return
        except queue.Full:
            continue


def train_asynchronously(settings: ControlSettings, *, on_point: Callable[[Point], None] | None = None) -> ControlRun:
    """As `train.train`, with `num_workers` processes."""
    run = begin_run(settings)
    policy = run.policy
    assert policy is not None
    learner = ControlLearner(settings, policy, run.interface.horizon)
    recorder = CurveRecorder(run, Episodes(0, settings.window), on_point)
    # A forked child would inherit torch's threads in a state that nobody defines.
    context = multiprocessing.get_context("spawn")
    shared = SharedParameters(context, policy.theta.numpy())
    messages = context.Queue(maxsize=settings.num_workers)
    workers = [
        context.Process(target=work, args=(settings, number, shared, messages), daemon=True)
        for number in range(settings.num_workers)
    ]
    for worker in workers:
        worker.start()
    try:
        with one_thread():
            _serve(run, learner, recorder, shared, messages, workers)
    finally:
        shared.stop.set()
        for worker in workers:
            worker.join(5 * PATIENCE_S)
            if worker.is_alive():
                worker.terminate()
                worker.join()
    recorder.finish()
    return run


def _serve(
    run: ControlRun,
    learner: ControlLearner,
    recorder: CurveRecorder,
    shared: SharedParameters,
    messages: Any,
    workers: list[Any],
) -> None:
    steps, begin = 0, 0.0
    theta = learner.policy.theta
    while not recorder.over:
        message = _receive(messages, workers)
        received = time.perf_counter()
        begin = begin or received  # the seconds in which the workers import torch are no training
        run.staleness.append(shared.version - message.version)
        learner.set_learning_rate(recorder.progress)
        assert message.gradient is not None
        learner.policy.grad.copy_(torch.from_numpy(message.gradient))
        norm = learner.apply()
        steps += message.steps
        for return_, length, true_return in message.episodes:
            recorder.episodes.append(return_, length, steps, true_return)
        shared.write(theta.numpy(), recorder.progress)
        stats = {**message.stats, "grad_norm": norm, "staleness": float(run.staleness[-1])}
        end = time.perf_counter()
        recorder.note(steps, stats, {"wait": received - begin, "update": end - received})
        begin = end


def _receive(messages: Any, workers: list[Any]) -> GradientMessage:
    while True:
        try:
            message: GradientMessage = messages.get(timeout=PATIENCE_S)
        except queue.Empty:
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise RuntimeError(
                    f"{len(dead)} of {len(workers)} asynchronous workers ended with exit code {dead[0].exitcode} "
                    "without a message; was one killed for memory? Take fewer with --num-workers."
                ) from None
            continue
        if message.error:
            raise RuntimeError(f"An asynchronous worker failed:\n{message.error}")
        return message
