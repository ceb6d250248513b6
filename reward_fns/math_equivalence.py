r"""A mathematical answer compared with another by meaning: 1/2 is 0.5 is \frac{2}{4}. By math-verify (extra `math`).

The comparison is symbolic algebra on model text, which a hostile text can make endless (94**56**35). So one candidate
is cut out of the completion, measured against bounds before anything parses it, and parsed as LaTeX only: the
plain-expression parser of the library evaluates Python. What passes the bounds and still runs on is the business of the
caller's deadline: use this function in the reward workers.
"""

import math
import re
import threading
from functools import lru_cache
from typing import Any

from reward_fns.registry import reward

WINDOW = 4_000  # characters at the end of a completion that are searched
MAX_CHARACTERS = 300
MAX_NESTING = 12
MAX_DIGITS = 30
MAX_EXPONENT = 1_000
MAX_EXPONENT_OF_SUM = 20  # of a bracket with letters in it, which algebra multiplies out
SECONDS = 2  # for the library's own alarm, which works in the main thread only

_OPEN, _CLOSE = "([{", ")]}"
_DELIMITED = re.compile(
    r"\$\$?([^$]{1,400})\$\$?|\\\(((?:(?!\\\)).){1,400})\\\)|\\\[((?:(?!\\\]).){1,400})\\\]", re.DOTALL
)
_ANSWER_MARK = re.compile(r"(?:####|(?:final answer|answer)\s*(?:is\s*:?|:|=))\s*([^\n]{1,400})", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_SPACING = re.compile(
    r"\\[,;:! ]|\\q?quad\b|(?<=\d)\{,\}(?=\d)|(?<=\d),(?=\d{3}(?!\d))|\\left(?![a-z])|\\right(?![a-z])"
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_UNBOUNDED = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim|[dt]?binom|choose|bigcup|bigcap|[bp]?mod|operatorname)(?![a-z])|!"
)
_CHOICE = re.compile(r"\\(?:pm|mp|lor|vee|cup|le|leq|ge|geq|lt|gt|in|ne|neq)(?![a-z])|\b(?:or|and)\b|[,;=<>]")
_ASSIGNED = re.compile(r"^\s*[a-zA-Z](?:_\{?\w+\}?)?\s*=(?!.*=)")
_EXPONENT = re.compile(r"[-+]?(?:\\?[a-zA-Z]+|[\d.]+)?")


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", requires=("math_verify",), extra="math")
def math_equivalence(completion: str, answer: Any, **row: Any) -> float:
    r"""1 when the final answer of the completion equals the column `answer` as mathematics; else 0.

    The final answer is the last \boxed{...}; else what follows the last "####" or "answer is"; else the last formula
    between dollar signs; else the last number. `answer` is LaTeX or plain, with or without a box.

    Range {0, 1}. Floor 0: one candidate counts, and one that offers a choice (a list, an interval, a chain of
    equations, plus-minus) earns 0 unless the answer is itself of that form. A candidate of over 300 characters, 12
    nested brackets, 30 digits in a row or an exponent over 1,000, with a tower of powers, a factorial or a sum, earns
    0 unread.
    """
    expected = str(answer).strip() if answer is not None else ""
    if not expected:
        raise ValueError(f"math_equivalence needs an answer in the column 'answer', and got {answer!r}.")
    expected = _SPACING.sub("", boxed(expected) or expected.strip("$ "))
    candidate = _SPACING.sub("", final_answer(completion))
    if candidate == expected:
        return 1.0
    if not candidate or not is_bounded(candidate):
        return 0.0
    if not _CHOICE.search(expected):
        candidate = _ASSIGNED.sub("", candidate)  # "x = 5" for 5
        if _CHOICE.search(candidate):
            return 0.0
    return float(_equivalent(candidate, expected))


def final_answer(completion: str) -> str:
    """The one candidate that is compared; "" without any. The docstring of `math_equivalence` has the order."""
    text = completion[-WINDOW:]
    box = boxed(text)
    if box is not None:
        return box
    marks = _ANSWER_MARK.findall(text)
    if marks:
        text = marks[-1]
        if "$" not in text and "\\(" not in text:
            numbers = _NUMBER.findall(text)
            if len(numbers) == 1 and _WORD.search(text):  # "72 dollars"
                return str(numbers[0])
            return str(text).strip().rstrip(".").strip()
    formulas = _DELIMITED.findall(text)
    if formulas:
        return "".join(formulas[-1]).strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, brackets matched; None without one that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if depth == 0:
                return text[begin:place].strip()
            depth -= 1
    return None


def is_bounded(candidate: str) -> bool:
    """Whether a candidate is small enough to hand to computer algebra (the bounds are this module's constants)."""
    if len(candidate) > MAX_CHARACTERS or re.search(rf"\d{{{MAX_DIGITS + 1}}}", candidate):
        return False
    if _UNBOUNDED.search(candidate):
        return False
    depth = deepest = 0
    for character in candidate:
        depth += (character in _OPEN) - (character in _CLOSE)
        deepest = max(deepest, depth)
    return deepest <= MAX_NESTING and _largest_power(candidate.replace("**", "^")) <= MAX_EXPONENT


def _largest_power(text: str) -> float:
    """The largest power in `text`, powers of powers multiplied; infinite where it is not bounded by reading."""
    largest = 1.0
    for place, character in enumerate(text):
        if character != "^":
            continue
        base, (exponent, after) = _bracket_before(text, place), _exponent_after(text, place + 1)
        power = math.prod(float(number) for number in re.findall(r"\d+(?:\.\d+)?", exponent) if float(number) > 1)
        if "^" in exponent or text[after:].lstrip().startswith("^"):
            return math.inf
        if power > MAX_EXPONENT_OF_SUM and re.search("[a-zA-Z]", base):
            return math.inf
        largest = max(largest, power * _largest_power(base))
    return largest


def _bracket_before(text: str, end: int) -> str:
    """The bracketed group that ends right before `end`, without its brackets; "" without one."""
    end = len(text[:end].rstrip())
    depth = 0
    for place in range(end - 1, -1, -1):
        depth += (text[place] in _CLOSE) - (text[place] in _OPEN)
        if depth == 0:
            return text[place + 1 : end - 1] if place < end - 1 else ""
    return ""


def _exponent_after(text: str, start: int) -> tuple[str, int]:
    """The bracketed group or the one sign that follows `start`, and where it ends."""
    start = len(text) - len(text[start:].lstrip())
    if start < len(text) and text[start] in _OPEN:
        depth = 0
        for place in range(start, len(text)):
            depth += (text[place] in _OPEN) - (text[place] in _CLOSE)
            if depth == 0:
                return text[start + 1 : place], place + 1
        return text[start + 1 :], len(text)
    match = _EXPONENT.match(text, start)
    end = match.end() if match else start
    return text[start:end], end


@lru_cache(maxsize=4096)
def _equivalent(candidate: str, expected: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    found = [
        parse(
            f"${text}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=seconds,  # type: ignore[arg-type]
        )
        for text in (expected, candidate)
    ]
    return bool(found[0] and found[1] and verify(found[0], found[1], timeout_seconds=seconds))
