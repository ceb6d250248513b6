"""The page while the run goes on: written again now and then, in a bounded share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError

from ..time_budget import TimeBudget
from .page import write_report

FAILURES = (OSError, ValueError, LookupError, TypeError, ArithmeticError, TemplateError)


class LivePage:
    """`report.html` of a run that goes on.

    Args:
        folder: of the run. warn: is given the first failure; later ones are silent: the end writes the page again.
        seconds: the least between two times; 0 = never. budget: what bounds the cost.
    """

    def __init__(
        self, folder: Path, warn: Callable[[str], None], *, seconds: float, budget: TimeBudget | None = None
    ) -> None:
        self.folder, self.warn, self.seconds = folder, warn, seconds
        self.budget = budget or TimeBudget(seconds)
        self.failed = False

    def refresh(self, step: int) -> bool:
        """Write the page if it is time; whether it was written."""
        if not self.seconds or not self.budget.due():
            return False
        note = f"written at {time.strftime('%H:%M:%S')} after step {step}"
        with self.budget.spending():
            try:
                write_report([self.folder], live=(note, self.seconds))
            except FAILURES as error:
                if not self.failed:
                    self.warn(f"The page cannot be written while the run goes on ({type(error).__name__}: {error}).")
                self.failed = True
                return False
        return True
