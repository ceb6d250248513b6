"""Lines of a run through Python's logging, for an application that decides itself where they go."""

from __future__ import annotations

import io
import logging
from typing import Any

from rich.console import Console

from ..doctor.finding import Finding
from .plain import Terminal

WIDTH = 120  # characters of a line of a table


class LogTerminal(Terminal):
    """Gives what a terminal would print to a logger: lines and tables as INFO, warnings and findings as WARNING.

    Args:
        logger: None = `llm_pg.run`.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self.logger = logger or logging.getLogger("llm_pg.run")
        lines: Any = _Lines(self.logger)
        super().__init__(console=Console(file=lines, width=WIDTH, highlight=False, soft_wrap=True, color_system=None))

    def warn(self, text: str) -> None:
        self.logger.warning(text)

    def finding(self, finding: Finding) -> None:
        level = logging.INFO if finding.level == "note" else logging.WARNING
        words = (finding.cause, finding.evidence, finding.change, finding.source)
        self.logger.log(level, "%s Evidence: %s. Change: %s (%s)", *words)


class _Lines(io.TextIOBase):
    """A file whose lines are log records."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.logger.info("%s", line.rstrip())
        return len(text)
