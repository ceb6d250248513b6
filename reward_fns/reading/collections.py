"""Several answers as one: tuples, intervals, sets and lists of formulas."""

import re
from dataclasses import dataclass

_OPENING = {"(": "(", "[": "[", r"\{": "{", r"\lbrace": "{", r"\langle": "(", r"\left(": "("}
_CLOSING = {")": ")", "]": "]", r"\}": "}", r"\rbrace": "}", r"\rangle": ")"}
_DELIMITER = re.compile(r"\\[{}]|\\[lr](?:brace|angle)(?![a-z])|[()\[\]{}]|\\[a-zA-Z]+|.", re.DOTALL)
_SEPARATOR = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|\\lor(?![a-z])|\\vee(?![a-z])|(?<![a-z])(?:and|or)(?![a-z])"
)


@dataclass(frozen=True)
class Collection:
    """Formulas in brackets: "()", "[]", "(]", "[)", "{}", or "" for a bare list."""

    brackets: str
    elements: tuple[str, ...]


def read_collection(text: str) -> Collection | None:
    r"""The collection that a formula is; None for a single formula. \pm 3 is the list of 3 and -3.

    A comma between digits that groups them in threes was taken out before.
    """
    text = _SEPARATOR.sub(",", text.strip())
    brackets, inner = _outer(text)
    elements = _split(inner)
    if len(elements) > 1:
        return Collection(brackets, tuple(elements))
    if brackets in ("{}", "(]", "[)"):
        return Collection(brackets, tuple(elements))
    if re.search(r"\\(?:pm|mp)(?![a-z])", text) and not brackets:
        both = [re.sub(r"\\(?:pm|mp)(?![a-z])", sign, text) for sign in "+-"]
        return Collection("", tuple(part.strip().removeprefix("+").strip() for part in both))
    return None


def _outer(text: str) -> tuple[str, str]:
    """The brackets around a whole text and what is inside; "" and the text where there are none."""
    tokens = list(_DELIMITER.finditer(text))
    if len(tokens) < 2 or tokens[0].group() not in _OPENING or tokens[-1].group() not in _CLOSING:
        return "", text
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token.group() in _OPENING or token.group() == "{") - (
            token.group() in _CLOSING or token.group() == "}"
        )
        if depth == 0 and place < len(tokens) - 1:
            return "", text  # (a, b) + (c, d)
    brackets = _OPENING[tokens[0].group()] + _CLOSING[tokens[-1].group()]
    return brackets, text[tokens[0].end() : tokens[-1].start()]


def _split(text: str) -> list[str]:
    """The parts of a text between commas or semicolons outside every bracket; empty ones left out."""
    parts, depth, begin = [], 0, 0
    for token in _DELIMITER.finditer(text):
        sign = token.group()
        depth += (sign in _OPENING or sign == "{") - (sign in _CLOSING or sign == "}")
        if sign in ",;" and depth == 0:
            parts.append(text[begin : token.start()])
            begin = token.end()
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]
