r"""The same answers read strictly and leniently, for evaluations alone: a gain in format then differs from one in
correctness. Not for training: what reads leniently is easier to satisfy by accident.

A lenient reading finds the last answer wherever and however it is written; a strict one wants it in the form asked for.
What the strict reading of a pair passes, the lenient one passes too. Each reads one candidate only, so that a list of
answers is one guess.
"""

import re
from collections.abc import Sequence
from typing import Any

from reward_fns.countdown import MAX_CHARACTERS, arithmetic, countdown
from reward_fns.math_equivalence import math_equivalence
from reward_fns.reading.final_answer import after_thinking
from reward_fns.sort_letters import sort_letters
from reward_fns.text import exact_match, number_match

WINDOW = 2_000  # characters at the end of a completion that are read
# Deciding function: which reading its twin is, and the twin's name here.
OTHER_READINGS = {
    "countdown": ("lenient", "countdown_anywhere"),
    "sort_letters": ("lenient", "sorted_anywhere"),
    "exact_match": ("lenient", "answer_at_the_end"),
    "number_match": ("strict", "marked_number"),
    "math_equivalence": ("strict", "boxed_equivalence"),
}

_EXPRESSION = re.compile(r"[\d(][\d+\-*/() ]*[\d)]")
_WORD = re.compile(r"[^\W\d_]+")
_AROUND = " \t\n.,;:!?\"'`*_()[]{}$"


def countdown_anywhere(completion: str, numbers: Sequence[int], target: int, use_all: bool = True, **row: Any) -> float:
    """1 where `countdown` gives 1, or where the last expression with an operator in the text reaches the target."""
    if countdown(completion, numbers, target, use_all):
        return 1.0
    text = arithmetic((after_thinking(completion) or "")[-WINDOW:])
    found = [text for text in _EXPRESSION.findall(text) if re.search(r"[+\-*/]", text)]
    return countdown(found[-1], numbers, target, use_all) if found and len(found[-1]) <= MAX_CHARACTERS else 0.0


def sorted_anywhere(completion: str, letters: str, **row: Any) -> float:
    """1 where the last word of the text is the letters in order, in either case, whatever is around it."""
    words = _WORD.findall(completion[-WINDOW:])
    return max(sort_letters(completion, letters), sort_letters(words[-1].lower(), letters.lower()) if words else 0.0)


def answer_at_the_end(completion: str, answer: Any, ignore_case: bool = False, **row: Any) -> float:
    """1 where the text ends with the answer as words of their own; case and punctuation around it are ignored.

    An answer that begins with a digit is not found at the end of another number: 5 is not in 3.5, -5 or 1/5.
    """
    if exact_match(completion, answer, ignore_case):
        return 1.0
    text = after_thinking(completion) or ""
    expected, given = (str(text).strip(_AROUND).casefold() for text in (answer, text[-WINDOW:]))
    before = r"[\w.,/+\-−]" if expected[:1].isdigit() else r"\w"
    return float(bool(expected) and re.search(rf"(?<!{before}){re.escape(expected)}\Z", given) is not None)


def marked_number(
    completion: str, answer: Any, tolerance: float | None = None, relative: float = 0.0, **row: Any
) -> float:
    r"""1 where `number_match` gives 1 and the number is in a form that can be asked for: ####, <answer> or \boxed."""
    return number_match(completion, answer, tolerance, relative, form="marked")


def boxed_equivalence(completion: str, answer: Any, **row: Any) -> float:
    r"""1 where `math_equivalence` gives 1 and the answer is in a \boxed{...}."""
    return math_equivalence(completion, answer, form="box")
