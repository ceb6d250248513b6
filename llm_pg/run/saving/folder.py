"""A run's folder: the resolved config, metrics, completions, checkpoints, the model and the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ...config import Config, ConfigError
from ...evaluate import Evaluation
from ..guard import RunStopped
from . import provenance
from .lock import check_free

# Errors of a disk that cannot be written, and the text of the message.
_DISKS = {
    errno.ENOSPC: "no room is left on the disk. Make room there",
    errno.EDQUOT: "the quota of this user is used up. Make room there",
    errno.EROFS: "the file system is read-only. Mount it writable",
    errno.EIO: "the disk reports an error. Look after the disk",
}


def run_name(config: Config) -> str:
    if config.run.run_name:
        return config.run.run_name
    data = config.data
    source = data.task or (data.dataset_name or "").split("/")[-1] or "run"
    algorithm = config.algorithm.name.rpartition(":")[2]  # of file.py:function the function
    return f"{source}-{algorithm}-seed{config.run.seed}"


class RunFolder:
    """The places of a run, and the writing of everything but metrics and checkpoints."""

    def __init__(self, config: Config) -> None:
        self._place(Path(config.run.output_dir) / run_name(config))

    def _place(self, path: Path) -> None:
        self.path = path
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.start = self.path / "start"
        self.model = self.path / "model"
        self.merged = self.path / "merged"
        self.best = self.path / "best"
        self.crash = self.path / "crash"

    def move_on(self) -> None:
        """From now on the places are those of a folder of the next free number, `<run>-2`: for a further run."""
        base, number = self.path.name, 2
        while (beside := self.path.with_name(f"{base}-{number}")).exists():
            number += 1
        self._place(beside)

    def check(self, config: Config, *, resume: bool) -> None:
        """Raises ConfigError when the folder cannot be written, or holds another run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"The run's folder {self.path} cannot be written: {error.strerror}. Set run.output_dir elsewhere."
            ) from None
        check_free(self.path)
        if self.metrics.exists() and not resume and not config.run.overwrite:
            raise ConfigError(
                f"{self.path} already holds a run. Go on with it (--resume), replace it (run.overwrite=true), or give "
                "this one another run.run_name."
            )

    def begin(self, settings: dict[str, Any]) -> None:
        """Empty the folder of an earlier run and write the resolved settings, without secrets."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (
            self.checkpoints,
            self.start,
            self.model,
            self.merged,
            self.best,
            self.crash,
            self.path / "completions",
            self.path / "tensorboard",
        ):
            shutil.rmtree(folder, ignore_errors=True)
        for old in ("summary.json", "before.json", "after.json", "trackers.json", provenance.NAME):
            (self.path / old).unlink(missing_ok=True)
        self.write_config(settings)

    def write_config(self, settings: dict[str, Any]) -> None:
        """The resolved settings, without secrets; a kill leaves the old ones or the new ones."""
        beside = self.path / "config.yaml.new"
        beside.write_text(yaml.safe_dump(settings, sort_keys=False))
        beside.replace(self.path / "config.yaml")

    def write_completions(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        folder = self.path / "completions"
        folder.mkdir(exist_ok=True)
        with (folder / f"step-{step:06d}.jsonl").open("w") as file:
            file.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)

    def write_evaluation(self, found: Evaluation, name: str = "before.json") -> None:
        """Saves the evaluation before the first step, so that a resumed run can still compare, or that of the end."""
        (self.path / name).write_text(json.dumps(dataclasses.asdict(found), ensure_ascii=False))

    def read_evaluation(self) -> Evaluation | None:
        path = self.path / "before.json"
        return Evaluation.from_json(json.loads(path.read_text())) if path.exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.path / "summary.json").write_text(json.dumps(_finite(summary), indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replaced(folder: Path, *, writes: bool = True) -> Iterator[Path]:
    """Gives a place beside `folder` to write its next content in, which takes its name at the end of the block.

    A kill leaves the old content or the new one whole, under this name or as `<name>.old`. writes: whether this process
    is the one that writes; the others get the place and touch nothing.
    """
    beside, before = (folder.with_name(f"{folder.name}.{word}") for word in ("new", "old"))
    if not writes:
        yield beside
        return
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    beside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def full_disks_named(what: Path) -> Iterator[None]:
    """Inside the block a disk that is full or cannot be written ends the run with one line instead of a traceback."""
    try:
        yield
    except Exception as error:
        cause = said_by_disk(error)
        if cause is None:
            raise
        place = getattr(error, "filename", None) or f"{what}, or where standard output goes,"
        raise RunStopped(
            f"{place} cannot be written: {cause}, or set run.output_dir elsewhere; --resume goes on from the newest "
            "whole checkpoint."
        ) from None


def said_by_disk(error: Exception) -> str | None:
    """What is wrong with the disk and what to do, where an error is of a disk that takes no more; else None.

    safetensors raises its own error, and tokenizers a bare Exception, with the system's number in the text.
    """
    if isinstance(error, OSError):
        return _DISKS.get(error.errno or 0)
    found = re.search(r"os error (\d+)", str(error))
    is_theirs = isinstance(error, SafetensorError) or type(error) is Exception
    return _DISKS.get(int(found[1])) if found and is_theirs else None


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for; a strict reader refuses a line with NaN in it."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
