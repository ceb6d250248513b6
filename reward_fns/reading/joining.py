"""Numbers that are pieces of something larger: of an expression, a pair, an interval, an equation, a list."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from reward_fns.reading.items import CLOSES, OPENS, Item, Quantity, at, equal, is_glued
from reward_fns.reading.tokens import DECIMAL_COMMA, Token
from reward_fns.reading.words import unit_of


def join_expressions(tokens: Sequence[Token], items: Sequence[Item]) -> list[Item]:
    """Items with an operator, a bracket or a letter of algebra at them, joined into one that is no number."""
    out: list[Item] = []
    for item in items:
        if _touched(tokens, item):
            item = replace(item, quantity=None)
        if out and _connected(tokens, out[-1], item):
            out[-1] = Item(None, out[-1].first, item.end)
        else:
            out.append(item)
    return out


def _connected(tokens: Sequence[Token], left: Item, right: Item) -> bool:
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
        return (unit_of(words[0]), unit_of(at(tokens, right.end).text)) in _COMPOUND
    return False


_COMPOUND = {
    ("hour", "minute"), ("minute", "second"), ("day", "hour"), ("week", "day"), ("year", "month"), ("month", "day"),
    ("foot", "inch"), ("yard", "foot"), ("pound", "ounce"), ("dollar", "cent"), ("kilometre", "metre"),
    ("metre", "centimetre"), ("kilogram", "gram"), ("litre", "millilitre"), ("degree", "minute"),
}  # fmt: skip


def _touched(tokens: Sequence[Token], item: Item) -> bool:
    """Whether an operator with a letter or a bracket behind it, or a bracket of a product, is at the item."""
    first, end = item.first, item.end
    bracketed = at(tokens, first - 1).text in OPENS and at(tokens, end).text in CLOSES
    if bracketed and any(is_pair(token) for token in tokens[first:end]):
        return True  # (2,3), [2,3]
    while at(tokens, first - 1).text == "(" and at(tokens, end).text == ")":
        first, end = first - 1, end + 1
    if end > item.end and (at(tokens, first - 1).kind == "op" or _glued_operand(tokens, first)):
        return True  # -(3), 2(3)
    before, after = at(tokens, first - 1), at(tokens, end)
    if before.text.lower() in ("not", "isn't"):
        return True  # not 72
    if before.kind == "eq" and before.text not in _EQUALITIES and first > 1:
        return True  # x < 5
    if after.kind == "power" or (after.text == "(" and is_glued(tokens, end)):
        return True
    if after.kind == "op" and _is_operand(at(tokens, end + 1)) and not _glued_unit(tokens, end):
        return True
    if before.kind == "op" and first >= 2 and _is_operand(at(tokens, first - 2)):
        return True
    if before.text == "(" and _glued_operand(tokens, first - 1):
        return True  # f(5, 6)
    return before.text == "{" or after.text == "}"


def _glued_operand(tokens: Sequence[Token], place: int) -> bool:
    """Whether a letter, a number or a name is right before the bracket at `place`."""
    before = at(tokens, place - 1)
    return place > 0 and is_glued(tokens, place) and (_is_operand(before) or before.kind == "word")


def _is_operand(token: Token) -> bool:
    letter = token.kind == "word" and len(token.text) == 1 and token.text not in ("a", "I")
    return token.kind in ("num", "frac", "cmd", "power") or letter or token.text in ("(", ")")


def _glued_unit(tokens: Sequence[Token], place: int) -> bool:
    """72 m/s, $5/h: a slash with a unit behind it."""
    word = at(tokens, place + 1)
    return at(tokens, place).text == "/" and word.kind == "word" and bool(unit_of(word.text))


def is_pair(token: Token) -> bool:
    """Whether a numeral with a decimal comma would be two numbers in brackets: 2,3."""
    return "," in token.text and DECIMAL_COMMA.fullmatch(token.text) is not None


def join_groups(tokens: Sequence[Token], items: Sequence[Item]) -> list[Item]:
    """Items inside brackets that hold several things ((1, 2), (-∞, 5], f(x, 3)), joined into one that is no number."""
    out: list[Item] = []
    groups = iter(groups_of(tokens))
    first, end = next(groups, (len(tokens), len(tokens)))
    for item in items:
        while item.first >= end:
            first, end = next(groups, (len(tokens) + 1, len(tokens) + 1))
        if item.end <= first:
            out.append(item)
        elif out and out[-1].end == end:
            continue  # the group has its item
        else:
            out.append(Item(None, min(first, item.first), end))
    return out


def groups_of(tokens: Sequence[Token]) -> list[tuple[int, int]]:
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


def join_equations(tokens: Sequence[Token], items: Sequence[Item]) -> list[Item]:
    """Chains of items with = between them, each as the number that it ends in, or that it begins with."""
    out: list[Item] = []
    for item in items:
        if out and (sign := _equals(tokens, out[-1], item)):
            out[-1] = Item(_side(out[-1].quantity, item.quantity, sign), out[-1].first, item.end)
        else:
            out.append(item)
    return out


def _equals(tokens: Sequence[Token], left: Item, right: Item) -> str:
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


def join_lists(tokens: Sequence[Token], items: Sequence[Item]) -> list[Item]:
    """Numbers that are offered side by side ("71 or 72", "1 2 3", "1, 2, 3"), joined into one that is no number."""
    out: list[Item] = []
    runs = list(_runs(tokens, items))
    for run, words in runs:
        around = [*tokens[: run[0].first], *tokens[run[-1].end :]]
        whole = all(token.kind in ("other", "eq") for token in around)  # <1, 2>
        if len(run) > 1 and (len(run) > 2 or whole or words != {","}):
            out.append(Item(None, run[0].first, run[-1].end))
        else:
            out.extend(run)
    return out


def _runs(tokens: Sequence[Token], items: Sequence[Item]) -> Iterator[tuple[list[Item], set[str]]]:
    run: list[Item] = []
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
