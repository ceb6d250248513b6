"""The live rules beside a run that goes on: each finding once, when it has shown itself twice in a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..time_budget import TimeBudget
from .evidence import Run, json_object
from .finding import Finding, by_gravity
from .live import examine, examine_run

EVERY = 5  # steps between two examinations


class RunWatch:
    """Examines a run every few steps, in at most a hundredth of its time.

    Args:
        folder: of the run. config: sections of its settings. metrics: of the steps already done.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        metrics: Sequence[dict[str, Any]] = (),
        budget: TimeBudget | None = None,
    ) -> None:
        self.run = Run(folder, folder.name, config, list(metrics))
        self.budget = budget or TimeBudget(guess=0.02)
        self.reported: set[str] = set()
        self._before: set[str] = set()

    def observe(self, values: dict[str, Any]) -> list[Finding]:
        """Add a step; findings that are new. A symptom of one examination only is not reported: it may be chance."""
        self.run.metrics.append(values)
        if len(self.run.metrics) % EVERY or not self.budget.due():
            return []
        with self.budget.spending():
            # The evaluation before the first step may end after this object was made.
            self.run.before = self.run.before or json_object(self.run.path / "before.json")
            found = by_gravity(examine(self.run))
        new = [finding for finding in found if finding.rule in self._before]
        self._before = {finding.rule for finding in found}
        return self._untold(new)

    def finish(self) -> list[Finding]:
        """What the whole run shows, read from its folder, without what was reported before."""
        return self._untold(by_gravity(examine_run(self.run.path)))

    def _untold(self, findings: Sequence[Finding]) -> list[Finding]:
        new = [finding for finding in findings if finding.rule not in self.reported]
        self.reported |= {finding.rule for finding in new}
        return new
