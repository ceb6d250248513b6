"""Is an estimator's expected update the gradient of its objective? Not argued: enumerated, with the code that trains.

lines = prove.table()                     # what `llm-pg prove` prints
world = prove.build(prove.Spec())         # two prompts, 15 completions each, groups of 4
update = prove.expect_in(world, Algorithm(ALGORITHMS["grpo"]))
prove.compare(update, world.gradient())   # bias, cosine, scale, noise
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from ..device import one_thread
from ..estimators.expectation import Comparison, compare
from .cases import all_cases
from .measure import Line, ProofCase, expect_in, line_of
from .render import as_json as _as_json
from .render import markdown as _markdown
from .render import text as _text
from .user import ProofError, prove_own
from .world import World
from .worlds import WorldSpec, build

__all__ = [
    "Comparison",
    "Line",
    "ProofCase",
    "ProofError",
    "World",
    "WorldSpec",
    "build",
    "compare",
    "expect_in",
    "line_of",
    "main",
    "markdown_table",
    "prove_own",
    "table",
]


@lru_cache(maxsize=2)
def table(quick: bool = False) -> tuple[Line, ...]:
    """Every line of the table, measured; `quick` leaves out the crosses."""
    with one_thread():
        return tuple(line_of(case) for case in all_cases() if case.quick or not quick)


def _own(advantage: str | None, loss: str | None) -> tuple[Line, ...]:
    with one_thread():
        return tuple(prove_own(advantage, loss))


def markdown_table() -> str:
    """The block of docs/estimators.md: the short table, the rest folded away."""
    return _markdown(table(), table(quick=True))


def main(
    quick: bool = False,
    as_json: bool | str = False,
    markdown: bool = False,
    advantage: str | None = None,
    loss: str | None = None,
) -> int:
    """`llm-pg prove`. Prints the table.

    Args:
        quick: only the lines that matter most, in under 10 seconds.
        as_json: print the lines as a JSON list, or write it to this path.
        markdown: print the table of docs/estimators.md.
        advantage, loss: `my.py:fn`, functions of the user's to prove in the place of the table, see `user`.

    Returns:
        0; 1 if a built-in line no longer gets the verdict it is known to get; 2 for bad input, with a paragraph on
        stderr.
    """
    try:
        lines = _own(advantage, loss) if advantage or loss else table(quick)
    except ProofError as error:
        print(f"llm-pg prove: {error}", file=sys.stderr)
        return 2
    if isinstance(as_json, str):
        Path(as_json).write_text(_as_json(lines) + "\n", encoding="utf-8")
    elif as_json:
        print(_as_json(lines))
    if markdown:
        print(_markdown(lines, lines if quick or advantage or loss else table(quick=True)))
    elif not as_json:
        print(_text(lines))
    changed = [line for line in lines if not line.expected]
    for line in changed:
        name = " ".join(part for part in (line.section, line.algorithm, line.baseline, line.detail) if part)
        print(f"llm-pg prove: the verdict on {name} has changed: it is now {line.verdict}.", file=sys.stderr)
    return 1 if changed else 0
