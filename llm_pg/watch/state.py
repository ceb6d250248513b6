"""What the page of some runs shows now, read from their folders whenever something in them has changed."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..doctor.evidence import ENDED, Run, read_run
from ..report.completions import encoded, gather
from ..report.page import Live, render
from ..run.logs.redact import Redactor
from ..run.saving.lock import is_written

POLL_S = 0.5
FILES = ("config.yaml", "metrics.jsonl", "before.json", "after.json", "summary.json", "sessions.jsonl", ENDED)
HEADS = {
    "waiting": "Waiting for the run to begin.",
    "running": "The run goes on.",
    "elsewhere": "The run goes on, or its process on another machine is gone.",
    "ended": "The run has ended.",
    "early": "The run ended early.",
    "gone": "The run's process is gone, without an end: it was killed.",
}


@dataclass(frozen=True)
class PageState:
    """What a browser hears of the runs.

    Attributes:
        version: greater by one whenever something in a folder has changed.
        begun: names the starts of the runs; another value where one begins, goes on or is replaced.
        completions: steps whose completions are there, all runs together.
        head: whether the run goes on, as a sentence. text: how far it is.
        at: when its newest step was over, in seconds since 1970; 0 = there is none.
    """

    version: int
    begun: str
    completions: int
    head: str
    text: str
    at: float

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Watched:
    """Runs that are looked at by several browsers.

    Args:
        folders: of the runs; they may not be there yet.

    Attributes:
        state: as it was at the last look. changed: notified where it is another one.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.changed = threading.Condition()
        self.stopped = threading.Event()
        self._seen: object = None
        self._busy = threading.Lock()
        self._made: dict[str, tuple[int, bytes]] = {}
        self.state = PageState(0, "", 0, "", "", 0.0)
        self.look()

    def follow(self) -> None:
        """Looks again and again until `stop`; for a thread of its own."""
        while not self.stopped.wait(POLL_S):
            self.look()

    def stop(self) -> None:
        self.stopped.set()
        with self.changed:
            self.changed.notify_all()

    def wait_for_another(self, version: int, seconds: float) -> None:
        """Returns where the state is of another version, at the end of the watching, or after so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.state.version != version or self.stopped.is_set(), seconds)

    def look(self) -> None:
        """Brings `state` up to date."""
        files = [[_stamp(folder / name) for name in FILES] for folder in self.folders]
        counts = [len(_completions(folder)) for folder in self.folders]
        kinds = [kind_of(folder) for folder in self.folders]
        seen = (files, counts, kinds)
        if seen == self._seen:
            return
        begun = ":".join(str(_stamp(f / "sessions.jsonl") or _stamp(f / "config.yaml")) for f in self.folders)
        texts, newest = [], 0.0
        for folder, kind in zip(self.folders, kinds, strict=True):
            run = None if kind == "waiting" else _read(folder)
            texts.append(
                (f"{folder.name}: " if len(self.folders) > 1 else "") + (progress(run) if run else str(folder))
            )
            if run is not None and run.metrics:
                newest = max(newest, (folder / "metrics.jsonl").stat().st_mtime)
        several = f"Still going: {kinds.count('running')} of {len(kinds)} runs."
        head = HEADS[kinds[0]] if len(set(kinds)) == 1 else several
        state = PageState(self.state.version + 1, begun, sum(counts), head, "; ".join(texts), newest)
        with self.changed:
            self._seen, self.state = seen, state
            self.changed.notify_all()

    def page(self) -> bytes | None:
        """The page with its completions; None while none of the runs has begun."""
        return self._make("page", lambda runs, clean: self._render(runs, clean, completions=True))

    def now(self) -> bytes | None:
        """The page without completions: what changes with every step."""
        return self._make("now", lambda runs, clean: self._render(runs, clean, completions=False))

    def completions(self) -> bytes | None:
        """The completions of the page, as JSON."""
        return self._make("completions", lambda runs, clean: encoded(gather(runs, clean=clean)))

    def _render(self, runs: Sequence[Run], clean: Callable[[str], str], *, completions: bool) -> bytes:
        state = self.state
        live = Live(state.text or "before the first step", time.time(), 0.0, state.begun, state.version)
        return render(runs, live, completions=completions, clean=clean).encode("utf-8", "replace")

    def _make(self, name: str, make: Callable[[list[Run], Callable[[str], str]], bytes]) -> bytes | None:
        with self._busy:  # browsers that ask at the same time share one making
            version, made = self._made.get(name, (-1, b""))
            if version != self.state.version:
                version = self.state.version
                runs = [run for folder in self.folders if (run := _read(folder)) is not None]
                if not runs:
                    return None
                clean = Redactor([run.config for run in runs])
                made = make([cleaned(run, clean) for run in runs], clean.text)
                self._made[name] = version, made
            return made


def kind_of(folder: Path) -> str:
    """A key of HEADS."""
    if not (folder / "config.yaml").is_file():
        return "waiting"
    written = is_written(folder)
    if written:
        return "running"
    if (folder / "summary.json").is_file():
        return "ended"
    if (folder / ENDED).is_file():
        return "early"
    return "gone" if written is False else "elsewhere"


def progress(run: Run) -> str:
    """How far a run is, in a line."""
    if not run.metrics:
        return "no step is over yet"
    last = run.metrics[-1]
    parts = [f"step {run.done} of {run.max_steps}"]
    for name, label in (("reward", "reward"), ("return_mean", "return")):
        if isinstance(last.get(name), (int, float)):
            parts.append(f"{label} {last[name]:.3f}")
    if isinstance(last.get("seconds"), (int, float)):
        parts.append(f"{last['seconds']:.2f} s")
    return ", ".join(parts)


def cleaned(run: Run, clean: Redactor) -> Run:
    """The run with secrets hidden in its settings, texts and provenance."""
    names = ("config", "before", "after", "summary", "sessions", "ended")
    return replace(run, **{name: clean.tree(getattr(run, name)) for name in names})


def _read(folder: Path) -> Run | None:
    return read_run(folder) if (folder / "config.yaml").is_file() else None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def _completions(folder: Path) -> list[Path]:
    return list((folder / "completions").glob("step-*.jsonl"))


@functools.cache
def waiting_page() -> str:
    """What is shown before the first of the runs begins."""
    from importlib.resources import files

    return files(__package__).joinpath("waiting.html").read_text(encoding="utf-8")
