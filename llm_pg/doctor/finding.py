"""What a rule of the doctor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("problem", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        rule: its name, stable, as in the table of rules.
        level: problem (the run cannot do what it is for), warning (it is likely to suffer), note (worth knowing).
        cause: what is wrong, in a sentence.
        evidence: the settings or numbers that show it.
        change: what to do.
        source: the paper, or the command that proves it.
    """

    rule: str
    level: str
    cause: str
    evidence: str
    change: str
    source: str

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.level.upper()} [{self.rule}] {self.cause}\n"
            f"  evidence: {self.evidence}\n  change:   {self.change}\n  source:   {self.source}"
        )


def by_gravity(findings: Sequence[Finding]) -> list[Finding]:
    """Problems first, then warnings, then notes; in the order of the rules within each."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def show(findings: Sequence[Finding]) -> str:
    """The findings as text, a paragraph each."""
    return "\n\n".join(str(finding) for finding in by_gravity(findings)) if findings else "The doctor finds nothing."
