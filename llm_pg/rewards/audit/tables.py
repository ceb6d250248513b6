"""The outcome of an audit, and how it is reported."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llm_pg.evaluate import wilson

SHOWN = 8  # lines of a table
EXAMPLE = 90  # characters of an example


@dataclass(frozen=True)
class Mistake:
    """One kind of completion that a function got wrong.

    Attributes:
        kind: what the completion is.
        rows: on how many rows.
        of: of so many rows.
        example: the shortest such completion.
        gold: the right answer of its row.
        score: what it earned; None = it got no score.
    """

    kind: str
    rows: int
    of: int
    example: str
    gold: str
    score: float | None

    def __str__(self) -> str:
        score = "has no score" if self.score is None else f"earns {self.score:g}"
        gold = f" (right: {_short(self.gold)})" if self.gold else ""
        return f"{self.rows} of {self.of} rows, {self.kind}: {_short(self.example)} {score}{gold}"


@dataclass(frozen=True)
class Audit:
    """What one reward function made of right and of wrong answers.

    Attributes:
        function: its name.
        rows: rows that were tried.
        right: right completions that were tried.
        wrong: wrong completions that were tried.
        paid: kinds of wrong completions that were paid.
        lost: kinds of right completions that were not paid.
        paid_rows: rows on which a wrong completion was paid.
        lost_rows: rows on which a right one was not.
        unread: forms of the answer that a function without declared forms never paid: perhaps it expects another.
        note: why nothing, or not everything, was tried.
        seconds: what it took.
    """

    function: str
    rows: int = 0
    right: int = 0
    wrong: int = 0
    paid: list[Mistake] = field(default_factory=list)
    lost: list[Mistake] = field(default_factory=list)
    paid_rows: int = 0
    lost_rows: int = 0
    unread: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.function}: not audited, {self.note}"
        text = [
            f"{self.function}: {self.rows} rows, {self.right:,} right and {self.wrong:,} wrong completions in "
            f"{self.seconds:.1f} s; wrong answers paid on {_share(self.paid_rows, self.rows)}, right ones lost on "
            f"{_share(self.lost_rows, self.rows)}",
            *_lines("PAID", self.paid),
            *_lines("lost", self.lost),
        ]
        if self.unread:
            text.append(f"  never paid, as another form may be wanted: {', '.join(self.unread)}")
        return "\n".join([*text, *([f"  {self.note}"] if self.note else [])])


def _lines(word: str, mistakes: Sequence[Mistake]) -> Iterable[str]:
    ordered = sorted(mistakes, key=lambda mistake: (-mistake.rows, len(mistake.example)))
    yield from (f"  {word} {mistake}" for mistake in ordered[:SHOWN])
    if len(ordered) > SHOWN:
        yield f"  ... and {len(ordered) - SHOWN} more kinds"


def _share(count: int, rows: int) -> str:
    """A count with the share of the data's rows that it represents, and its 95 % interval."""
    if not count:
        return f"0 of {rows}"
    found = wilson(count / rows, rows)
    return f"{count} of {rows} ({found.mean:.0%} of the data, 95 % interval {found.low:.0%} to {found.high:.0%})"


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= EXAMPLE else f"{shown[: EXAMPLE - 4]}...'"
