"""wandb, trackio and tensorboard follow the local metrics file, and may fail: the run does not wait for them.

All their calls are made by one daemon thread. The first error, or a start or an end that takes too long, is one
warning, and the tracker is left alone from then on.
"""

from __future__ import annotations

import html
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .redact import Redactor

START_SECONDS = 15.0
END_SECONDS = 15.0
MOST_ROWS, LONGEST_TEXT = 16, 1000  # of a table of completions
_HOST = "api.wandb.ai"


class Trackers:
    """accelerate's trackers behind a queue.

    Args:
        accelerator: made with `log_with`. names: of its trackers; without any, nothing is ever started.
        warn: prints one line. clean: hides secrets in the settings they are given and in what they complain of.
    """

    def __init__(self, accelerator: Any, names: list[str], warn: Callable[[str], None], clean: Redactor) -> None:
        self.accelerator, self.names, self._warn, self._clean = accelerator, names, warn, clean
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._failure: str | None = None
        self._told = False
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    def start(self, project: str, config: dict[str, Any]) -> None:
        if not self.names or not self.accelerator.is_main_process:
            return
        if "wandb" in self.names and not _wandb_can_log_in():
            self._failure = "wandb has no key (WANDB_API_KEY, or `wandb login`); WANDB_MODE=offline needs none"
            self._tell()
            return
        settings = self._clean.tree(config)
        extra = {"wandb": {"settings": _wandb_settings()}} if "wandb" in self.names else {}
        self._calls.put(lambda: self.accelerator.init_trackers(project, config=_flat(settings), init_kwargs=extra))
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand over one step; never waits."""
        if self._thread is None or self._tell():
            return
        reported = {name: value for name, value in values.items() if name != "step"}  # trackio reserves the name
        self._calls.put(lambda: self.accelerator.log(reported, step=step))

    def table(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Hand over rows of completions/ as a table, bounded in size; never waits."""
        if self._thread is None or self._tell() or not rows:
            return
        columns, data = completions_table(self._clean.tree(list(rows)), step)
        self._calls.put(lambda: self._send(columns, data, step))

    def _send(self, columns: list[str], data: list[list[Any]], step: int) -> None:
        for tracker in self.accelerator.trackers:
            _TABLES.get(tracker.name, _no_table)(tracker, columns, data, step)

    def finish(self) -> None:
        """Wait for what is left, at most `END_SECONDS`."""
        if self._thread is not None and not self._tell():
            self._calls.put(self._end)
            self._calls.put(None)
            self._thread.join(END_SECONDS)
            if self._thread.is_alive():
                self._failure = self._failure or f"it did not end within {END_SECONDS:.0f} s"
            self._tell()
        # accelerate would end them once more, the broken ones too.
        self.accelerator.trackers = []

    def _end(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._busy_since = time.monotonic()
            try:
                call()
            except BaseException as error:  # noqa: BLE001  a tracker's own errors are of any kind, SystemExit included
                self._failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return
            self._busy_since = None

    def _tell(self) -> bool:
        """Whether tracking is over; the reason is printed once."""
        since = self._busy_since
        if self._failure is None and since is not None and time.monotonic() - since > START_SECONDS:
            self._failure = f"no answer for {START_SECONDS:.0f} s"
        if self._failure is not None and not self._told:
            self._told = True
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


def _wandb_table(tracker: Any, columns: list[str], data: list[list[Any]], step: int) -> None:
    tracker.log_table("completions", columns=columns, data=data, step=step)


def _trackio_table(tracker: Any, columns: list[str], data: list[list[Any]], step: int) -> None:
    import pandas
    import trackio

    tracker.log({"completions": trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))}, step=step)


def _tensorboard_table(tracker: Any, columns: list[str], data: list[list[Any]], step: int) -> None:
    """As Markdown, which tensorboard's text pane draws; what would end a cell is written as HTML."""

    def cell(value: Any) -> str:
        text = html.escape("–" if value is None else str(value), quote=False)
        return text.replace("|", "&#124;").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *data]
    text = "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
    tracker.writer.add_text("completions", text, global_step=step)


def _no_table(tracker: Any, columns: list[str], data: list[list[Any]], step: int) -> None:
    """Other trackers get the numbers only."""


_TABLES: dict[str, Callable[[Any, list[str], list[list[Any]], int], None]] = {
    "wandb": _wandb_table,
    "trackio": _trackio_table,
    "tensorboard": _tensorboard_table,
}


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


def _wandb_settings() -> Any:
    import wandb

    return wandb.Settings(init_timeout=START_SECONDS, silent=True, console="off")
