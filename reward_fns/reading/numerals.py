r"""Numbers as people and models write them, read whole or not at all.

A numeral is read with its sign (ASCII or Unicode), its grouping (comma, point, space, underscore, apostrophe), a
decimal comma where it can be nothing else, currency, percent sign and unit; as a fraction (3/4, \frac{3}{4}, 1 3/4,
¾), a power or scientific notation (10^3, 1.5e3, 1.5 \times 10^3), in a base (101_2), as a time or a ratio (12:30,
3:4), or as a word (seventy-two). Values are exact fractions. What is a piece of something larger is no number: the 3
of 7\sqrt{3}, the 5 of 10-5, the 30 of "2 hours 30 minutes" or of "1, 20, 30", the 2 of (1, 2), [1, 2) or {1, 2}, the
72 of "not 72". Of an equation the side that is a number counts.

`only` reads a text that must hold one number, `last` the last one of a text, `leading` the one that a text begins with.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from reward_fns.reading.items import OPENS, Item, Kind, Quantity, at, is_glued
from reward_fns.reading.joining import (
    groups_of,
    is_pair,
    join_equations,
    join_expressions,
    join_groups,
    join_lists,
)
from reward_fns.reading.notation import plain
from reward_fns.reading.tokens import Token, in_base, power_of, read_tokens
from reward_fns.reading.words import parse_words, scale_of, unit_of


def only(text: str, formula: bool = False) -> Quantity | None:
    """The number of a text that holds one and no other; None where it holds none, several, or an expression.

    formula: the text is mathematics, in which "5!" is a factorial and not an exclamation.
    """
    found = _without_remarks(text, formula)
    if len(found) == 1:
        return found[0].quantity
    return parse_words(text, _quantity) if not found else None


def last(sentences: Sequence[str]) -> Quantity | None:
    """The last number of the last sentence that holds one; None where that is a piece of an expression or of a list.

    Words count at the end of the last sentence, but for "one" ("that is the right one"), and anywhere where no sentence
    has digits.
    """
    if sentences and not _without_remarks(sentences[0]):
        end, quantity = (parse_words(text, _quantity) for text in (" ".join(sentences[0].split()[-3:]), sentences[0]))
        if end is not None and quantity is not None and abs(quantity.value) != 1:
            return quantity
    for sentence in sentences:
        found = _without_remarks(sentence)
        if found:
            return found[-1].quantity
    for sentence in sentences:
        quantity = parse_words(sentence, _quantity)
        if quantity is not None:
            return quantity
    return None


def leading(text: str) -> Quantity | None:
    """The number right at the beginning of a text ("72 of 80 eggs"), else the last in it ("that 3 boxes hold 72").

    None where a range begins it ("1 to 2").
    """
    found = _without_remarks(text)
    if not found:
        return parse_words(text, _quantity)
    if found[0].words_before > 1:
        return found[-1].quantity
    return None if _RANGE.match(plain(text)) else found[0].quantity


def holds_digits(text: str) -> bool:
    """Whether a text holds a number in digits, or an expression of them."""
    return bool(_without_remarks(text))


def written(quantity: Quantity) -> str:
    """A quantity as text that reads as the same one."""
    value = quantity.value
    if quantity.kind == "time":
        minutes, seconds = divmod(int(value), 60)
        end = f":{seconds:02d}" if seconds else ""
        return f"{minutes // 60}:{minutes % 60:02d}{end} {quantity.meridiem}".strip()
    if quantity.kind == "ratio":
        return f"{value.numerator}:{value.denominator}"
    unit = quantity.unit if quantity.unit in ("", "%") else f" {quantity.unit}"
    return f"{value}{unit}"


def is_value(text: str) -> bool:
    """Whether a line is one number with at most a unit of three words, and no sentence."""
    found = _items(text)
    words = len(re.findall(r"[^\W\d_]+", text))
    return len(found) == 1 and found[0].quantity is not None and words <= 3 and found[0].words_before == 0


def _quantity(value: int, unit: str) -> Quantity:
    return Quantity(Fraction(value), unit=unit)


_REMARK = re.compile(r"\s\([^()\n]*\)")
_RANGE = re.compile(
    r"\W*(?:between\s+\S+\s+and|(?:from\s+)?[\d.,/]*\d\s*(?:%|[a-z]+)?\s+(?:to|through|thru))\s+\W*\d"
    r"(?!\w*\s+(?:significant|decimal))",
    re.IGNORECASE,
)
_CURRENCIES = {
    "$": "dollar", "USD": "dollar", "US$": "dollar", "€": "euro", "EUR": "euro", "£": "pound sterling",
    "GBP": "pound sterling", "¥": "yen", "JPY": "yen", "₹": "rupee", "INR": "rupee", "Rs": "rupee", "Rs.": "rupee",
}  # fmt: skip
_UNITS_OF_ONE_LETTER = frozenset("mgslLhKCFNJWVATtdkMB")


def _without_remarks(text: str, formula: bool = False) -> list[Item]:
    """The items outside brackets ("72 (8 boxes of 9)"), or inside where there are none outside, or a pair is there."""
    bare = _REMARK.sub(lambda remark: remark.group() if _is_collection(remark.group()) else "", text)
    return _items(bare, formula) or _items(text, formula)


def _is_collection(text: str) -> bool:
    """Whether a text in brackets is a tuple or an interval: (1, 2), (1,5), (x, 3)."""
    tokens = read_tokens(plain(text))
    return bool(groups_of(tokens)) or (len(tokens) == 3 and is_pair(tokens[1]))


def _items(text: str, formula: bool = False) -> list[Item]:
    """Numbers and expressions of a text, in order."""
    tokens = read_tokens(plain(text))
    items = join_groups(tokens, join_expressions(tokens, _numerals(tokens, formula)))
    items = join_lists(tokens, join_equations(tokens, items))
    words = [token.kind == "word" for token in tokens]
    return [replace(item, words_before=sum(words[: item.first])) for item in items]


def _numerals(tokens: Sequence[Token], formula: bool) -> list[Item]:
    """Each numeral with its sign, currency and unit, before operators around it are looked at."""
    items: list[Item] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.kind == "cmd" or (token.kind == "other" and token.text == "±"):
            end = _past_group(tokens, place + 1) if token.text == r"\sqrt" else place + 1
            items.append(Item(None, place, end))  # π, a root: an operand that is no number
        elif token.kind in ("num", "frac") and not (is_glued(tokens, place) and tokens[place - 1].kind == "word"):
            items.append(_numeral(tokens, place, formula, after=items[-1].end if items else 0))
        else:
            place += 1
            continue
        place = items[-1].end
    return items


def _past_group(tokens: Sequence[Token], place: int) -> int:
    """The place after a bracketed group, or after one token."""
    if at(tokens, place).text not in ("{", "("):
        return place + 1
    depth = 0
    for here in range(place, len(tokens)):
        depth += (tokens[here].text in ("{", "(")) - (tokens[here].text in ("}", ")"))
        if depth == 0:
            return here + 1
    return len(tokens)


def _numeral(tokens: Sequence[Token], place: int, formula: bool, after: int) -> Item:
    """The numeral whose digits begin at `place`. after: where the last item ends; nothing before is of this one."""
    in_word = is_glued(tokens, place) and tokens[place - 1].text == "_"
    value, kind, end = _core(tokens, place)
    negative, first, unit = _before(tokens, place, after)
    meridiem = ""
    if at(tokens, end).text == "%":
        unit, end = "%", end + 1
    if at(tokens, end).kind == "cur":
        unit, end = _CURRENCIES.get(tokens[end].text, ""), end + 1
    word = at(tokens, end)
    glued = is_glued(tokens, end)
    if word.kind == "word":
        scale = scale_of(word.text, glued, currency=bool(unit) and unit != "%")
        if scale and value is not None:
            value, end = value * scale, end + 1
            word, glued = at(tokens, end), False
        half = re.sub(r"[ .]", "", "".join(token.text for token in tokens[end : end + 3]).lower())[:2]
        if half in ("am", "pm") and kind == "time":
            meridiem = half
        is_letter = len(word.text) == 1 and word.text not in _UNITS_OF_ONE_LETTER
        if is_letter and (glued or formula or word.text in "xyzn"):
            value = None  # 3x, 2 n: algebra
        unit = unit or _unit_after(tokens, end)
    if glued and (at(tokens, end).kind == "base" or (formula and at(tokens, end).text == "!")):
        value = None
    if in_word or value is None:
        return Item(None, first, max(end, place + 1))
    if kind == "time" and meridiem == "pm" and value < 43_200:
        value += 43_200
    if kind == "time" and meridiem == "am" and value >= 43_200:
        value -= 43_200
    return Item(Quantity(-value if negative else value, kind, unit, meridiem), first, end)


def _core(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, Kind, int]:
    """Value, kind and end of an unsigned numeral of one or more tokens."""
    value, end = _powered(tokens, place)
    is_plain = end == place + 1 and tokens[place].kind == "num"
    mixed = _mixed(tokens, end) if is_plain and value is not None and value.denominator == 1 else None
    if mixed is not None:
        return (value or 0) + mixed[0], "number", mixed[1]
    text, following = at(tokens, end).text, at(tokens, end + 1)
    even = is_glued(tokens, end) == is_glued(tokens, end + 1)
    if text == "/" and following.kind in ("num", "frac") and even:
        under, past = _powered(tokens, end + 1)
        value = value / under if value is not None and under else None
        return (
            (None if at(tokens, past).text == "/" and at(tokens, past + 1).kind == "num" else value),
            "number",
            past,
        )
    if text == "*" and following.text == "10" and at(tokens, end + 2).kind == "power":
        ten, past = _powered(tokens, end + 1)
        return (value * ten if value is not None and ten is not None else None), "number", past
    if text == ":" and following.kind == "num" and even:
        return _colons(tokens, place)
    return value, "number", end


def _powered(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, int]:
    value, end = tokens[place].value, place + 1
    if at(tokens, end).kind == "base" and value is not None:
        value, end = in_base(tokens[place].text, int(tokens[end].text.strip("_{ }"))), end + 1
    if at(tokens, end).kind == "power":
        value, end = power_of(value, tokens[end].text), end + 1
        if at(tokens, end).kind == "power":
            return None, end + 1
    return value, end


def _mixed(tokens: Sequence[Token], place: int) -> tuple[Fraction, int] | None:
    """The proper fraction that follows a whole number: 1 3/4, 1 and 3/4, 1\\frac{3}{4}."""
    if at(tokens, place).text == "and":
        place += 1
    token = at(tokens, place)
    if token.kind == "frac":
        value, end = token.value, place + 1
    elif token.kind == "num" and at(tokens, place + 1).text == "/" and at(tokens, place + 2).kind == "num":
        if not (is_glued(tokens, place + 1) and is_glued(tokens, place + 2)):
            return None
        above, below = token.value, tokens[place + 2].value
        value, end = (above / below if above is not None and below else None), place + 3
    else:
        return None
    return (value, end) if value is not None and 0 < value < 1 else None


def _colons(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, Kind, int]:
    """A time (12:30, 12:30:15) or a ratio (3:4)."""
    parts, end = [tokens[place]], place + 1
    while at(tokens, end).text == ":" and at(tokens, end + 1).kind == "num":
        parts.append(tokens[end + 1])
        end += 2
    if any(part.value is None for part in parts) or len(parts) > 3:
        return None, "ratio", end
    numbers = [part.value or Fraction(0) for part in parts]
    clock = [len(part.text) == 2 and part.text.isdigit() and int(part.text) < 60 for part in parts[1:]]
    if all(clock) and parts[0].text.isdigit() and int(parts[0].text) < 25:
        seconds = [3600, 60, 1]
        return sum((n * s for n, s in zip(numbers, seconds, strict=False)), Fraction(0)), "time", end
    return (numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else None), "ratio", end


_STARTS = (":", ",", ";", '"', "'", "?", "!", ".", ">", "#", *OPENS)


def _before(tokens: Sequence[Token], place: int, after: int) -> tuple[bool, int, str]:
    """Whether a minus belongs to the numeral at `place`, its first token, and its currency."""
    first, negative, unit, signed = place, False, "", False
    while first > after:
        token = tokens[first - 1]
        if token.kind == "cur" and not unit:
            unit = _CURRENCIES.get(token.text, "money")
        elif token.text in ("-", "+") and not signed and _is_sign(tokens, first - 1, after):
            negative, signed = token.text == "-", True
        else:
            break
        first -= 1
    word = at(tokens, first - 1)
    named = first > after and word.kind == "word" and word.text.lower() in ("minus", "negative")
    if named and not signed and (first - 1 == after or at(tokens, first - 2).kind not in ("num", "frac")):
        return True, first - 1, unit
    return negative, first, unit


def _is_sign(tokens: Sequence[Token], place: int, after: int) -> bool:
    """Whether the - or + at `place` is a sign, and neither an operator, a dash nor a bullet inside a text."""
    if place == after and place > 0:
        return False  # right after another number
    previous = at(tokens, place - 1)
    if previous.kind == "end" or previous.kind in ("eq", "op", "cur") or previous.text in _STARTS:
        return True
    if previous.kind in ("num", "frac", "power", "base", "cmd") or previous.text in (")", "]", "}"):
        return False
    if is_glued(tokens, place) or (len(previous.text) == 1 and not is_glued(tokens, place + 1)):
        return False  # word-5, x - 5
    return is_glued(tokens, place + 1) and not (
        len(previous.text) == 1 and previous.text.islower() and previous.text != "a"
    )


def _unit_after(tokens: Sequence[Token], place: int) -> str:
    """The known unit of the words that follow a number, with its power: kg, m^2, km/h; "" for other words."""
    word = at(tokens, place).text
    square = {"square": "^2", "sq": "^2", "cubic": "^3"}.get(word.lower())
    name = unit_of(at(tokens, place + 1).text if square else word)
    if not name:
        return ""
    following = at(tokens, place + 1)
    power = following.text.strip("^{} ") if following.kind == "power" else ""
    per = at(tokens, place + 1).text
    if per in ("/", "per") and at(tokens, place + 2).kind == "word":
        return f"{name}/{unit_of(at(tokens, place + 2).text) or at(tokens, place + 2).text.lower()}"
    return name + (square or (f"^{power}" if power else ""))
