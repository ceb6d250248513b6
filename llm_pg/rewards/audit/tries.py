"""Every reward function of a run on right and on wrong answers to the run's own rows.

A wrong answer that is paid becomes the policy's answer, a right one that is lost never will be. Both show on a few
rows, before the first step, in the workers and under the deadlines of the run.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llm_pg.rewards.audit import dresses, programs
from llm_pg.rewards.audit.dresses import DressedCase
from llm_pg.rewards.audit.gold import answer_column, gold_of, names_answer
from llm_pg.rewards.audit.probes import scored
from llm_pg.rewards.audit.tables import Audit, Mistake
from llm_pg.rewards.scorer import Scorer
from llm_pg.rewards.specs import RewardFunction
from reward_fns.registry import Gold

FIRST = 8  # completions of the first measurement of the pace
LARGEST = 4_096  # completions scored at once
LOOK_AHEAD = 32  # rows among which another answer is looked for
EPSILON = 1e-9
Thing = TypeVar("Thing")


def spread(things: Sequence[Thing], count: int) -> list[Thing]:
    """At most `count` of these, evenly over all of them, in order."""
    count = min(count, len(things))
    return [things[place * len(things) // count] for place in range(count)]


def audit_rewards(
    scorer: Scorer, prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]], *, seconds: float | None = None
) -> list[Audit]:
    """Scores right answers in many forms, and wrong ones that resemble them, with each function of a scorer.

    Args:
        scorer: the run's own.
        prompts: of the data.
        rows: the row of each prompt.
        seconds: after which no more is tried, for all functions together; functions that wait for others (async) or
            run in this process are then left out, as one audit may cost them much. None = everything is tried.

    Raises:
        RewardError: a function breaks its contract.
    """
    audits = []
    for place, function in enumerate(scorer.functions):
        why = _left_out(scorer, place, list(rows[0]), hurried=seconds is not None)
        if why:
            audits.append(Audit(function.name, note=why))
            continue
        begin = time.perf_counter()
        audits.append(_Auditor(scorer, function, prompts, rows).run(seconds))
        seconds = None if seconds is None else max(0.0, seconds - (time.perf_counter() - begin))
    return audits


def _left_out(scorer: Scorer, place: int, columns: list[str], *, hurried: bool) -> str:
    function = scorer.functions[place]
    info = function.info
    if info is not None and info.checks != "answer":
        return "it looks at the form alone" if info.checks == "shape" else "it gives a model's opinion"
    if info is None or info.gold is None:
        if answer_column(function, columns) is None:
            return "no column that it takes is known to hold the right answer"
        if hurried and not (place == 0 or names_answer(function, columns)):
            return "its signature names no column with the right answer"
    if hurried and function.signature.is_async:
        return "it is async, and may wait for a server that costs (llm-pg check --audit-rewards tries it)"
    if hurried and scorer.runs_here(function.name):
        return "it runs in this process, without a deadline (llm-pg check --audit-rewards tries it)"
    return ""


def _alternating(cases: Iterable[DressedCase]) -> Iterator[DressedCase]:
    """A right one, a wrong one, and so on, so that a little time is enough for some of both."""
    both: tuple[list[DressedCase], list[DressedCase]] = ([], [])
    for case in cases:
        both[not case.right].append(case)
    for pair in itertools.zip_longest(*both):
        yield from (case for case in pair if case is not None)


@dataclass(frozen=True)
class _Try:
    """A case of one row, and what it earned."""

    row: int
    case: DressedCase
    score: float | None = None


class _Auditor:
    """The audit of one function."""

    def __init__(
        self, scorer: Scorer, function: RewardFunction, prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self.scorer, self.function, self.prompts, self.rows = scorer, function, prompts, rows
        self.golds = [gold_of(function, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]

    def run(self, seconds: float | None) -> Audit:
        known = [place for place, gold in enumerate(self.golds) if gold is not None]
        if not known:
            return Audit(self.function.name, note="no row has a short right answer")
        begin = time.perf_counter()
        tried = self._score_all(seconds)
        audit = self._judge(tried)
        missing = len(self.rows) - len(known)
        notes = [audit.note] if audit.note else []
        if missing:
            notes.append(f"{missing} of {len(self.rows)} rows have no short right answer and were left out.")
        if seconds is not None and audit.rows < len(known):
            notes.append(f"{audit.rows} of {len(known)} rows were reached in {seconds:.1f} s.")
        return replace(audit, note=" ".join(notes), seconds=time.perf_counter() - begin)

    def _cases(self, hurried: bool) -> Iterator[_Try]:
        for place, gold in enumerate(self.golds):
            if gold is None:
                continue
            other = self._other(place, gold)
            if gold.kind == "program":
                found = programs.cases(gold, other, loops=not hurried)
            else:
                near = [self.rows[(place + step) % len(self.rows)] for step in range(1, min(5, len(self.rows)))]
                found = dresses.cases(gold, other, self.prompts[place], self.rows[place], near)
            yield from (_Try(place, case) for case in _alternating(found))

    def _other(self, place: int, gold: Gold) -> Gold | None:
        """The answer of the next row whose answer differs."""
        for step in range(1, min(LOOK_AHEAD, len(self.golds))):
            other = self.golds[(place + step) % len(self.golds)]
            if other is not None and (gold.kind == "program" or dresses.differ(gold, other)):
                return other
        return None

    def _score_all(self, seconds: float | None) -> list[_Try]:
        """The cases with their scores, as many as the time allows; the workers have loaded before it runs."""
        waiting = list(self._cases(hurried=seconds is not None))
        self._score(waiting[:1])
        begin, done, size = time.perf_counter(), [], FIRST if seconds is not None else LARGEST
        while waiting and size:
            piece, waiting = waiting[:size], waiting[size:]
            done += self._score(piece)
            spent = time.perf_counter() - begin
            if seconds is not None:
                left = (seconds - spent) * len(done) / max(spent, 1e-6)
                size = max(0, min(LARGEST, 4 * size, math.floor(left)))
        return done

    def _score(self, tries: Sequence[_Try]) -> list[_Try]:
        name, places = self.function.name, [one.row for one in tries]
        prompts, rows = [self.prompts[place] for place in places], [self.rows[place] for place in places]
        found = scored(self.scorer, name, prompts, [one.case.text for one in tries], rows).parts[name]
        return [_Try(one.row, one.case, score) for one, score in zip(tries, found, strict=True)]

    def _judge(self, tried: Sequence[_Try]) -> Audit:
        name, info = self.function.name, self.function.info
        scored = [one.score for one in tried if one.score is not None]
        right = [one for one in tried if one.case.right]
        audit = Audit(name, len({one.row for one in tried}), len(right), len(tried) - len(right))
        declared = info is not None and info.gold is not None
        low = info.floor if info is not None else min(scored, default=0.0)
        high = info.high if info is not None else max((one.score or 0.0 for one in right), default=0.0)
        if not declared and not self._depends_on_row(tried):
            note = (
                "It gives every one of these texts the same score whatever the row's answer is: it looks at something "
                "else, or at a form that none of them has."
            )
            return replace(audit, note=note)
        middle = (low + high) / 2

        def is_paid(one: _Try) -> bool:
            if one.score is None:
                return False
            if not declared:
                return one.score > middle
            partly = self.golds[one.row].kind == "program" and one.case.kind not in programs.ANSWERLESS  # type: ignore[union-attr]
            return one.score >= high - EPSILON if partly else one.score > low + EPSILON

        def is_lost(one: _Try) -> bool:
            return one.score is None or (one.score < high - EPSILON if declared else one.score <= middle)

        paid = [one for one in tried if not one.case.right and is_paid(one)]
        lost = [one for one in right if is_lost(one)]
        never = self._never(right, lost) if not declared else []
        lost = [one for one in lost if one.case.kind not in never]
        return replace(
            audit,
            paid=self._mistakes(tried, paid),
            lost=self._mistakes(tried, lost),
            paid_rows=len({one.row for one in paid}),
            lost_rows=len({one.row for one in lost}),
            unread=never,
        )

    def _depends_on_row(self, tried: Sequence[_Try]) -> bool:
        """Whether any text earns another score beside another row's answer."""
        seen: dict[str, float] = {}
        scored = ((one.case.text, one.score) for one in tried if one.score is not None)
        return any(seen.setdefault(text, score) != score for text, score in scored)

    def _never(self, right: Sequence[_Try], lost: Sequence[_Try]) -> list[str]:
        kinds = dict.fromkeys(one.case.kind for one in right)
        return [k for k in kinds if sum(o.case.kind == k for o in right) == sum(o.case.kind == k for o in lost)]

    def _mistakes(self, tried: Sequence[_Try], found: Sequence[_Try]) -> list[Mistake]:
        out = []
        for kind in dict.fromkeys(one.case.kind for one in found):
            of = [one for one in found if one.case.kind == kind]
            shortest = min(of, key=lambda one: len(one.case.text))
            gold = self.golds[shortest.row]
            out.append(
                Mistake(
                    kind,
                    len({one.row for one in of}),
                    len({one.row for one in tried if one.case.kind == kind}),
                    shortest.case.text,
                    gold.text if gold is not None and gold.kind != "program" else "",
                    shortest.score,
                )
            )
        return out
