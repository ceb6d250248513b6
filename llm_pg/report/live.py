"""The page while the run goes on: there from its beginning, written again now and then in a bounded share of the time,
and once more where the run ends early, with how it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import TemplateError

from ..doctor.evidence import ENDED
from ..time_budget import TimeBudget
from .page import Live, leave_report, write_report

FAILURES = (OSError, ValueError, LookupError, TypeError, ArithmeticError, TemplateError)
LONGEST_REASON = 2_000  # characters


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
        with self.budget.spending():
            return self.write(f"after step {step}")

    def write(self, when: str) -> bool:
        """Write the page now; whether that could be done. when: where the run is."""
        try:
            write_report([self.folder], live=Live(when, time.time(), self.seconds))
        except FAILURES as error:
            if not self.failed:
                self.warn(f"The page cannot be written while the run goes on ({type(error).__name__}: {error}).")
            self.failed = True
            return False
        return True


@contextlib.contextmanager
def page_from_begin_to_end(
    folder: Path, warn: Callable[[str], None], clean: Callable[[str], str] = str, *, seconds: float
) -> Iterator[None]:
    """`report.html` is there from here on, and says how the run ended where the block is left by an exception.

    Args:
        folder: of a run whose settings are written. warn: is given what cannot be written.
        clean: hides the secrets in a text. seconds: 0 = only an early end writes the page.
    """
    with contextlib.suppress(OSError):
        (folder / ENDED).unlink(missing_ok=True)
    if seconds:
        LivePage(folder, warn, seconds=seconds).write("before the first step")
    try:
        yield
    except BaseException as error:
        facts = {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "how": clean(reason(error))}
        with contextlib.suppress(OSError):
            (folder / ENDED).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
        leave_report(folder, warn)
        raise


def reason(error: BaseException) -> str:
    """What ended a run, in a line or a paragraph."""
    text = str(getattr(error, "message", "") or error)
    if isinstance(error, KeyboardInterrupt):
        text = "Interrupted from the keyboard."
    elif not (isinstance(error, SystemExit) or type(error).__module__.startswith("llm_pg.")):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text[:LONGEST_REASON]
