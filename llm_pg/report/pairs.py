"""Held-out answers compared prompt by prompt: of one run before and after, and of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

from ..doctor.evidence import prompt_of

MOST = 40  # pairs of a kind that the page shows
LONGEST = 600  # characters of a text
KINDS = {
    "gained": "wrong before, right after",
    "lost": "right before, wrong after",
    "both": "right both times",
    "neither": "wrong both times",
}


@dataclass
class Pairs:
    """Prompts that both evaluations answered.

    Attributes:
        of_kind: for each of KINDS the (prompt, first answer, second answer).
    """

    of_kind: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def counts(self) -> dict[str, int]:
        return {kind: len(found) for kind, found in self.of_kind.items()}

    @property
    def p_value(self) -> float:
        """Of no difference, from the prompts on which the two differ: the exact test of McNemar (1947), two-sided."""
        gained, lost = len(self.of_kind["gained"]), len(self.of_kind["lost"])
        fewer, number = min(gained, lost), gained + lost
        return min(1.0, 2 * sum(comb(number, i) for i in range(fewer + 1)) / 2**number)

    def shown(self) -> list[tuple[str, str, int, list[tuple[str, str, str]]]]:
        """Of each kind that occurs its name, meaning and number, and some of its pairs."""
        return [
            (kind, KINDS[kind], len(found), [(shortened(a), shortened(b), shortened(c)) for a, b, c in found[:MOST]])
            for kind, found in self.of_kind.items()
            if found
        ]


def pair(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> Pairs | None:
    """The answers of two evaluations to the same prompts; None where they share none.

    Args:
        first: its examples, each a prompt, a completion and whether it passed.
        second: of the other evaluation.
    """
    answers: dict[str, list[dict[str, Any]]] = {}
    for example in second:
        answers.setdefault(str(example.get("prompt")), []).append(example)
    pairs, number = Pairs(), 0
    for one in first:
        waiting = answers.get(str(one.get("prompt")))
        if not waiting:
            continue
        other = waiting.pop(0)  # a prompt that occurs twice has its answers in their order
        kind = {(0, 1): "gained", (1, 0): "lost", (1, 1): "both", (0, 0): "neither"}[
            int(bool(one.get("passed"))), int(bool(other.get("passed")))
        ]
        texts = (prompt_of(one), str(one.get("completion")), str(other.get("completion")))
        pairs.of_kind[kind].append(texts)
        number += 1
    return pairs if number else None


def shortened(text: str) -> str:
    """The beginning and the end of a long text: an answer is often at the end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


@dataclass(frozen=True)
class Beside:
    """Prompts that several evaluations answered.

    Attributes:
        title: what their answers have in common. number: of them in all.
        some: the prompt, and each evaluation's answer with whether it passed; at most MOST.
    """

    title: str
    number: int
    some: list[tuple[str, list[tuple[str, bool]]]]


def side_by_side(evaluations: Sequence[Sequence[dict[str, Any]]]) -> list[Beside]:
    """The answers of several evaluations to the prompts that all of them share: first those of which some passed and
    others did not, then those that all passed, then those that none did. [] where they share none.

    Args:
        evaluations: the examples of each, two or more of them; a prompt that occurs twice is taken once.
    """
    if len(evaluations) < 2:
        return []
    answers = [{str(e.get("prompt")): e for e in examples} for examples in evaluations]
    kinds: dict[str, list[tuple[str, list[tuple[str, bool]]]]] = {
        "right in some and wrong in others": [],
        "right in all": [],
        "wrong in all": [],
    }
    for prompt, example in answers[0].items():
        given = [example, *(found[prompt] for found in answers[1:] if prompt in found)]
        if len(given) < len(answers):
            continue
        passed = {bool(each.get("passed")) for each in given}
        title = list(kinds)[0 if len(passed) == 2 else 1 if True in passed else 2]
        texts = [(shortened(str(each.get("completion"))), bool(each.get("passed"))) for each in given]
        kinds[title].append((shortened(prompt_of(example)), texts))
    return [Beside(title, len(found), found[:MOST]) for title, found in kinds.items() if found]
