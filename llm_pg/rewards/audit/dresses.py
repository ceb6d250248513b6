"""Completions of one row for an audit: the right answer in honest dresses, and wrong ones that resemble it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from llm_pg.rewards.audit.probes import all_answers
from reward_fns.reading import items, numerals
from reward_fns.reading.final_answer import sentences
from reward_fns.registry import Gold


@dataclass(frozen=True)
class DressedCase:
    """A completion with its kind, and whether its answer is right."""

    kind: str
    text: str
    right: bool


@dataclass(frozen=True)
class _Dress:
    """A way of giving an answer {a}, where {o} is another. needs: what a function must read for it to be paid.
    kinds: the answers that it is for."""

    name: str
    template: str
    needs: frozenset[str]
    kinds: tuple[str, ...] = ("number", "formula", "text")

    def on(self, answer: str, other: str) -> str:
        return self.template.replace("{o}", other).replace("{a}", answer)


def _dress(name: str, template: str, needs: str, kinds: str = "number formula text") -> _Dress:
    return _Dress(name, template, frozenset(needs.split()), tuple(kinds.split()))


_MATHS = "number formula"
DRESSES = (
    _dress("alone", "{a}", "alone"),
    _dress("in bold", "**{a}**", "alone marks"),
    _dress("in code marks", "`{a}`", "alone marks"),
    _dress("between dollars", "${a}$", "alone marks", _MATHS),
    _dress("in LaTeX's brackets", "\\({a}\\)", "alone marks", _MATHS),
    _dress("in a sentence", "The answer is {a}.", "said"),
    _dress("in bold in a sentence", "So the answer is **{a}**.", "said marks"),
    _dress("after a bold heading", "**Final answer:** {a}", "said marks"),
    _dress("after two lines of work", "There are 2 and 3 of them.\nThat is all.\nAnswer: {a}", "said"),
    _dress("at the end of a sentence", "There are 3 of them at first, and in the end {a}.", "text", "number"),
    _dress("in answer tags", "<answer>{a}</answer>", "tag"),
    _dress("in answer tags after thinking", "<think>Is it {o}? No.</think>\n<answer>{a}</answer>", "tag thinking"),
    _dress("in a box", "\\boxed{{a}}", "box"),
    _dress("in a box in a sentence", "So the answer is $\\boxed{{a}}$.", "box"),
    _dress("after ####", "#### {a}", "hashes"),
    _dress("after two lines of work and ####", "There are 2 and 3 of them.\nThat is all.\n#### {a}", "hashes"),
    _dress("after thinking", "<think>It could be {o}.</think>\nThe answer is {a}.", "said thinking"),
    _dress("alone after thinking", "<think>The answer is {o}.</think>\n\n{a}", "alone thinking"),
    _dress("with a unit", "The answer is {a} apples.", "said unit", "number"),
    _dress("with a unit in LaTeX", "\\boxed{{a}\\text{ apples}}", "box unit", "number"),
)
_PLAINEST = ("alone", "in a sentence", "in answer tags", "in a box", "after ####")
_BARE = tuple(dress for dress in DRESSES if dress.name in _PLAINEST)
# What says another answer, or none, although the right one is in it. {a} is right, {o} another.
_DISGUISES = (
    ("another answer after thinking of the right one", "<think>The answer is {a}.</think>\nThe answer is {o}."),
    ("another answer in tags after thinking of it", "<think>It is {a}.</think>\n<answer>{o}</answer>"),
    ("the right answer in the thinking alone", "<think>The answer is {a}.</think>"),
    ("the right answer in thinking that does not end", "<think>The answer is {a}."),
    ("one answer or the other", "The answer is {o} or {a}."),
    ("the other or the one", "The answer is {a} or {o}."),
    ("both answers in a list", "{o}, {a}"),
    ("both answers in brackets", "The answer is ({a}, {o})."),
    ("both answers in a box", "\\boxed{{o}, {a}}"),
    ("that it is not the right one", "The answer is not {a}."),
)


def cases(
    gold: Gold, other: Gold | None, prompt: Any, row: Mapping[str, Any], rows: Sequence[Any]
) -> Iterator[DressedCase]:
    """The completions of one row whose answer is a text.

    gold, other: the answer of the row and that of another row, which differs; None where all rows have one answer.
    rows: others of the data, for "all answers at once".
    """
    answer, wrong = gold.text, other.text if other is not None else "nothing of that"
    for dress in DRESSES:
        if dress.needs <= gold.reads and gold.kind in dress.kinds and _fits(dress, gold):
            yield DressedCase(dress.name, dress.on(answer, wrong), True)
    for name, text in gold.more:
        yield DressedCase(name, text, True)
    yield from _written_otherwise(gold)
    yield DressedCase("nothing", "", False)
    yield DressedCase("white space", " \n\t ", False)
    echo = prompt if isinstance(prompt, str) else "\n".join(str(message.get("content", "")) for message in prompt)
    if not _says(echo, gold):
        yield DressedCase("the prompt", echo, False)
    yield DressedCase("all answers at once", " ".join(all_answers(row, rows)), False)
    if other is not None:
        for dress in DRESSES:
            if gold.kind in dress.kinds:
                yield DressedCase("another row's answer", dress.on(wrong, answer), False)
        for name, template in _DISGUISES:
            yield DressedCase(name, template.replace("{o}", wrong).replace("{a}", answer), False)
    for name, text in _lookalikes(gold):
        for dress in _BARE:
            if dress.needs <= gold.reads:
                yield DressedCase(name, dress.on(text, wrong), False)


def _fits(dress: _Dress, gold: Gold) -> bool:
    """Whether a dress is an honest one for this answer: dollars around dollars, or a unit behind a unit, are not."""
    if "dollars" in dress.name or "LaTeX's" in dress.name:
        return "$" not in gold.text and "\\(" not in gold.text
    return "unit" not in dress.needs or gold.text.lstrip("-").replace(".", "", 1).isdigit()


def _says(prompt: str, gold: Gold) -> bool:
    """Whether a prompt happens to name the answer, so that giving it back is no wrong answer for certain."""
    if gold.text in prompt:
        return True
    value = numerals.only(gold.text) if gold.kind == "number" else None
    if value is None:
        return False
    named = [numerals.last([sentence]) for sentence in sentences(prompt)]
    named += [numerals.only(digits.strip(".,")) for digits in re.findall(r"\d[\d.,]*", prompt)]
    return any(number is not None and _equal(number, value, gold) for number in named)


def _written_otherwise(gold: Gold) -> Iterator[DressedCase]:
    """A whole number with a point and a zero, and with its thousands grouped."""
    if gold.kind != "number" or not gold.text.lstrip("-").isdigit() or "said" not in gold.reads:
        return
    yield DressedCase("with a point and a zero", f"The answer is {gold.text}.0", True)
    if len(gold.text.lstrip("-")) > 3 and gold.text.lstrip("-")[0] != "0":
        yield DressedCase("with thousands grouped", f"The answer is {int(gold.text):,}.", True)


def _lookalikes(gold: Gold) -> Iterator[tuple[str, str]]:
    """Other numbers in which the digits of this one stand."""
    value = numerals.only(gold.text) if gold.kind == "number" else None
    if value is None or value.kind != "number":
        return
    text = gold.text.strip()
    found = {
        "a minus before it": text.removeprefix("-") if text.startswith("-") else f"-{text}",
        "one more": str(value.value + 1) if value.value.denominator == 1 else "",
    }
    if text.removeprefix("-").replace(",", "").replace(".", "", 1).isdigit():
        found |= _around_digits(text.removeprefix("-"), text)
    for name, other in found.items():
        read = numerals.only(other)
        same = read is not None and _equal(read, value, gold)
        comes_to_it = {"in a difference": Fraction(5), "with a root": Fraction(0)}.get(name) == abs(value.value)
        if other and not same and not comes_to_it:
            yield name, other


def _around_digits(digits: str, text: str) -> dict[str, str]:
    return {
        "a digit before it": f"9{digits}",
        "a digit behind it": f"{text}7",
        "as decimals of another": f"3.{digits}",
        "with other decimals": f"{text}.75",
        "as a denominator": f"1/{digits}",
        "as a numerator": f"{text}/7",
        "as a power of ten": f"{text}e3",
        "in a difference": f"10-{digits}",
        "with a root": f"{text}\\sqrt{{3}}",
    }


def differ(gold: Gold, other: Gold) -> bool:
    """Whether two answers are certainly not the same."""
    if "".join(gold.text.split()).casefold() == "".join(other.text.split()).casefold():
        return False
    values = [numerals.only(one.text, formula=one.kind == "formula") for one in (gold, other)]
    if values[0] is None or values[1] is None:
        return gold.kind != "formula" or (values[0] is None) == (values[1] is None)
    return not _equal(values[0], values[1], gold)


def _equal(first: items.Quantity, second: items.Quantity, gold: Gold) -> bool:
    return items.equal(first, second, *gold.tolerance) or items.equal(second, first, *gold.tolerance)
