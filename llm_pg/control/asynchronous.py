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

from .adviser import check
from .collect import Collector, Episodes
from .environments import inspect, make_rows, reward_threshold
from .learner import Learner
from .prepare import make_policy, make_scaler, one_thread
from .record import Point, Recorder, Run
from .settings import Settings

PATIENCE_S = 1.0


class Shared:
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
class Gift:
    """What a worker sends after a stretch; `error` in the place of everything else where it failed."""

    gradient: NDArray[np.float32] | None = None
    version: int = 0
    steps: int = 0
    stats: dict[str, float] = dataclasses.field(default_factory=dict)
    episodes: list[tuple[float, int, float | None]] = dataclasses.field(default_factory=list)
    error: str = ""


def work(settings: Settings, number: int, shared: Shared, gifts: Any) -> None:
    """The life of a worker: read, collect, send, until told to stop."""
    torch.set_num_threads(1)
    try:
        interface = inspect(settings.env, settings.env_options)
        policy = make_policy(settings, interface)
        learner = Learner(settings, policy, interface.horizon, optimize=False)
        envs = make_rows(settings.env, settings.num_envs, settings.group_size, settings.env_options)
        collector = Collector(
            envs,
            policy,
            make_scaler(settings, interface),
            num_steps=settings.num_steps,
            group_size=settings.group_size,
            seed=settings.seed * 1009 + number,
            window=1,
        )
        while not shared.stop.is_set():
            version, progress = shared.read(policy.theta.numpy())
            told, before = len(collector.episodes.returns), collector.steps
            gradient, stats = learner.gradient(collector.collect(), progress)
            done = collector.episodes
            trues: list[float | None] = [*done.true_returns[told:]] or [None] * len(done.returns[told:])
            ended = list(zip(done.returns[told:], done.lengths[told:], trues, strict=True))
            _send(gifts, Gift(gradient.numpy(), version, collector.steps - before, stats, ended), shared)
        envs.close()
    except Exception:  # noqa: BLE001 - sent to the parent, which raises it
        _send(gifts, Gift(error=traceback.format_exc()), shared)


def _send(gifts: Any, gift: Gift, shared: Shared) -> None:
    while not shared.stop.is_set():
        try:
            gifts.put(gift, timeout=PATIENCE_S)
            return
        except queue.Full:
            continue


def train_asynchronously(settings: Settings, *, on_point: Callable[[Point], None] | None = None) -> Run:
    """As `train.train`, with `num_workers` processes."""
    interface = inspect(settings.env, settings.env_options)
    check(settings, interface)
    threshold = reward_threshold(settings.env) if settings.threshold is None else settings.threshold
    policy = make_policy(settings, interface)
    run = Run(settings, interface, policy, make_scaler(settings, interface), threshold)
    learner = Learner(settings, policy, interface.horizon)
    recorder = Recorder(run, Episodes(0, settings.window), on_point)
    # A forked child would inherit torch's threads in a state that nobody defines.
    context = multiprocessing.get_context("spawn")
    shared = Shared(context, policy.theta.numpy())
    gifts = context.Queue(maxsize=settings.num_workers)
    workers = [
        context.Process(target=work, args=(settings, number, shared, gifts), daemon=True)
        for number in range(settings.num_workers)
    ]
    for worker in workers:
        worker.start()
    try:
        with one_thread():
            _serve(run, learner, recorder, shared, gifts, workers)
    finally:
        shared.stop.set()
        for worker in workers:
            worker.join(5 * PATIENCE_S)
            if worker.is_alive():
                worker.terminate()
                worker.join()
    recorder.finish()
    return run


def _serve(run: Run, learner: Learner, recorder: Recorder, shared: Shared, gifts: Any, workers: list[Any]) -> None:
    steps, start = 0, 0.0
    theta = learner.policy.theta
    while not recorder.over:
        gift = _receive(gifts, workers)
        start = start or time.perf_counter()  # the seconds in which the workers import torch are no training
        run.staleness.append(shared.version - gift.version)
        learner.set_learning_rate(recorder.progress)
        assert gift.gradient is not None
        learner.policy.grad.copy_(torch.from_numpy(gift.gradient))
        norm = learner.apply()
        steps += gift.steps
        for return_, length, true_return in gift.episodes:
            recorder.episodes.append(return_, length, steps, true_return)
        shared.write(theta.numpy(), recorder.progress)
        stats = {**gift.stats, "grad_norm": norm, "staleness": float(run.staleness[-1])}
        recorder.note(steps, stats, time.perf_counter() - start)


def _receive(gifts: Any, workers: list[Any]) -> Gift:
    while True:
        try:
            gift: Gift = gifts.get(timeout=PATIENCE_S)
        except queue.Empty:
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise RuntimeError(
                    f"{len(dead)} of {len(workers)} asynchronous workers ended with exit code {dead[0].exitcode} "
                    "without a word; was one killed for memory? Take fewer with --num-workers."
                ) from None
            continue
        if gift.error:
            raise RuntimeError(f"An asynchronous worker failed:\n{gift.error}")
        return gift
