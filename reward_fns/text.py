"""Short answers compared with a column: the whole text, or the number that it gives as its answer."""

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from reward_fns.reading import items, numerals
from reward_fns.reading.final_answer import FORMS, FinalAnswer, Form, clean, final_answer, sentences
from reward_fns.reading.items import Quantity
from reward_fns.registry import READS, Gold, reward

FLOAT_DIGITS = 1e-9  # relative; a column of floats holds 0.1 + 0.2
LONGEST_GOLD = 200  # characters of an answer that is looked for in texts
GOLD_KEYS = ("ground_truth", "answer", "solution", "target")


def check_text(answer: Any, **row: Any) -> None:
    """ValueError for a gold answer that an empty completion would match."""
    _answer_text(answer)


def check_number(answer: Any, **row: Any) -> None:
    """ValueError for a gold answer that is no single number."""
    gold(answer)


def text_gold(answer: Any, **row: Any) -> Gold | None:
    """The gold answer of a row of `exact_match`; None where it has several lines, or over 200 characters."""
    text = _answer_text(answer)
    reads = READS - {"said", "text", "unit"}
    return Gold(text, _kind(text), reads) if len(text) <= LONGEST_GOLD and "\n" not in text else None


def number_gold(
    answer: Any, tolerance: float | None = None, relative: float = 0.0, form: Form = "any", **row: Any
) -> Gold:
    """The gold answer of a row of `number_match`, as it is there where it is short."""
    quantity = gold(answer)
    found = final_answer(answer).text if isinstance(answer, str) else ""
    text = found if numerals.is_value(found) else numerals.written(quantity)
    return Gold(text, "number", reads_of(form), (tolerance or 0.0, relative))


def reads_of(form: Form) -> frozenset[str]:
    """The ways of giving an answer that a reader by `final_answer` pays when one form is asked for."""
    alone = {"alone"} if form == "any" else set()
    return READS & {*FORMS[form], *alone, "marks", "thinking", "unit"}


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_text, special_tokens=True, gold=text_gold)
def exact_match(completion: str, answer: Any, ignore_case: bool = False, **row: Any) -> float:
    r"""1 when the completion is the answer and nothing else, surrounding white space aside; else 0.

    Read is what follows the thinking; inside <answer>, \boxed or a last line of #### where one is; without the markdown
    around it. A sentence that holds the answer is not the answer.

    Range {0, 1}. Floor 0: a list of every answer is not the answer, and neither is an echo of the prompt unless the
    prompt is itself the answer. `answer` (a column) is compared as text; an empty one is refused, since an empty
    completion would earn it.
    """
    expected = _answer_text(answer)
    if completion.strip() == expected:
        return 1.0
    given = final_answer(completion, ("tag", "box", "hashes", "text"))
    texts = (given.text, clean(given.text))
    if ignore_case:
        return float(expected.casefold() in [text.casefold() for text in texts])
    return float(expected in texts)


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_number, special_tokens=True, gold=number_gold)
def number_match(
    completion: str,
    answer: Any,
    tolerance: float | None = None,
    relative: float = 0.0,
    form: Form = "any",
    **row: Any,
) -> float:
    r"""1 when the number that the completion gives as its answer equals the column `answer`; else 0.

    The final answer is found by `reward_fns.reading.final_answer`: after the thinking, in <answer>, \boxed or after
    ####, after "the answer is", else the last number of the last sentence that has one. It is read by
    `reward_fns.reading.numerals`: signs, grouping, decimals, fractions, powers, percent, units, words; what is a piece
    of an expression (the 5 of 10-5) or one of a list is no answer. form: "any", or the one that counts: "marked" (one
    of the three), "tag", "box" or "hashes".

    `answer` is a number or a text that holds one, such as GSM8K's "... #### 72"; a list of one number and
    {"ground_truth": number} are understood. Equal means exactly equal, as fractions; with `tolerance` and `relative`
    |x - answer| <= max(tolerance, relative * |answer|). A float in the column is compared within 1e-9 of its size.

    Range {0, 1}. Floor 0: one number is read, which is one guess.

    Raises ValueError for an answer that is no single number.
    """
    expected = gold(answer)
    given = given_number(completion, form)
    if given is None:
        return 0.0
    if tolerance is None:
        tolerance, relative = 0.0, max(relative, FLOAT_DIGITS if isinstance(answer, float) else 0.0)
    return float(items.equal(given, expected, tolerance, relative))


def given_number(completion: str, form: Form = "any") -> Quantity | None:
    """The number that a completion gives as its answer; None where there is none, or what is there is no number."""
    return _number_of(final_answer(completion, form))


def _number_of(found: FinalAnswer) -> Quantity | None:
    if found.form == "text":
        return numerals.last(sentences(found.text))
    if found.form == "said":
        return numerals.leading(found.text)
    return numerals.only(found.text, formula=found.form == "box")


def gold(answer: Any) -> Quantity:
    """The number that a gold answer says; ValueError where it says none, or several."""
    given = answer
    if isinstance(answer, Mapping):
        answer = next((answer[key] for key in GOLD_KEYS if key in answer), None)
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, (int, float, Decimal, Fraction)) and not isinstance(answer, bool) and math.isfinite(answer):
        return Quantity(Fraction(repr(answer) if isinstance(answer, float) else answer))
    quantity = _gold_text(answer.strip()) if isinstance(answer, str) else None
    if quantity is None:
        raise ValueError(
            f"number_match needs one number in the column 'answer', and got {_shown(given)}. A text is read after "
            "####, in \\boxed or <answer>, else as one number with its unit; lists, expressions and roots are none: "
            "use math_equivalence for those, or map the column."
        )
    return quantity


@lru_cache(maxsize=16_384)
def _gold_text(text: str) -> Quantity | None:
    found = final_answer(text)
    if found.form == "text":
        return numerals.only(found.text)
    return _number_of(found)


def _kind(text: str) -> Literal["number", "text"]:
    quantity = numerals.only(text) if numerals.is_value(text) else None
    return "number" if quantity is not None and quantity.kind == "number" else "text"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _answer_text(answer: Any) -> str:
    text = "" if answer is None else str(answer).strip()
    if not text:
        raise ValueError(
            f"The column 'answer' must not be empty, and got {answer!r}: an empty completion would earn it."
        )
    return text
