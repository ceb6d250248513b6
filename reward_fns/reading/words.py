"""Words of numbers and of units, in English: seventy-two, two thousand, 5 kg."""

import re
from collections.abc import Callable
from typing import TypeVar

Read = TypeVar("Read")

_SMALL = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT = {"k": 1_000, "K": 1_000}
_SHORT_MONEY = {"m": 10**6, "M": 10**6, "mn": 10**6, "bn": 10**9, "B": 10**9, "b": 10**9}

_NUMBER_WORD = "|".join([*_VALUES, *_SCALES])
_SPAN = re.compile(
    rf"(?:\b(minus|negative)\s+|(?<!\w)([-−–]))?\b((?:an?\s+(?=hundred|thousand|million))?(?:{_NUMBER_WORD})"
    rf"(?:[\s-]+(?:and\s+)?(?:{_NUMBER_WORD}))*)\b(?:\s+([a-z]+|%))?",
    re.IGNORECASE,
)
# What may follow a number word for it to be a piece: "three quarters", "two thirds".
_FRACTIONAL = re.compile(r"(?:hal[fv]|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|point|over)", re.I)

_UNITS = {
    "dollar": "dollars buck bucks", "cent": "cents ¢", "euro": "euros", "rupee": "rupees", "yen": "",
    "%": "percent pct per-cent percentage", "second": "s sec secs seconds", "minute": "min mins minutes",
    "hour": "h hr hrs hours", "day": "d days", "week": "wk wks weeks", "month": "months", "year": "yr yrs years",
    "millimetre": "mm millimeter millimeters millimetres", "centimetre": "cm centimeter centimeters centimetres",
    "metre": "m meter meters metres", "kilometre": "km kms kilometer kilometers kilometres",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yds yards", "mile": "mi miles",
    "milligram": "mg milligrams", "gram": "g grams", "kilogram": "kg kgs kilo kilos kilograms", "tonne": "tonnes",
    "ounce": "oz ounces", "pound": "lb lbs pounds", "millilitre": "ml mL milliliter milliliters millilitres",
    "litre": "l L liter liters litres", "gallon": "gal gallons", "degree": "degrees deg",
}  # fmt: skip
_UNIT_OF = {word: name for name, words in _UNITS.items() for word in [name, *words.split()]}


def unit_of(word: str) -> str:
    """The canonical name of a known unit ("kgs" -> "kilogram"); "" for other words."""
    return _UNIT_OF.get(word) or _UNIT_OF.get(word.lower(), "")


def scale_of(word: str, glued: bool, currency: bool) -> int:
    """What a word after a number multiplies it by: million, or k right at the digits; 0 where it is no such word."""
    scale = _SCALES.get(word.lower(), 0)
    if scale or not glued:
        return scale
    return _SHORT.get(word, 0) or (_SHORT_MONEY.get(word, 0) if currency else 0)


def parse_words(text: str, make: Callable[[int, str], Read]) -> Read | None:
    """The one number that a text names in words, by `make(value, unit)`; None where it names none or several."""
    found = list(_SPAN.finditer(text))
    if len(found) != 1:
        return None
    match = found[0]
    value = _value(re.split(r"[\s-]+", match[3].lower()))
    following = match[4] or ""
    if value is None or _FRACTIONAL.match(following):
        return None
    return make(-value if match[1] or match[2] else value, unit_of(following))


def _value(words: list[str]) -> int | None:
    """Seventy two, a hundred and five, two thousand; None for words that do not make one number (one two)."""
    total, part, last = 0, 0, 10**15
    for word in words:
        if word in ("a", "an", "and"):
            continue
        value = _VALUES.get(word)
        if value is not None:
            if part % 100 and not (value < 10 <= part % 100 and part % 10 == 0 and part % 100 >= 20):
                return None
            part += value
        elif word == "hundred":
            part = (part or 1) * 100
        else:
            scale = _SCALES[word]
            if scale >= last:
                return None
            total, part, last = total + (part or 1) * scale, 0, scale
    return total + part
