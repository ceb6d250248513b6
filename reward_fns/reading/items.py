"""What is read of a text: numbers with their units, and the places in its tokens where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from reward_fns.reading.tokens import Token

Kind = Literal["number", "time", "ratio"]


@dataclass(frozen=True)
class Quantity:
    """A number that was read.

    value: exact; of a time the seconds since midnight, of a ratio a/b. unit: its canonical unit ("" where it has none
    that is known, "%" for per cent). meridiem: "am" or "pm" of a time that says so.
    """

    value: Fraction
    kind: Kind = "number"
    unit: str = ""
    meridiem: str = ""


def equal(given: Quantity, gold: Quantity, tolerance: float = 0.0, relative: float = 0.0) -> bool:
    """Whether two quantities are the same: |given - gold| <= max(tolerance, relative * |gold|), kinds and units alike.

    A unit counts where both have one that is known: 5 kg is not 5 g, and is 5. Per cent is 1/100 or a unit: 25 % is
    25 %, 25 and 0.25, and not 0.25 %. A time without am or pm in `gold` is either; "18:30" is "6:30 pm".
    """
    if given.kind != gold.kind:
        return False
    if given.kind == "time":
        same = given.value == gold.value
        return same or (not gold.meridiem and given.meridiem == "pm" and given.value - 43_200 == gold.value)
    if given.unit and gold.unit and given.unit != gold.unit and "%" not in (given.unit, gold.unit):
        return False
    values = [given.value]
    wanted = [gold.value]
    if (given.unit == "%") != (gold.unit == "%"):
        percent = values if given.unit == "%" else wanted
        percent.append(percent[0] / 100)
    return any(
        abs(value - target) <= max(Fraction(tolerance), Fraction(relative) * abs(target))
        for value in values
        for target in wanted
    )


@dataclass(frozen=True)
class Item:
    """A number (quantity) or an expression that is none (None), tokens [first, end) of a text."""

    quantity: Quantity | None
    first: int
    end: int
    words_before: int = 0


def is_glued(tokens: Sequence[Token], place: int) -> bool:
    """Whether no white space is between token `place` and the one before it."""
    return 0 < place < len(tokens) and tokens[place].start == tokens[place - 1].end


def at(tokens: Sequence[Token], place: int) -> Token:
    return tokens[place] if 0 <= place < len(tokens) else Token("end", "", -1, -1)


OPENS = ("(", "[", "{", "|")
CLOSES = (")", "]", "}", "|")
