"""A run in a notebook: one table with a bar and small charts, in place of lines."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from rich.console import Console

from ..doctor.finding import Finding
from ..evaluate import Evaluation
from .board import CURVES, PHASES, Board
from .figures import brief, duration, sparkline
from .live import LiveTerminal
from .plain import Plan, Terminal, left_text, sample_lines
from .starting import STARTING

FRAME_S = 0.5  # between two drawings
CHART = (220, 34)  # width and height of a small chart
MOST_POINTS = 200
MOST_NOTES = 30
TEXT_WIDTH = 100


class NotebookTerminal(LiveTerminal):
    """Draws into one output of the cell, which is brought up to date; findings and warnings are below the table.

    Args:
        show: given (what, None) for the first drawing and (what, the handle it returned) for later ones; None =
            IPython's display. cell: number of the cell that runs; None = IPython's. now: the clock.
    """

    def __init__(
        self,
        *,
        show: Callable[[Any, Any], Any] | None = None,
        cell: Callable[[], int] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(console=Console(quiet=True, force_jupyter=False), now=now)
        self._show, self._cell = show or _display, cell or _running_cell
        self._of_cell: int | None = None
        self._handle: Any = None
        self._drawn = -FRAME_S
        self._doing, self._began = "", 0.0
        self.notes: list[tuple[str, str]] = []  # (kind, text)
        self.tables: list[str] = []
        self.places: list[str] = []  # where the run's files are

    # --- what happens

    def begin(self, plan: Plan) -> None:
        super().begin(plan)
        self.refresh(always=True)

    def phase(self, name: str, begins: bool) -> None:
        if self.board is not None:
            super().phase(name, begins)
            self.refresh()
        elif name in STARTING:
            if begins:
                self._doing, self._began = f"{STARTING[name]} …", self.now()
            else:
                self._doing = f"{STARTING[name]}: {duration(self.now() - self._began)}"
            self.refresh(always=True)

    def progress(self, done: int, total: int) -> None:
        if self.board is None and self._doing:
            self._doing = f"{self._doing.split(' …')[0]} … {done:,} of {total:,}"
        self.refresh()

    def sampled(self, tokens: int, ended: int) -> None:
        super().sampled(tokens, ended)
        self.refresh()

    def trained(self, rows: int) -> None:
        super().trained(rows)
        self.refresh()

    def step(self, values: dict[str, Any], seconds: float) -> None:
        super().step(values, seconds)
        self.refresh(always=self.pace.step >= self.pace.last_step)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.refresh(always=True)

    def say(self, text: str) -> None:
        self._remember("line", text)

    def warn(self, text: str) -> None:
        self._remember("warning", text)

    def finding(self, finding: Finding) -> None:
        super().finding(finding)
        self._remember(finding.level, f"{finding.cause} {finding.evidence}. {finding.change}")

    def summary(
        self, summary: dict[str, Any], before: Evaluation | None, after: Evaluation | None, places: Sequence[str]
    ) -> None:
        if after is not None:
            out = io.StringIO()
            console = Console(file=out, width=TEXT_WIDTH, highlight=False, force_jupyter=False, force_terminal=False)
            Terminal(console=console)._evaluations(before, after)
            self.tables.append(out.getvalue().strip())
        self.places = list(places)
        self.refresh(always=True)

    def _remember(self, kind: str, text: str) -> None:
        self.notes = [*self.notes, (kind, text)][-MOST_NOTES:]
        self.refresh(always=kind != "line")

    # --- how it is drawn

    def refresh(self, always: bool = False) -> None:
        """Draw, unless that was a moment ago."""
        now = self.now()
        if not always and now - self._drawn < FRAME_S:
            return
        self._drawn = now
        cell = self._cell()
        if cell != self._of_cell:  # what was made in one cell and runs in another is drawn there
            self._handle, self._of_cell, self.notes = None, cell, []
        self._handle = self._show(self, self._handle)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": self.text()}

    def html(self) -> str:
        """The drawing. It has no colours of its own but the curves', so that it suits light and dark."""
        tables = [f'<pre style="font-size:12px;line-height:1.2">{escape(table)}</pre>' for table in self.tables]
        places = [f"<div>{escape(place)}</div>" for place in self.places]
        parts = [self._head(), self._curves(), *tables, self._sample(), *places, self._notes()]
        return f'<div style="font-size:13px;line-height:1.5;max-width:760px">{"".join(parts)}</div>'

    def text(self) -> str:
        """The same where a front end shows no HTML."""
        board, lines = self.board, []
        if board is not None:
            lines.append(f"{board.plan.algorithm}  {board.plan.name}  {self._place(board)}")
            for name, label, form in CURVES:
                if points := board.history.get(name):
                    values = [value for _, value in points]
                    lines.append(f"{label:<12} {form.format(values[-1]):<24} {sparkline(values, 40)}")
        elif self._doing:
            lines.append(self._doing)
        return "\n".join([*lines, *self.tables, *self.places, *(text for _, text in self.notes)]) or "…"

    def _place(self, board: Board) -> str:
        step, plan = board.pace.step, board.plan
        left = board.pace.remaining()
        rest = f", left {left_text(left)}" if left is not None and step < plan.max_steps else ""
        return f"{plan.unit} {step} of {plan.max_steps}{rest or f', {duration(self.now() - board.began)}'}"

    def _head(self) -> str:
        board = self.board
        if board is None:
            return f"<div>{escape(self._doing)}</div>"
        share = board.pace.step / max(board.plan.max_steps, 1)
        running = board.running
        doing = ""
        if running is not None and board.pace.step < board.plan.max_steps:
            of = f" {running.done:,} of {running.total:,}" if running.total else ""
            doing = f' <span style="opacity:.7">{PHASES.get(running.name, running.name)}{of}</span>'
        return (
            f"<div><b>{escape(board.plan.algorithm)}</b> {escape(board.plan.name)}</div>"
            f'<div><progress value="{share:.4f}" max="1" style="width:220px;vertical-align:middle"></progress> '
            f"{escape(self._place(board))}{doing}</div>"
        )

    def _curves(self) -> str:
        board = self.board
        if board is None:
            return ""
        rows = []
        for name, label, form in CURVES:
            points = board.history.get(name)
            if points:
                known = [value for _, value in points]
                ends = f"{brief(min(known))} to {brief(max(known))}" if min(known) < max(known) else ""
                cells = (escape(label), f"<b>{escape(form.format(known[-1]))}</b>", chart(points), ends)
                style = "padding:1px 12px 1px 0;text-align:left;border:0"
                rows.append("<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in cells) + "</tr>")
        return (
            f'<table style="border-collapse:collapse;margin:4px 0;font-size:13px">{"".join(rows)}</table>'
            if rows
            else ""
        )

    def _sample(self) -> str:
        board = self.board
        if board is None or board.sample is None:
            return ""
        lines = "\n".join(escape(line) for line in sample_lines(board.sample, TEXT_WIDTH))
        title = f"a completion of step {board.sampled_at[0]}"
        return (
            f'<details open><summary>{title}</summary><pre style="margin:2px 0;font-size:12px">{lines}</pre></details>'
        )

    def _notes(self) -> str:
        shown = [(kind, text) for kind, text in self.notes if kind != "line"]
        lines = [text for kind, text in self.notes if kind == "line"]
        out = "".join(f"<div><b>{escape(kind)}</b>: {escape(text)}</div>" for kind, text in shown)
        if lines:
            text = "\n".join(escape(line) for line in lines)
            out += f'<details><summary>{len(lines)} lines</summary><pre style="font-size:12px">{text}</pre></details>'
        return out


def chart(points: Sequence[tuple[int, float]]) -> str:
    """A curve as a small picture, from its lowest to its highest value."""
    width, height = CHART
    stride = -(-len(points) // MOST_POINTS)
    points = [*points[:-1:stride], points[-1]]
    (x0, _), (x1, _) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        across = 2 + (width - 6) * ((x - x0) / (x1 - x0) if x1 > x0 else 1.0)
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{across:.1f},{height - 4 - (height - 8) * up:.1f}"

    line, end = " ".join(place(*point) for point in points), place(*points[-1]).split(",")
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f'<polyline points="{line}" fill="none" stroke="#3b82f6" stroke-width="1.5"/>'
        f'<circle cx="{end[0]}" cy="{end[1]}" r="2.5" fill="#3b82f6"/></svg>'
    )


def _display(what: Any, handle: Any) -> Any:
    from IPython.display import display

    if handle is None:
        return display(what, display_id=True)
    handle.update(what)
    return handle


def _running_cell() -> int:
    from IPython import get_ipython

    return int(get_ipython().execution_count)
