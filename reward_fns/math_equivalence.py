r"""A mathematical answer compared with another by meaning: 1/2 is 0.5 is \frac{2}{4}. By math-verify (extra `math`).

The comparison is symbolic algebra on model text, which a hostile text can make endless (94**56**35). So one candidate
is cut out of the completion, measured against bounds before anything parses it, and parsed as LaTeX only: the
plain-expression parser of the library evaluates Python. What passes the bounds and still runs on is the business of the
caller's deadline: use this function in the reward workers.

The library is wrong where letters commute (cat is act), bases are dropped (101_2 is 101), tiny numbers are rounded
(1/2^98 is 1/2^99), sets are tuples, and X is x. So numbers are compared as exact fractions, words as words, collections
element by element with their brackets, and what the library says of two formulas is checked by their values at random
points with 50 digits (Schwartz 1980, J. ACM 27:701: two different polynomials of degree d agree at a point drawn out of
s values with a probability of at most d/s).
"""

import math
import random
import re
import threading
from functools import lru_cache
from typing import Any

from reward_fns.reading import items, numerals
from reward_fns.reading.collections import Collection, read_collection
from reward_fns.reading.final_answer import Form, clean, final_answer, sentences
from reward_fns.reading.final_answer import boxed as boxed
from reward_fns.registry import Gold, reward
from reward_fns.text import reads_of

MAX_CHARACTERS = 300
MAX_NESTING = 12
MAX_DIGITS = 30
MAX_EXPONENT = 1_000
MAX_EXPONENT_OF_SUM = 20  # of a bracket with letters in it, which algebra multiplies out
MAX_ELEMENTS = 30
SECONDS = 2  # for the library's own alarm, which works in the main thread only
POINTS = 6  # at which two formulas are compared
DIGITS = 50
APPROXIMATE = 1e-6  # relative, for a decimal in place of an irrational number: 1.414214 for \sqrt{2}

_OPEN, _CLOSE = "([{", ")]}"
_DELIMITED = re.compile(
    r"\$\$?([^$]{1,400})\$\$?|\\\(((?:(?!\\\)).){1,400})\\\)|\\\[((?:(?!\\\]).){1,400})\\\]", re.DOTALL
)
_SPACING = re.compile(
    r"\\[,;:! ]|\\q?quad\b|(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d),(?=\d{3}(?!\d))|\\left(?![a-z])|\\right(?![a-z])"
    r"|\\displaystyle\b"
)
_UNICODE = {
    "−": "-", "–": "-", "×": "\\cdot ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "²": "^2", "³": "^3", "±": "\\pm ",
    "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∈": "\\in ", "°": "^\\circ ",
    "½": "\\frac{1}{2}",
    "{,}": ".", "\\varnothing": "\\{\\}", "\\emptyset": "\\{\\}",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[\s-]+[A-Za-z]+)*|[A-Za-z]+(?:[\s-]+[A-Za-z]{2,})+")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\s*\{([^{}]*)\}")
_CHOICE_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_BASED = re.compile(r"([0-9A-Za-z]*\d[0-9A-Za-z]*)_\{?(\d{1,2})\}?")
_EXPONENTIAL = re.compile(r"(?<=\d)[eE](?=[-+]?\d)")
_UNBOUNDED = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim|[dt]?binom|choose|bigcup|bigcap|[bp]?mod|operatorname)(?![a-z])|!"
)
_CHOICE = re.compile(r"\\(?:pm|mp|lor|vee|cup|le|leq|ge|geq|lt|gt|in|ne|neq)(?![a-z])|\b(?:or|and)\b|[,;=<>]")
_SIDE_BY_SIDE = re.compile(r"\d\s+\d")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*\d\s*\d")
_ASSIGNED = re.compile(r"^\s*([a-zA-Z](?:_\{?\w+\}?)?)\s*(?:=|\\in(?![a-z]))(?!.*=)\s*")
_EXPONENT = re.compile(r"[-+]?(?:\\?[a-zA-Z]+|[\d.]+)?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def check_answer(answer: Any, **row: Any) -> None:
    """ValueError for a gold answer that is none."""
    _expected(answer)


def formula_gold(answer: Any, form: Form = "any", **row: Any) -> Gold:
    """The gold answer of a row: a formula, a number, or words."""
    text = _expected(answer)
    quantity = _number(text) if numerals.is_value(text) else None
    if quantity is not None and quantity.kind == "number":
        return Gold(text, "number", reads_of(form))
    return Gold(text, "formula" if _words(text) is None else "text", reads_of(form))


@reward(
    low=0.0,
    high=1.0,
    floor=0.0,
    checks="answer",
    requires=("math_verify",),
    extra="math",
    check_row=check_answer,
    special_tokens=True,
    gold=formula_gold,
)
def math_equivalence(completion: str, answer: Any, form: Form = "any", **row: Any) -> float:
    r"""1 when the final answer of the completion equals the column `answer` as mathematics; else 0.

    The final answer is found by `reward_fns.reading.final_answer`: after the thinking, the last of <answer>, \boxed and
    ####; else after "the answer is"; else the last formula between dollar signs, or the last number, of the last
    sentence that has one; or the whole text, where it is a formula or a name and nothing else. `answer` is LaTeX or
    plain, with or without a box. form: the form that counts, "any", "marked" (one of the three), "tag", "box" or
    "hashes".

    Range {0, 1}. Floor 0: one candidate counts, and one that offers a choice (a list, an interval, a chain of
    equations, plus-minus) earns 0 unless the answer is itself of that form. A candidate of over 300 characters, 12
    nested brackets, 30 digits in a row or an exponent over 1,000, with a tower of powers, a factorial or a sum, earns
    0 unread.

    Numbers are equal as exact fractions, with the units of `reward_fns.reading.numerals`; a decimal means an
    irrational number within 1e-6 of its size. Words are equal in either case, letters of algebra in their own.
    Brackets count: (1, 2) is neither {1, 2} nor [1, 2]; a bare list is a set, or a tuple in its order.
    """
    expected = _expected(answer)
    candidate = _plain(candidate_of(completion, form))
    if not candidate:
        return 0.0
    if candidate == expected:
        return 1.0
    if not is_bounded(candidate):
        return 0.0
    return float(_same(candidate, expected))


def candidate_of(completion: str, form: Form = "any") -> str:
    """The one candidate that is compared, as LaTeX or plain text; "" without any."""
    found = final_answer(completion, form)
    if found.form in ("tag", "box", "hashes"):
        return _formula_or(found.text, found.text)
    if found.form == "said":
        formulas = list(_DELIMITED.finditer(found.text))
        if formulas:
            chosen = formulas[0 if not found.text[: formulas[0].start()].strip(" *") else -1]
            return "".join(group or "" for group in chosen.groups()).strip()
        text = found.text.rstrip(".").strip()
        return _number_text(numerals.leading(text)) or text
    if (formula := _whole_formula(found.text)) is not None:
        return formula
    for sentence in sentences(found.text):
        formulas = list(_DELIMITED.finditer(sentence))
        if formulas:
            return "".join(group or "" for group in formulas[-1].groups()).strip()
        if numerals.holds_digits(sentence):
            return _number_text(numerals.last([sentence]))
    return _number_text(numerals.last(sentences(found.text)[:1]))


def _whole_formula(text: str) -> str | None:
    """A text that is a formula, or a name of a few words, and nothing else; None for sentences, numbers and lists."""
    text = clean(text).rstrip(".").strip()
    bare = _COMMAND.sub(" ", _TEXT.sub("", text))
    if not text or "\n" in text or len(text) > MAX_CHARACTERS or _DELIMITED.search(text) or _SIDE_BY_SIDE.search(bare):
        return None
    if re.search(r"[A-Za-z]{2,}", bare):
        return text if len(text.split()) <= 4 and not re.search(r"\d", text) else None
    return text if re.search(r"[A-Za-z\\^()\[\]]", text) else None


def _formula_or(text: str, other: str) -> str:
    """The formula of a text that is a sentence with one formula in it; else the other."""
    formulas = list(_DELIMITED.finditer(text))
    if len(formulas) == 1 and "\\text" not in text:
        return "".join(group or "" for group in formulas[0].groups()).strip()
    if re.search(r"[A-Za-z]{3,}", _COMMAND.sub("", _TEXT.sub("", text))):
        return _number_text(numerals.only(text)) or other  # "72 dollars"
    return other


def _number_text(quantity: items.Quantity | None) -> str:
    return "" if quantity is None else numerals.written(quantity)


def _expected(answer: Any) -> str:
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    text = str(answer).strip() if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) else ""
    if not text:
        raise ValueError(f"math_equivalence needs an answer in the column 'answer', and got {answer!r}.")
    box = boxed(text)
    if box is None and "####" in text:
        text = final_answer(text, "hashes").text or text
    return _plain(clean(box or text))


def _plain(text: str) -> str:
    """LaTeX without the marks of spacing and without Unicode's mathematics."""
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2]}}}", _SPACING.sub("", text))
    for sign, latex in _UNICODE.items():
        text = text.replace(sign, latex)
    return text.strip().removesuffix(".").strip()


# Two answers ------------------------------------------------------------------------------------------------------


def _same(candidate: str, expected: str) -> bool:
    """Whether two answers are the same, by what they are: words, numbers, collections, or formulas."""
    words = _words(expected)
    if words is not None:
        return _words(candidate) == words
    given, wanted = (_ASSIGNED.match(text) for text in (candidate, expected))
    if given and wanted and given[1] != wanted[1]:
        return False  # x = 5 for y = 5
    if given and (wanted or not _CHOICE.search(expected) or read_collection(expected)):
        candidate = candidate[given.end() :]  # "x = 5" for 5
    expected = expected[wanted.end() :] if wanted else expected
    parts, others = read_collection(candidate), read_collection(expected)
    if parts or others:
        return parts is not None and others is not None and _same_collection(parts, others)
    numbers = [_number(text) for text in (candidate, expected)]
    if numbers[0] is not None and numbers[1] is not None:
        return items.equal(numbers[0], numbers[1])
    if not _CHOICE.search(expected) and _CHOICE.search(candidate):
        return False
    if _SIDE_BY_SIDE.search(_SHORT_FRACTION.sub(" ", candidate)):
        return False  # 17 3, which the library adds up
    if _BASED.fullmatch(candidate) or _BASED.fullmatch(expected) or _letters(candidate) != _letters(expected):
        return False
    return _equivalent(candidate, expected)


def _words(text: str) -> str | None:
    """A text that is words, without case and brackets: a name, a choice of a letter; None for a formula."""
    bare = _TEXT.sub(r"\1", text).strip()
    choice = _CHOICE_LETTER.fullmatch(bare.upper() if _TEXT.search(text) or bare.startswith("(") else bare)
    if choice:
        return choice[1]
    is_words = _WORDS.fullmatch(bare.strip("(). "))
    return " ".join(bare.strip("(). ").casefold().split()) if is_words else None


def _letters(text: str) -> str:
    """The letters of algebra in a text that appear in one case only there; the library takes X for x."""
    found = set(re.findall(r"[a-zA-Z]", _COMMAND.sub("", _TEXT.sub("", text))))
    return "".join(sorted(letter for letter in found if letter.isupper()))


def _number(text: str) -> items.Quantity | None:
    based = _BASED.fullmatch(text.replace("\\text", "").replace("{", "").replace("}", ""))
    if based:
        value = numerals.in_base(based[1], int(based[2]))
        return None if value is None else items.Quantity(value)
    if re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", _COMMAND.sub("", _TEXT.sub("", _EXPONENTIAL.sub("", text)))):
        return None  # a letter of algebra
    return numerals.only(text, formula=True)


def _same_collection(given: Collection, gold: Collection) -> bool:
    """Element by element: in order within brackets, as sets within braces or without any."""
    if max(len(given.elements), len(gold.elements)) > MAX_ELEMENTS:
        return False
    brackets = {given.brackets, gold.brackets}
    if brackets <= {"", "{}"}:
        return all(any(_same(a, b) for b in gold.elements) for a in given.elements) and all(
            any(_same(a, b) for a in given.elements) for b in gold.elements
        )
    if len(brackets) > 1 and brackets != {"", "()"}:
        return False
    pairs = zip(given.elements, gold.elements, strict=False)
    return len(given.elements) == len(gold.elements) and all(_same(a, b) for a, b in pairs)


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
    """What math-verify says of two formulas, corrected by their values."""
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
    if not found[0] or not found[1]:
        return False
    by_value = _equal_by_value(found[0][0], found[1][0])
    if by_value is not None:
        return by_value
    return bool(verify(found[0], found[1], timeout_seconds=seconds))


def _equal_by_value(first: Any, second: Any) -> bool | None:
    """Whether two expressions have the same values at random points; None where that does not decide.

    i is the imaginary unit. A decimal beside an irrational number may be rounded.
    """
    import sympy

    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return None
    if first.has(sympy.MatrixSymbol, sympy.MatrixBase) or second.has(sympy.MatrixSymbol, sympy.MatrixBase):
        return None
    rounded = first.has(sympy.Float) != second.has(sympy.Float)
    first, second = (_exact(expression) for expression in (first, second))
    if first.has(sympy.zoo, sympy.nan) or second.has(sympy.zoo, sympy.nan):
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    draw, seen = random.Random(0), 0
    margin = APPROXIMATE if rounded and not symbols else 10.0 ** (10 - DIGITS)
    for point in range(POINTS if symbols else 1):
        sign = -1 if point % 3 == 2 else 1
        values = {symbol: sympy.Rational(sign * draw.randint(10**5, 10**6), 314_159) for symbol in symbols}
        pair = [_value(expression.subs(values)) for expression in (first, second)]
        if pair[0] is None or pair[1] is None:
            continue
        seen += 1
        if abs(pair[0] - pair[1]) > margin * max(abs(pair[0]), abs(pair[1])):
            return False
    return True if seen >= (POINTS // 2 if symbols else 1) else None


def _exact(expression: Any) -> Any:
    """Decimals as the fractions they are written as, i as the imaginary unit; products and powers worked out."""
    import sympy

    decimals = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    unit = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.xreplace({**decimals, **unit}).doit()


def _value(expression: Any) -> Any:
    """A finite value with 50 digits; None where there is none."""
    try:
        value = complex_of(expression.evalf(DIGITS, maxn=400))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return value


def complex_of(number: Any) -> Any:
    """A number of mpmath; None for one that is not finite."""
    import mpmath

    with mpmath.workdps(DIGITS):
        real, imaginary = number.as_real_imag()
        value = mpmath.mpc(mpmath.mpf(str(real)), mpmath.mpf(str(imaginary)))
        return value if mpmath.isfinite(value.real) and mpmath.isfinite(value.imag) else None
