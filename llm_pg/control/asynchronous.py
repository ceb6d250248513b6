"""A3C: workers in processes of their own, each at its own pace, one gradient a stretch (Mnih et al. 2016, 1602.01783).

The parent holds the parameters and the optimiser and applies gradients in the order in which they arrive; a worker
reads the newest parameters before each stretch. Staleness is the number of updates that were made in between: 0 means
that the gradient belongs to the parameters that it moves. The order of arrival is chance, so a seed does not fix a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import selectors
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..algorithms.spec import AlgorithmSpec
from ..device import one_thread
from ..processes.child import PATIENCE, Child, anonymous_file, own_pipes
from ..processes.frames import encode, encode_bytes, read, write
from ..rewards.loading import Target, load, target_of
from .collect import Episodes
from .learner import ControlLearner
from .prepare import begin_run, make_collector
from .record import ControlRun, CurveRecorder, Point
from .settings import ControlSettings


class SharedParameters:
    """Parameters, their version and the progress of the run, in memory that all processes see; one of them writes.

    A reader copies until no write came in between. Nothing is locked, so that no process that is killed holds another
    up.

    Args:
        handle: of `anonymous_file`. size: numbers.
    """

    def __init__(self, handle: int, size: int) -> None:
        if os.fstat(handle).st_size < 24 + 4 * size:
            os.ftruncate(handle, 24 + 4 * size)
        memory = mmap.mmap(handle, 24 + 4 * size)
        self._versions = np.frombuffer(memory, np.int64, 2)  # of the write that began last, and that ended last
        self._progress = np.frombuffer(memory, np.float64, 1, 16)
        self._theta = np.frombuffer(memory, np.float32, size, 24)

    def write(self, theta: NDArray[np.float32], progress: float) -> None:
        self._versions[0] += 1
        self._theta[:], self._progress[0] = theta, progress
        self._versions[1] = self._versions[0]

    def read(self, into: NDArray[np.float32]) -> tuple[int, float]:
        """Copies the newest parameters and returns their version and the progress."""
        while True:
            version = self.version
            into[:], progress = self._theta, float(self._progress[0])
            if int(self._versions[0]) == version:
                return version, progress

    @property
    def version(self) -> int:
        return int(self._versions[1])


def work() -> None:
    """The life of a worker: read, collect, send, until it is ended. Its first request holds all that it needs."""
    requests, answers = own_pipes()
    torch.set_num_threads(1)
    setup = read(requests)
    assert setup is not None
    try:
        settings = _settings_of(setup["settings"])
        run = begin_run(settings)
        policy = run.policy
        assert policy is not None
        shared = SharedParameters(setup["handle"], policy.theta.numel())
        learner = ControlLearner(settings, policy, run.interface.horizon, optimize=False)
        collector = make_collector(run, settings.seed * 1009 + setup["number"])
        while True:
            version, progress = shared.read(policy.theta.numpy())
            known, before = len(collector.episodes.returns), collector.steps
            gradient, stats = learner.gradient(collector.collect(), progress)
            done = collector.episodes
            trues: list[float | None] = [*done.true_returns[known:]] or [None] * len(done.returns[known:])
            ended = list(zip(done.returns[known:], done.lengths[known:], trues, strict=True))
            message = {"version": version, "steps": collector.steps - before, "stats": stats, "episodes": ended}
            write(answers, encode(message) + encode_bytes(gradient.numpy().tobytes()))
    except BrokenPipeError:
        return  # there is nobody to send to
    except Exception:  # noqa: BLE001 - sent to the parent, which raises it
        write(answers, encode({"error": traceback.format_exc()}))


def _as_json(settings: ControlSettings) -> dict[str, Any]:
    """The settings for another process; functions of one's own by where they are."""
    values = dataclasses.asdict(settings)
    for name, value in values["spec"].items():
        if callable(value):
            target = target_of(value)
            if isinstance(target, str):
                raise ValueError(f"An asynchronous worker cannot load the algorithm's {name}: {target}.")
            values["spec"][name] = target.to_json()
    return values


def _settings_of(values: dict[str, Any]) -> ControlSettings:
    spec: dict[str, Any] = values["spec"]
    spec = {name: load(Target(**value)) if isinstance(value, dict) else value for name, value in spec.items()}
    return ControlSettings(**{**values, "spec": AlgorithmSpec(**spec), "hidden": tuple(values["hidden"])})


def train_asynchronously(settings: ControlSettings, *, on_point: Callable[[Point], None] | None = None) -> ControlRun:
    """As `train.train`, with `num_workers` processes."""
    run = begin_run(settings)
    policy = run.policy
    assert policy is not None
    learner = ControlLearner(settings, policy, run.interface.horizon)
    recorder = CurveRecorder(run, Episodes(0, settings.window), on_point)
    handle = anonymous_file()
    shared = SharedParameters(handle, policy.theta.numel())
    shared.write(policy.theta.numpy(), 0.0)
    setup = {"settings": _as_json(settings), "handle": handle}
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        workers = []
        for number in range(settings.num_workers):
            workers.append(Child("llm_pg.control.asynchronous:work", pass_fds=(handle,)))
            stack.callback(workers[-1].end)
            workers[-1].send({**setup, "number": number})
        with one_thread():
            _serve(run, learner, recorder, shared, workers)
    recorder.finish()
    return run


def _serve(
    run: ControlRun, learner: ControlLearner, recorder: CurveRecorder, shared: SharedParameters, workers: list[Child]
) -> None:
    steps, begin = 0, 0.0
    theta = learner.policy.theta
    selector = selectors.DefaultSelector()
    for worker in workers:
        selector.register(worker.answers, selectors.EVENT_READ, worker)
    ready: list[Child] = []
    while not recorder.over:
        ready = ready or [key.data for key, _ in selector.select()]
        message, gradient = _receive(ready.pop(0), len(workers))
        received = time.perf_counter()
        begin = begin or received  # the seconds in which the workers import torch are no training
        run.staleness.append(shared.version - message["version"])
        learner.set_learning_rate(recorder.progress)
        learner.policy.grad.copy_(torch.frombuffer(gradient, dtype=torch.float32))
        norm = learner.apply()
        steps += message["steps"]
        for return_, length, true_return in message["episodes"]:
            recorder.episodes.append(return_, length, steps, true_return)
        shared.write(theta.numpy(), recorder.progress)
        stats = {**message["stats"], "grad_norm": norm, "staleness": float(run.staleness[-1])}
        end = time.perf_counter()
        recorder.note(steps, stats, {"wait": received - begin, "update": end - received})
        begin = end


def _receive(worker: Child, count: int) -> tuple[dict[str, Any], bytearray]:
    message = worker.receive()
    if message is not None and "error" in message:
        raise RuntimeError(f"An asynchronous worker failed:\n{message['error']}")
    gradient = None if message is None else worker.receive_bytes()
    if message is None or gradient is None:
        raise RuntimeError(
            f"One of {count} asynchronous workers ended without a message ({worker.end(PATIENCE)}); was it killed for "
            "memory? Take fewer with --num-workers."
        )
    return message, bytearray(gradient)
