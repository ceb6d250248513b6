"""Short answers compared with a column: the whole text, or the last number in it."""

import math
import re
from decimal import Decimal
from typing import Any

from reward_fns.registry import reward

# A number as people write it: thousands by commas, decimals, an exponent of at most three digits.
# A minus right after a word or a bracket is a difference ("5-3"), not a sign.
NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?",
    re.ASCII,
)
NUMBER_WINDOW = 2_000  # characters at the end of a completion that are searched, so that huge output costs no more
MAX_DIGITS = 60


@reward(low=0.0, high=1.0, floor=0.0, checks="answer")
def exact_match(completion: str, answer: Any, ignore_case: bool = False, **row: Any) -> float:
    """1 when the completion is the answer and nothing else, surrounding white space aside; else 0.

    Range {0, 1}. Floor 0: a list of every answer is not the answer, and neither is an echo of the prompt unless the
    prompt is itself the answer. `answer` (a column) is compared as text; an empty one is refused, since an empty
    completion would earn it.
    """
    expected = _answer_text(answer)
    given = completion.strip()
    if ignore_case:
        return float(given.casefold() == expected.casefold())
    return float(given == expected)


@reward(low=0.0, high=1.0, floor=0.0, checks="answer")
def number_match(completion: str, answer: Any, tolerance: float = 1e-9, relative: float = 0.0, **row: Any) -> float:
    """1 when the last number in the completion equals the answer; else 0.

    Equal means |x - answer| <= max(tolerance, relative * |answer|). Numbers may have thousands commas, a sign,
    decimals and an exponent; currency and per-cent signs around them are ignored. `answer` (a column) is a number or a
    text whose last number counts, so that GSM8K's "... #### 72" works unchanged.

    Range {0, 1}. Floor 0: of a list of every number only its last entry counts, which is one guess. Only the last
    2,000 characters are read.
    """
    expected = answer if isinstance(answer, (int, float)) else last_number(_answer_text(answer))
    if expected is None or isinstance(expected, bool) or not math.isfinite(expected):
        raise ValueError(f"number_match needs a finite number in the column 'answer', and got {answer!r}.")
    given = last_number(completion)
    if given is None:
        return 0.0
    target = Decimal(expected) if isinstance(expected, int) else Decimal(repr(float(expected)))
    if isinstance(expected, Decimal):
        target = expected
    margin = max(Decimal(repr(float(tolerance))), abs(target) * Decimal(repr(float(relative))))
    return float(abs(given - target) <= margin)


def last_number(text: str) -> Decimal | None:
    """The last number in the last 2,000 characters of `text`, exact; None without one or over 60 digits."""
    last = None
    for match in NUMBER.finditer(text[-NUMBER_WINDOW:]):
        last = match.group()
    if last is None or len(last) > MAX_DIGITS:
        return None
    return Decimal(last.replace(",", "").replace("−", "-"))


def _answer_text(answer: Any) -> str:
    text = "" if answer is None else str(answer).strip()
    if not text:
        raise ValueError(
            f"The column 'answer' must not be empty, and got {answer!r}: an empty completion would earn it."
        )
    return text
