"""wandb, trackio, tensorboard and others follow the local metrics file, and may fail: the run does not wait for them.

All their calls are made by one daemon thread. The first error, or a start or an end that takes too long, is one
warning, and the tracker is left alone from then on.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .redact import Redactor
from .tracker_kinds import KINDS, START_SECONDS, Kind, TrackedRun

END_SECONDS = 15.0
MOST_ROWS, LONGEST_TEXT = 16, 1000  # of a table of completions
_HOST = "api.wandb.ai"


class Trackers:
    """Trackers behind a queue.

    Args:
        names: of the trackers; without any, nothing is ever started.
        run: as they name it.
        say: prints one line. warn: likewise, for what went wrong.
        clean: hides secrets in the settings they are given and in what they complain of.
        accelerator: of accelerate, whose `trackers` they become, for callbacks that ask it for them.
        kinds: by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        clean: Redactor,
        accelerator: Any = None,
        kinds: Mapping[str, Kind] = KINDS,
    ) -> None:
        self.names, self.run, self.accelerator = list(names), run, accelerator
        self._say, self._warn, self._clean, self._kinds = say, warn, clean, kinds
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._places: queue.Queue[str] = queue.Queue()
        self._begun: list[tuple[Kind, Any]] = []
        self._failure: str | None = None
        self._reported = False
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    def start(self, config: dict[str, Any]) -> None:
        """Begins them, without waiting.

        Args:
            config: settings of the run.
        """
        if not self.names:
            return
        if "wandb" in self.names and not _wandb_can_log_in():
            self._failure = "wandb has no key (WANDB_API_KEY, or `wandb login`); WANDB_MODE=offline needs none"
            self._over()
            return
        settings = _flat(self._clean.tree(config))
        self._calls.put(lambda: self._begin(settings))
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def _begin(self, settings: dict[str, Any]) -> None:
        for name in self.names:
            kind = self._kinds[name]
            tracker = kind.begin(self.run)
            self._begun.append((kind, tracker))
            kind.configure(tracker, settings)
            if place := kind.place(tracker, self.run):
                self._places.put(f"{name}: {place}")
        if self.accelerator is not None:
            self.accelerator.trackers = [tracker for _, tracker in self._begun]

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand over one step; never waits."""
        if self._thread is None or self._over():
            return
        reported = {name: value for name, value in values.items() if name != "step"}  # trackio reserves the name
        self._each(lambda kind, tracker: tracker.log(reported, step=step))

    def table(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Hand over rows of completions/ as a table, bounded in size; never waits."""
        if self._thread is None or self._over() or not rows:
            return
        made = completions_table(self._clean.tree(list(rows)), step)
        self._each(lambda kind, tracker: kind.table(tracker, made, step))

    def summarise(self, values: dict[str, float], step: int) -> None:
        """Hand over what the run came to; never waits."""
        if self._thread is not None and not self._over():
            self._each(lambda kind, tracker: kind.summarise(tracker, values, step))

    def _each(self, call: Callable[[Kind, Any], None]) -> None:
        def run() -> None:
            for kind, tracker in self._begun:
                call(kind, tracker)

        self._calls.put(run)

    def finish(self) -> None:
        """Wait for what is left, at most `END_SECONDS`."""
        if self._thread is not None and not self._over():
            self._each(lambda kind, tracker: tracker.finish())
            self._calls.put(None)
            self._thread.join(END_SECONDS)
            if self._thread.is_alive():
                self._failure = self._failure or f"it did not end within {END_SECONDS:.0f} s"
            self._over()
        if self.accelerator is not None:  # accelerate would end them once more, the broken ones too
            self.accelerator.trackers = []

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._busy_since = time.monotonic()
            try:
                call()
            except BaseException as error:  # noqa: BLE001  a tracker's own errors are of any kind, SystemExit included
                self._failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return
            self._busy_since = None

    def _over(self) -> bool:
        """Whether tracking is over; the reason, and before that where each is read, is printed once."""
        while not self._places.empty():
            self._say(self._places.get_nowait())
        since = self._busy_since
        if self._failure is None and since is not None and time.monotonic() - since > START_SECONDS:
            self._failure = f"no answer for {START_SECONDS:.0f} s"
        if self._failure is not None and not self._reported:
            self._reported = True
            names = ", ".join(self.names)
            self._warn(
                self._clean.text(
                    f"Nothing more is sent to {names}: {self._failure}. The run goes on; its metrics file has all."
                )
            )
        return self._failure is not None


def completions_table(rows: Sequence[dict[str, Any]], step: int) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: at most `MOST_ROWS`, their texts cut to `LONGEST_TEXT` characters."""
    parts = list((rows[0].get("parts") or {}).keys())
    columns = ["step", "prompt", "completion", "reward", *(f"reward/{name}" for name in parts), "tokens", "truncated"]
    data = []
    for row in rows[:MOST_ROWS]:
        texts = [str(row[name])[:LONGEST_TEXT] for name in ("prompt", "completion")]
        scores = [row["reward"], *(row["parts"].get(name) for name in parts)]
        data.append([step, *texts, *scores, len(row["ids"]), bool(row["truncated"])])
    return columns, data


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; what is no number or text as text (tensorboard takes nothing else)."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out


def _wandb_can_log_in() -> bool:
    """Whether wandb would start without asking a person."""
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", _HOST).split("://")[-1].split("/")[0]
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if host in file.read_text():
                return True
        except OSError:
            continue
    return False
