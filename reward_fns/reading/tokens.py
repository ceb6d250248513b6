"""Tokens of the plain notation, and the exact value of each literal."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 60  # of one literal
MAX_POWER = 1_000  # of an exponent
MAX_POWER_DIGITS = 1_000  # of what a power comes to

_TOKEN = re.compile(
    r"""
      (?P<frac>\\frac\s*(?P<top>\{[^{}]*\}|\d)\s*(?P<under>\{[^{}]*\}|\d))
    | (?P<num>
        (?:\d{1,3}(?:\ \d{3})+(?:[.,]\d+)?(?![._',/]?\d)            # 1 234 567,5
        | \d(?:\d|[.,_'](?=\d))*                                            # every other form, distinguished in literal
        | (?<![\w.])\.\d+)
        (?:\.?\\overline\{\d+\})?
        (?:[eE][-+]?\d{1,3}(?![\w.]*\d))?)
    | (?P<power>\^\s*(?:\{[^{}]*\}|\([^()]*\)|[-+]?\d+|\w))
    | (?P<base>_\s*(?:\{\d+\}|\d+))
    | (?P<cur>[$€£¥₹₽₩₪₫฿]|\b(?:USD|EUR|GBP|INR|JPY|CNY|CAD|AUD|US\$|Rs\.?)(?![A-Za-z]))
    | (?P<cmd>\\[A-Za-z]+)
    | (?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)
    | (?P<op>[-+*/])
    | (?P<eq><=|>=|==|[=≈<>≤≥≠])
    | (?P<other>\S)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int
    value: Fraction | None = None  # of num and frac; None where it is none


def read_tokens(text: str) -> list[Token]:
    found = []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup if match.lastgroup not in ("top", "under") else "frac")
        value = None
        if match["num"]:
            kind, value = "num", literal(match["num"])
        elif match["frac"]:
            kind, value = "frac", _ratio(match["top"].strip("{} "), match["under"].strip("{} "))
        found.append(Token(kind, match.group(), match.start(), match.end(), value))
    return found


_GROUPED = re.compile(
    r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?|[1-9]\d{0,2}(?:_\d{3})+(?:\.\d+)?"
    r"|[1-9]\d{0,2}(?:'\d{3})+(?:\.\d+)?"
)
_GROUPED_BY_POINT = re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?:,\d+)?|[1-9]\d{0,2}(?:\.\d{3})+,\d+")
_GROUPED_BY_SPACE = re.compile(r"\d{1,3}(?: \d{3})+(?:[.,]\d+)?")
DECIMAL_COMMA = re.compile(r"\d+,(?:\d{1,2}|\d{4,})|0,\d+|\d{4,},\d+")
_BASED = re.compile(r"(\d+)_(\d{1,2})")


def literal(text: str) -> Fraction | None:
    """An unsigned numeral; None for what only looks like one: 1,2,3 or 1.2.3 or 0012,345."""
    mantissa, _, rest = text.partition("\\overline")
    repeating, _, exponent = rest.partition("e") if rest else ("", "", "")
    if not rest:
        mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa.removesuffix(".") if rest and "." not in mantissa[:-1] else mantissa
    if len(mantissa) > MAX_DIGITS:
        return None
    based = _BASED.fullmatch(mantissa)
    if based:
        return in_base(based[1], int(based[2]))
    if _GROUPED.fullmatch(mantissa):
        mantissa = re.sub(r"[,_']", "", mantissa)
    elif _GROUPED_BY_POINT.fullmatch(mantissa) or DECIMAL_COMMA.fullmatch(mantissa):
        mantissa = mantissa.replace(".", "").replace(",", ".")
    elif _GROUPED_BY_SPACE.fullmatch(mantissa):
        mantissa = mantissa.replace(" ", "").replace(",", ".")
    elif not re.fullmatch(r"\d+\.?\d*|\.\d+", mantissa):
        return None
    value = Fraction(mantissa.rstrip(".") or "0")
    if repeating:
        digits = re.findall(r"\d+", repeating)[0]
        places = len(mantissa.partition(".")[2])
        value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    return value * Fraction(10) ** int(exponent) if exponent else value


def in_base(digits: str, base: int) -> Fraction | None:
    try:
        return Fraction(int(digits, base)) if 2 <= base <= 36 else None
    except ValueError:
        return None


def _signed(text: str) -> Fraction | None:
    """A numeral with at most a sign and a power, as it is inside braces."""
    match = re.fullmatch(r"\s*([-+]?)\s*([^\^]*?)\s*(?:\^\s*\{?\s*([-+]?\d+)\s*\}?)?\s*", text)
    if match is None or not re.fullmatch(r"[\d.,_']+", match[2]):
        return None
    value = literal(match[2])
    value = power_of(value, match[3]) if match[3] else value
    return -value if value is not None and match[1] == "-" else value


def _ratio(top: str, under: str) -> Fraction | None:
    above, below = _signed(top), _signed(under)
    return above / below if above is not None and below else None


def power_of(base: Fraction | None, exponent: str) -> Fraction | None:
    text = exponent.lstrip("^ ").strip("{}() ")
    if base is None or not re.fullmatch(r"[-+]?\d{1,4}", text):
        return None
    power = int(text)
    digits = len(str(max(abs(base.numerator), base.denominator))) * abs(power)
    if abs(power) > MAX_POWER or digits > MAX_POWER_DIGITS or (base == 0 and power < 0):
        return None
    return base**power
