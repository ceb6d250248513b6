"""Runs in folders of the main track, several seeds side by side in processes where there are cores for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError
from ..metrics import MetricsFile
from ..report import LivePage, leave_report
from ..report.live import page_from_begin_to_end
from ..run.logs.redact import Redactor
from ..run.saving import provenance
from ..run.saving.folder import RunFolder
from ..run.saving.lock import FolderLock
from .record import ControlRun, Point
from .replay import replay
from .settings import ControlSettings
from .train import train

log = logging.getLogger("llm_pg.control")
PATIENCE_S = 0.2
PAGE_SECONDS = 20.0  # between two writings of the page while a run goes on
_points: Any = None  # in a child: the queue of points


def seed_folders(folder: Path, num_seeds: int, first_seed: int) -> list[Path]:
    """The run folder of each seed: `folder` itself for one, `folder-seed0` and so on for several."""
    if num_seeds == 1:
        return [folder]
    return [folder.with_name(f"{folder.name}-seed{first_seed + i}") for i in range(num_seeds)]


def train_seeds(
    settings: ControlSettings,
    num_seeds: int,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    on_point: Callable[[int, Point], None] | None = None,
    num_processes: int | None = None,
) -> list[ControlRun]:
    """Runs with seeds `settings.seed`, +1, ..., in that order.

    Args:
        folder: where each seed's run folder is written, see `seed_folders`; the first one's policy is replayed.
        overwrite: replace the runs that are there.
        on_point: called with the number of the run, from 0, and each of its points.
        num_processes: at once; None = one a core. Asynchronous runs bring their own and go one after the other.

    Raises:
        ConfigError: a folder cannot be written, or holds a run.
    """
    jobs = [dataclasses.replace(settings, seed=settings.seed + i) for i in range(num_seeds)]
    places: list[Path | None] = [None] * num_seeds
    if folder is not None:
        places = [*seed_folders(folder, num_seeds, settings.seed)]
        for place in places:
            assert place is not None
            _run_folder(place, overwrite)
    at_once = min(num_seeds, num_processes or os.cpu_count() or 1)
    if at_once > 1 and not settings.asynchronous:
        return _in_processes(jobs, places, at_once, on_point)
    runs = []
    for i, job in enumerate(jobs):
        hear = None if on_point is None else functools.partial(on_point, i)
        runs.append(train_in_folder(job, places[i], on_point=hear, replays=i == 0))
    return runs


def _run_folder(path: Path, overwrite: bool) -> RunFolder:
    """The folder of a run, which can be written and holds no other run."""
    config = Config.model_validate({"run": {"output_dir": str(path.parent), "run_name": path.name, "overwrite": True}})
    folder = RunFolder(config)
    if folder.metrics.exists() and not overwrite:
        raise ConfigError(f"{path} already holds a run. Replace it with --overwrite, or give another --folder.")
    folder.check(config, resume=False)
    return folder


def train_in_folder(
    settings: ControlSettings, path: Path | None, *, on_point: Callable[[Point], None] | None, replays: bool = False
) -> ControlRun:
    """A run, and its folder: config.yaml, metrics.jsonl as it goes, summary.json; replay.* where it `replays`."""
    if path is None:
        return train(settings, on_point=on_point)
    folder = _run_folder(path, overwrite=True)  # that another run is there was asked before
    with FolderLock(path):
        folder.begin(_sections(settings))
        processes = settings.num_workers if settings.asynchronous else 1
        clean = Redactor()
        facts = provenance.session(processes, f"CPU, {os.cpu_count()} cores")
        provenance.note(path, clean.tree(facts))
        with page_from_begin_to_end(path, log.warning, clean.text, seconds=PAGE_SECONDS):
            metrics = MetricsFile(folder.metrics)
            page = LivePage(path, log.warning, seconds=PAGE_SECONDS)

            def note(point: Point) -> None:
                metrics.write(point)
                page.refresh(int(point["steps"]))
                if on_point is not None:
                    on_point(point)

            run = train(settings, on_point=note)
            if replays:
                replay(run, path)
            folder.write_summary(_summary(run))
            leave_report(path, log.warning)
    return run


def _sections(settings: ControlSettings) -> dict[str, Any]:
    """The settings as sections of a config.yaml; the algorithm's have the names that they have for language."""
    values = dataclasses.asdict(settings)
    algorithm = {k: v.__name__ if callable(v) else v for k, v in values.pop("spec").items()}
    run = {"seed": values.pop("seed")}
    return {"algorithm": algorithm, "control": {**values, "hidden": list(settings.hidden)}, "run": run}


def _summary(run: ControlRun) -> dict[str, Any]:
    phases: dict[str, float] = {}
    for point in run.points:
        for name, seconds in point.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + seconds
    last = run.points[-1]
    return {
        "algorithm": run.settings.spec.name,
        "task": run.settings.env,
        "seed": run.settings.seed,
        "steps": run.steps,
        "updates": run.updates,
        "episodes": len(run.returns),
        "return_mean": last["return_mean"],
        "return_std": last["return_std"],
        "true_return_mean": last.get("true_return_mean", math.nan),
        "threshold": run.threshold,
        "solved_steps": run.solved_steps,
        "solved_episodes": run.solved_episodes,
        "steps_per_second": round(run.steps_per_second, 1),
        "seconds_total": round(run.seconds, 3),
        "seconds_by_phase": {phase: round(seconds, 3) for phase, seconds in phases.items()},
        "findings": [finding.as_json() for finding in run.findings],
    }


def _begin_child(points: Any) -> None:
    global _points
    _points = points


def _in_child(number: int, settings: ControlSettings, path: Path | None) -> ControlRun:
    run = train_in_folder(settings, path, on_point=lambda point: _points.put((number, point)), replays=number == 0)
    # The policy stays in the child: it is views of one tensor, and its replay is written.
    return dataclasses.replace(run, policy=None, scaler=None)


def _in_processes(
    jobs: list[ControlSettings],
    places: list[Path | None],
    at_once: int,
    on_point: Callable[[int, Point], None] | None,
) -> list[ControlRun]:
    context = multiprocessing.get_context("spawn")
    points = context.Queue()
    with ProcessPoolExecutor(at_once, context, _begin_child, (points,)) as pool:
        runs = [pool.submit(_in_child, i, job, places[i]) for i, job in enumerate(jobs)]
        try:
            while not all(run.done() for run in runs):
                _hear(points, on_point, PATIENCE_S)
                if any(run.done() and run.exception() for run in runs):
                    break
            _hear(points, on_point, 0.0)
            return [_result(job, run) for job, run in zip(jobs, runs, strict=True)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _hear(points: Any, on_point: Callable[[int, Point], None] | None, patience: float) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            number, point = points.get(timeout=patience)
            if on_point is not None:
                on_point(number, point)


def _result(settings: ControlSettings, run: Future[ControlRun]) -> ControlRun:
    try:
        return run.result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"The process of seed {settings.seed} ended without a message; was it killed for memory? Run fewer seeds "
            "at once."
        ) from None
