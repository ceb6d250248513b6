"""Several seeds of the same settings side by side, in processes where there are cores for them."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .record import Point, Run
from .replay import replay
from .settings import Settings
from .train import train

PATIENCE_S = 1.0


class RunFolder:
    """The files of a run. `metrics.jsonl` gets each point of every seed as it comes, with its seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8")

    def write(self, seed: int, point: Point) -> None:
        # NaN becomes null, so that every line is JSON for any reader.
        plain = {k: v if math.isfinite(v) else None for k, v in point.items()}
        self._metrics.write(json.dumps({"seed": seed, **plain}) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()

    def summarise(self, runs: list[Run]) -> None:
        """`summary.json`: the settings and what each seed came to."""
        summary = {
            "settings": dataclasses.asdict(runs[0].settings),
            "runs": [
                {
                    "seed": run.settings.seed,
                    "steps": run.steps,
                    "episodes": len(run.returns),
                    "seconds": round(run.seconds, 3),
                    "steps_per_second": round(run.steps_per_second, 1),
                    "return_mean": run.points[-1]["return_mean"],
                    "threshold": run.threshold,
                    "solved_steps": run.solved_steps,
                    "solved_episodes": run.solved_episodes,
                    "flags": run.flags,
                }
                for run in runs
            ],
        }
        text = json.dumps(_plain(summary), indent=2, ensure_ascii=False)
        (self.path / "summary.json").write_text(text + "\n", encoding="utf-8")


def _plain(x: Any) -> Any:
    """Without NaN and infinity, which JSON has no word for."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return (None if math.isnan(x) else str(x)) if isinstance(x, float) and not math.isfinite(x) else x


def train_seeds(
    settings: Settings,
    num_seeds: int,
    *,
    folder: Path | None = None,
    on_point: Callable[[int, Point], None] | None = None,
    num_processes: int | None = None,
) -> list[Run]:
    """Runs with seeds `settings.seed`, +1, ..., in that order; the first one's policy is replayed into `folder`.

    Args:
        on_point: called with the number of the run, from 0, and each of its points.
        num_processes: at once; None = one a core. Asynchronous runs bring their own and go one after the other.
    """
    all_settings = [dataclasses.replace(settings, seed=settings.seed + i) for i in range(num_seeds)]
    at_once = min(num_seeds, num_processes or os.cpu_count() or 1)
    out = None if folder is None else RunFolder(folder)

    def note(number: int, point: Point) -> None:
        if out is not None:
            out.write(settings.seed + number, point)
        if on_point is not None:
            on_point(number, point)

    try:
        if at_once == 1 or settings.asynchronous:
            runs = [_here(s, i, note, folder) for i, s in enumerate(all_settings)]
        else:
            runs = _in_processes(all_settings, at_once, note, folder)
        if out is not None:
            out.summarise(runs)
    finally:
        if out is not None:
            out.close()
    return runs


def _here(settings: Settings, number: int, note: Callable[[int, Point], None], folder: Path | None) -> Run:
    run = train(settings, on_point=lambda point: note(number, point))
    if folder is not None and number == 0:
        replay(run, folder)
    return run


def _child(jobs: list[tuple[int, Settings]], folder: Path | None, said: Any) -> None:
    number = jobs[0][0]
    try:
        for number, settings in jobs:
            run = _here(settings, number, lambda n, point: said.put(("point", n, point)), folder)
            # The policy stays here: it is views of one tensor, and its replay is written.
            said.put(("run", number, dataclasses.replace(run, policy=None, scaler=None)))
    except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
        said.put(("error", number, (error if isinstance(error, ValueError) else None, traceback.format_exc())))


def _in_processes(
    all_settings: list[Settings], at_once: int, note: Callable[[int, Point], None], folder: Path | None
) -> list[Run]:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    jobs = list(enumerate(all_settings))
    processes = [
        context.Process(target=_child, args=(jobs[i::at_once], folder, said), daemon=True) for i in range(at_once)
    ]
    runs: dict[int, Run] = {}
    for process in processes:
        process.start()
    try:
        while len(runs) < len(jobs):
            try:
                kind, number, what = said.get(timeout=PATIENCE_S)
            except queue.Empty:
                _complain_of_the_dead(processes)
                continue
            if kind == "point":
                note(number, what)
            elif kind == "error":
                error, trace = what
                raise error or RuntimeError(f"Seed {all_settings[number].seed} failed:\n{trace}")
            else:
                runs[number] = what
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [runs[number] for number in range(len(jobs))]


def _complain_of_the_dead(processes: list[Any]) -> None:
    for process in processes:
        if not process.is_alive() and process.exitcode:
            raise RuntimeError(
                f"A process of these runs ended with exit code {process.exitcode} without a word; was it killed for "
                "memory? Run fewer seeds at once."
            )
