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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from reward_fns.reading.notation import plain
from reward_fns.reading.tokens import DECIMAL_COMMA, Token, in_base, power_of, read_tokens
from reward_fns.reading.words import parse_words, scale_of, unit_of

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


@dataclass(frozen=True)
class _Item:
    """A number (quantity) or an expression that is none (None), tokens [first, end) of a text."""

    quantity: Quantity | None
    first: int
    end: int
    words_before: int = 0


def _without_remarks(text: str, formula: bool = False) -> list[_Item]:
    """The items outside brackets ("72 (8 boxes of 9)"), or inside where there are none outside, or a pair is there."""
    bare = _REMARK.sub(lambda remark: remark.group() if _is_collection(remark.group()) else "", text)
    return _items(bare, formula) or _items(text, formula)


def _is_collection(text: str) -> bool:
    """Whether a text in brackets is a tuple or an interval: (1, 2), (1,5), (x, 3)."""
    tokens = read_tokens(plain(text))
    return bool(_groups(tokens)) or (len(tokens) == 3 and _is_pair(tokens[1]))


def _items(text: str, formula: bool = False) -> list[_Item]:
    """Numbers and expressions of a text, in order."""
    tokens = read_tokens(plain(text))
    items = _join_groups(tokens, _join_expressions(tokens, _numerals(tokens, formula)))
    items = _join_lists(tokens, _join_equations(tokens, items))
    words = [token.kind == "word" for token in tokens]
    return [replace(item, words_before=sum(words[: item.first])) for item in items]


def _glued(tokens: Sequence[Token], place: int) -> bool:
    """Whether no white space is between token `place` and the one before it."""
    return 0 < place < len(tokens) and tokens[place].start == tokens[place - 1].end


def _at(tokens: Sequence[Token], place: int) -> Token:
    return tokens[place] if 0 <= place < len(tokens) else Token("end", "", -1, -1)


def _numerals(tokens: Sequence[Token], formula: bool) -> list[_Item]:
    """Each numeral with its sign, currency and unit, before operators around it are looked at."""
    items: list[_Item] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.kind == "cmd" or (token.kind == "other" and token.text == "±"):
            end = _past_group(tokens, place + 1) if token.text == r"\sqrt" else place + 1
            items.append(_Item(None, place, end))  # π, a root: an operand that is no number
        elif token.kind in ("num", "frac") and not (_glued(tokens, place) and tokens[place - 1].kind == "word"):
            items.append(_numeral(tokens, place, formula, after=items[-1].end if items else 0))
        else:
            place += 1
            continue
        place = items[-1].end
    return items


def _past_group(tokens: Sequence[Token], place: int) -> int:
    """The place after a bracketed group, or after one token."""
    if _at(tokens, place).text not in ("{", "("):
        return place + 1
    depth = 0
    for here in range(place, len(tokens)):
        depth += (tokens[here].text in ("{", "(")) - (tokens[here].text in ("}", ")"))
        if depth == 0:
            return here + 1
    return len(tokens)


def _numeral(tokens: Sequence[Token], place: int, formula: bool, after: int) -> _Item:
    """The numeral whose digits begin at `place`. after: where the last item ends; nothing before is of this one."""
    in_word = _glued(tokens, place) and tokens[place - 1].text == "_"
    value, kind, end = _core(tokens, place)
    negative, first, unit = _before(tokens, place, after)
    meridiem = ""
    if _at(tokens, end).text == "%":
        unit, end = "%", end + 1
    if _at(tokens, end).kind == "cur":
        unit, end = _CURRENCIES.get(tokens[end].text, ""), end + 1
    word = _at(tokens, end)
    glued = _glued(tokens, end)
    if word.kind == "word":
        scale = scale_of(word.text, glued, currency=bool(unit) and unit != "%")
        if scale and value is not None:
            value, end = value * scale, end + 1
            word, glued = _at(tokens, end), False
        half = re.sub(r"[ .]", "", "".join(token.text for token in tokens[end : end + 3]).lower())[:2]
        if half in ("am", "pm") and kind == "time":
            meridiem = half
        is_letter = len(word.text) == 1 and word.text not in _UNITS_OF_ONE_LETTER
        if is_letter and (glued or formula or word.text in "xyzn"):
            value = None  # 3x, 2 n: algebra
        unit = unit or _unit_after(tokens, end)
    if glued and (_at(tokens, end).kind == "base" or (formula and _at(tokens, end).text == "!")):
        value = None
    if in_word or value is None:
        return _Item(None, first, max(end, place + 1))
    if kind == "time" and meridiem == "pm" and value < 43_200:
        value += 43_200
    if kind == "time" and meridiem == "am" and value >= 43_200:
        value -= 43_200
    return _Item(Quantity(-value if negative else value, kind, unit, meridiem), first, end)


def _core(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, Kind, int]:
    """Value, kind and end of an unsigned numeral of one or more tokens."""
    value, end = _powered(tokens, place)
    is_plain = end == place + 1 and tokens[place].kind == "num"
    mixed = _mixed(tokens, end) if is_plain and value is not None and value.denominator == 1 else None
    if mixed is not None:
        return (value or 0) + mixed[0], "number", mixed[1]
    text, following = _at(tokens, end).text, _at(tokens, end + 1)
    even = _glued(tokens, end) == _glued(tokens, end + 1)
    if text == "/" and following.kind in ("num", "frac") and even:
        under, past = _powered(tokens, end + 1)
        value = value / under if value is not None and under else None
        return (
            (None if _at(tokens, past).text == "/" and _at(tokens, past + 1).kind == "num" else value),
            "number",
            past,
        )
    if text == "*" and following.text == "10" and _at(tokens, end + 2).kind == "power":
        ten, past = _powered(tokens, end + 1)
        return (value * ten if value is not None and ten is not None else None), "number", past
    if text == ":" and following.kind == "num" and even:
        return _colons(tokens, place)
    return value, "number", end


def _powered(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, int]:
    value, end = tokens[place].value, place + 1
    if _at(tokens, end).kind == "base" and value is not None:
        value, end = in_base(tokens[place].text, int(tokens[end].text.strip("_{ }"))), end + 1
    if _at(tokens, end).kind == "power":
        value, end = power_of(value, tokens[end].text), end + 1
        if _at(tokens, end).kind == "power":
            return None, end + 1
    return value, end


def _mixed(tokens: Sequence[Token], place: int) -> tuple[Fraction, int] | None:
    """The proper fraction that follows a whole number: 1 3/4, 1 and 3/4, 1\\frac{3}{4}."""
    if _at(tokens, place).text == "and":
        place += 1
    token = _at(tokens, place)
    if token.kind == "frac":
        value, end = token.value, place + 1
    elif token.kind == "num" and _at(tokens, place + 1).text == "/" and _at(tokens, place + 2).kind == "num":
        if not (_glued(tokens, place + 1) and _glued(tokens, place + 2)):
            return None
        above, below = token.value, tokens[place + 2].value
        value, end = (above / below if above is not None and below else None), place + 3
    else:
        return None
    return (value, end) if value is not None and 0 < value < 1 else None


def _colons(tokens: Sequence[Token], place: int) -> tuple[Fraction | None, Kind, int]:
    """A time (12:30, 12:30:15) or a ratio (3:4)."""
    parts, end = [tokens[place]], place + 1
    while _at(tokens, end).text == ":" and _at(tokens, end + 1).kind == "num":
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


_OPENS = ("(", "[", "{", "|")
_CLOSES = (")", "]", "}", "|")
_STARTS = (":", ",", ";", '"', "'", "?", "!", ".", ">", "#", *_OPENS)


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
    word = _at(tokens, first - 1)
    named = first > after and word.kind == "word" and word.text.lower() in ("minus", "negative")
    if named and not signed and (first - 1 == after or _at(tokens, first - 2).kind not in ("num", "frac")):
        return True, first - 1, unit
    return negative, first, unit


def _is_sign(tokens: Sequence[Token], place: int, after: int) -> bool:
    """Whether the - or + at `place` is a sign, and neither an operator, a dash nor a bullet inside a text."""
    if place == after and place > 0:
        return False  # right after another number
    previous = _at(tokens, place - 1)
    if previous.kind == "end" or previous.kind in ("eq", "op", "cur") or previous.text in _STARTS:
        return True
    if previous.kind in ("num", "frac", "power", "base", "cmd") or previous.text in (")", "]", "}"):
        return False
    if _glued(tokens, place) or (len(previous.text) == 1 and not _glued(tokens, place + 1)):
        return False  # word-5, x - 5
    return _glued(tokens, place + 1) and not (
        len(previous.text) == 1 and previous.text.islower() and previous.text != "a"
    )


def _unit_after(tokens: Sequence[Token], place: int) -> str:
    """The known unit of the words that follow a number, with its power: kg, m^2, km/h; "" for other words."""
    word = _at(tokens, place).text
    square = {"square": "^2", "sq": "^2", "cubic": "^3"}.get(word.lower())
    name = unit_of(_at(tokens, place + 1).text if square else word)
    if not name:
        return ""
    following = _at(tokens, place + 1)
    power = following.text.strip("^{} ") if following.kind == "power" else ""
    per = _at(tokens, place + 1).text
    if per in ("/", "per") and _at(tokens, place + 2).kind == "word":
        return f"{name}/{unit_of(_at(tokens, place + 2).text) or _at(tokens, place + 2).text.lower()}"
    return name + (square or (f"^{power}" if power else ""))


# Numerals beside each other ---------------------------------------------------------------------------------------


def _join_expressions(tokens: Sequence[Token], items: Sequence[_Item]) -> list[_Item]:
    """Items with an operator, a bracket or a letter of algebra at them, joined into one that is no number."""
    out: list[_Item] = []
    for item in items:
        if _touched(tokens, item):
            item = replace(item, quantity=None)
        if out and _connected(tokens, out[-1], item):
            out[-1] = _Item(None, out[-1].first, item.end)
        else:
            out.append(item)
    return out


def _connected(tokens: Sequence[Token], left: _Item, right: _Item) -> bool:
    """Whether two neighbours are operands of one expression, or parts of one quantity of two units."""
    between = tokens[left.end : right.first]
    texts = [token.text for token in between]
    if not texts:  # 2\pi, \sqrt{2}3, -5 right after 10
        is_root = left.quantity is None or right.quantity is None
        return is_root or tokens[right.first].text in ("-", "+")
    inner = [text for text in texts if text not in ("(", ")", "{", "}", "[", "]")]
    if inner and len(inner) <= 4 and all(text in "+-*/^" or (len(text) == 1 and text.isalpha()) for text in inner):
        return any(text in "+-*/^" for text in inner)
    if not inner:
        return True  # (3)(4)
    words = [text for text in texts if text != "and" and text != ","]
    if len(words) == 1 and left.quantity is not None and right.quantity is not None:
        return (unit_of(words[0]), unit_of(_at(tokens, right.end).text)) in _COMPOUND
    return False


_COMPOUND = {
    ("hour", "minute"), ("minute", "second"), ("day", "hour"), ("week", "day"), ("year", "month"), ("month", "day"),
    ("foot", "inch"), ("yard", "foot"), ("pound", "ounce"), ("dollar", "cent"), ("kilometre", "metre"),
    ("metre", "centimetre"), ("kilogram", "gram"), ("litre", "millilitre"), ("degree", "minute"),
}  # fmt: skip


def _touched(tokens: Sequence[Token], item: _Item) -> bool:
    """Whether an operator with a letter or a bracket behind it, or a bracket of a product, is at the item."""
    first, end = item.first, item.end
    bracketed = _at(tokens, first - 1).text in _OPENS and _at(tokens, end).text in _CLOSES
    if bracketed and any(_is_pair(token) for token in tokens[first:end]):
        return True  # (2,3), [2,3]
    while _at(tokens, first - 1).text == "(" and _at(tokens, end).text == ")":
        first, end = first - 1, end + 1
    if end > item.end and (_at(tokens, first - 1).kind == "op" or _glued_operand(tokens, first)):
        return True  # -(3), 2(3)
    before, after = _at(tokens, first - 1), _at(tokens, end)
    if before.text.lower() in ("not", "isn't"):
        return True  # not 72
    if before.kind == "eq" and before.text not in _EQUALITIES and first > 1:
        return True  # x < 5
    if after.kind == "power" or (after.text == "(" and _glued(tokens, end)):
        return True
    if after.kind == "op" and _is_operand(_at(tokens, end + 1)) and not _glued_unit(tokens, end):
        return True
    if before.kind == "op" and first >= 2 and _is_operand(_at(tokens, first - 2)):
        return True
    if before.text == "(" and _glued_operand(tokens, first - 1):
        return True  # f(5, 6)
    return before.text == "{" or after.text == "}"


def _glued_operand(tokens: Sequence[Token], place: int) -> bool:
    """Whether a letter, a number or a name is right before the bracket at `place`."""
    before = _at(tokens, place - 1)
    return place > 0 and _glued(tokens, place) and (_is_operand(before) or before.kind == "word")


def _is_operand(token: Token) -> bool:
    letter = token.kind == "word" and len(token.text) == 1 and token.text not in ("a", "I")
    return token.kind in ("num", "frac", "cmd", "power") or letter or token.text in ("(", ")")


def _glued_unit(tokens: Sequence[Token], place: int) -> bool:
    """72 m/s, $5/h: a slash with a unit behind it."""
    word = _at(tokens, place + 1)
    return _at(tokens, place).text == "/" and word.kind == "word" and bool(unit_of(word.text))


def _is_pair(token: Token) -> bool:
    """Whether a numeral with a decimal comma would be two numbers in brackets: 2,3."""
    return "," in token.text and DECIMAL_COMMA.fullmatch(token.text) is not None


def _join_groups(tokens: Sequence[Token], items: Sequence[_Item]) -> list[_Item]:
    """Items inside brackets that hold several things ((1, 2), (-∞, 5], f(x, 3)), joined into one that is no number."""
    out: list[_Item] = []
    groups = iter(_groups(tokens))
    first, end = next(groups, (len(tokens), len(tokens)))
    for item in items:
        while item.first >= end:
            first, end = next(groups, (len(tokens) + 1, len(tokens) + 1))
        if item.end <= first:
            out.append(item)
        elif out and out[-1].end == end:
            continue  # the group has its item
        else:
            out.append(_Item(None, min(first, item.first), end))
    return out


def _groups(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """First and end of each outermost bracket that holds a comma or a semicolon, and no words but "and" and "or"."""
    found: list[tuple[int, int]] = []
    around: list[tuple[int, bool, bool]] = []  # the place of an open bracket, a separator in it, prose in it
    for place, token in enumerate(tokens):
        if token.text in ("(", "[", "{"):
            around.append((place, False, False))
        elif not around:
            continue
        elif token.text in (")", "]", "}"):
            first, separated, prose = around.pop()
            if separated and not prose:
                while found and found[-1][0] > first:
                    found.pop()
                found.append((first, place + 1))
            if around:
                around[-1] = (*around[-1][:2], around[-1][2] or prose)
        else:
            first, separated, prose = around[-1]
            is_prose = token.kind == "word" and len(token.text) > 1 and token.text not in ("and", "or")
            around[-1] = (first, separated or token.text in (",", ";"), prose or is_prose)
    return found


_EQUALITIES = ("=", "==", "≈")


def _join_equations(tokens: Sequence[Token], items: Sequence[_Item]) -> list[_Item]:
    """Chains of items with = between them, each as the number that it ends in, or that it begins with."""
    out: list[_Item] = []
    for item in items:
        if out and (sign := _equals(tokens, out[-1], item)):
            out[-1] = _Item(_side(out[-1].quantity, item.quantity, sign), out[-1].first, item.end)
        else:
            out.append(item)
    return out


def _equals(tokens: Sequence[Token], left: _Item, right: _Item) -> str:
    """The sign of an equation between two items, units and a few words aside; "" where there is none."""
    between = tokens[left.end : right.first]
    signs = [token.text for token in between if token.kind == "eq"]
    rest = [token for token in between if token.kind != "eq"]
    short = len(rest) <= 4 and all(token.kind in ("word", "power") or token.text in "(){}/" for token in rest)
    orders = [sign for sign in signs if sign not in _EQUALITIES]
    return [*orders, *signs][0] if signs and short else ""


def _side(left: Quantity | None, right: Quantity | None, sign: str) -> Quantity | None:
    if sign not in _EQUALITIES:
        return None  # 3 < x < 5
    if left is None or right is None or sign == "≈" or (left.unit and right.unit):
        return right if right is not None else left
    return right if equal(left, right) else None


def _join_lists(tokens: Sequence[Token], items: Sequence[_Item]) -> list[_Item]:
    """Numbers that are offered side by side ("71 or 72", "1 2 3", "1, 2, 3"), joined into one that is no number."""
    out: list[_Item] = []
    runs = list(_runs(tokens, items))
    for run, words in runs:
        around = [*tokens[: run[0].first], *tokens[run[-1].end :]]
        whole = all(token.kind in ("other", "eq") for token in around)  # <1, 2>
        if len(run) > 1 and (len(run) > 2 or whole or words != {","}):
            out.append(_Item(None, run[0].first, run[-1].end))
        else:
            out.extend(run)
    return out


def _runs(tokens: Sequence[Token], items: Sequence[_Item]) -> Iterator[tuple[list[_Item], set[str]]]:
    run: list[_Item] = []
    words: set[str] = set()
    for item in items:
        between = {token.text for token in tokens[run[-1].end : item.first]} if run else {""}
        if run and between <= {",", "or", "and", ";", "/", "&", "|"}:
            words |= between
        else:
            if run:
                yield run, words
            run, words = [], set()
        run.append(item)
    if run:
        yield run, words
