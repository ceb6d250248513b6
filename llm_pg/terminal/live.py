"""The live screen of a terminal: it is below the lines that are printed, and stays when the run is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from ..doctor.finding import Finding
from ..evaluate import Evaluation
from .board import HELD_OUT_REWARD, PASS_RATE, Board, RunningPhase, draw
from .figures import ASCII_LEVELS, LEVELS, phases_of
from .plain import Plan, Terminal
from .starting import StartingBar

FRAMES = 2  # a second; one takes some 5 ms
SAMPLE_SECONDS = 8.0  # a completion stays as long, so that it can be read


class LiveTerminal(Terminal):
    """Phases, curves and numbers in one place, redrawn a few times a second by rich's own thread."""

    def __init__(self, *, console: Console | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(console=console or Console(highlight=False))
        self.now = now
        self.board: Board | None = None
        self.starting = StartingBar(self.console)

    def begin(self, plan: Plan) -> None:
        super().begin(plan)
        self.board = Board(plan, self.pace, self.now())

    def recall(self, lines: Sequence[dict[str, Any]], before: Evaluation | None, seconds: float) -> None:
        super().recall(lines, before, seconds)
        board = self.board
        if board is None:
            return
        board.began -= seconds
        if before is not None:
            self._note_evaluation(board, 0, before.metrics())
        for values in lines:
            self._note(board, values)
            self._note_evaluation(board, int(values["step"]), values)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.starting.end()
        with Live(self, console=self.console, refresh_per_second=FRAMES, vertical_overflow="crop"):
            yield

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.board is not None:
            levels = ASCII_LEVELS if options.ascii_only else LEVELS
            yield draw(self.board, self.now(), options.max_width, console.height, levels)

    def phase(self, name: str, begins: bool) -> None:
        board = self.board
        if board is None:
            super().phase(name, begins)
            return
        if begins:
            totals = {"sample": board.plan.rows, "update": board.plan.rows * board.plan.passes}
            board.running = RunningPhase(name, self.now(), total=totals.get(name, 0))
        elif board.running is not None and board.running.name == name:
            board.running = None

    def sampled(self, tokens: int, ended: int) -> None:
        going = self.board.running if self.board is not None else None
        if going is not None:
            going.tokens += tokens
            going.done += ended

    def trained(self, rows: int) -> None:
        going = self.board.running if self.board is not None else None
        if going is not None:
            going.done += rows

    def step(self, values: dict[str, Any], seconds: float) -> None:
        super().step(values, seconds)
        board = self.board
        if board is None:
            return
        self._note(board, values)
        board.last = values
        board.spent = phases_of(values)

    @staticmethod
    def _note(board: Board, values: dict[str, Any]) -> None:
        for name, value in values.items():
            board.note(name, int(values["step"]), value)

    def sample(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        board = self.board
        if board is None or not rows or not board.plan.samples or self.now() - board.sampled_at[1] < SAMPLE_SECONDS:
            return
        board.sample, board.sampled_at = rows[step % len(rows)], (step, self.now())

    def finding(self, finding: Finding) -> None:
        super().finding(finding)
        if self.board is not None and finding.rule not in self.board.findings:
            self.board.findings.append(finding.rule)

    def evaluation(self, title: str, result: Evaluation) -> None:
        super().evaluation(title, result)
        if self.board is not None:
            self._note_evaluation(self.board, self.pace.step, result.metrics())

    @staticmethod
    def _note_evaluation(board: Board, step: int, metrics: dict[str, Any]) -> None:
        board.note(PASS_RATE, step, metrics.get("eval/greedy"))
        board.note(HELD_OUT_REWARD, step, metrics.get("eval/reward"))

    def _due(self, step: int, before: int) -> bool:
        return False
