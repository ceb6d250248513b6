"""For programs: the line of each step on standard output, everything for people on standard error."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console

from ..metrics import as_line
from .plain import Terminal


class JsonTerminal(Terminal):
    """One JSON object a step on standard output, the same as in metrics.jsonl, whatever `logging_steps` is."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None, out: TextIO | None = None) -> None:
        super().__init__(quiet=quiet, console=console or Console(stderr=True, highlight=False, soft_wrap=True))
        self.out = out or sys.stdout

    def step(self, values: dict[str, Any], seconds: float) -> None:
        self.out.write(as_line(values) + "\n")
        self.out.flush()

    def _due(self, step: int, before: int) -> bool:
        return False
