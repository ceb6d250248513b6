"""From numbers as they are written to one plain notation: ASCII signs, no markdown, no math delimiters."""

import re
from collections.abc import Callable
from functools import lru_cache

MAX_TEXT = 4_000  # characters that are read, at the end of a text

_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_ONE_FOR_ONE = str.maketrans(
    {
        **dict.fromkeys("−–‒‑－﹣", "-"),
        **dict.fromkeys("×·⋅∗∙✕✖", "*"),
        **dict.fromkeys("÷⁄∕／", "/"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2007\u200a~", " "),
        **dict.fromkeys("≃≅", "≈"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **{chr(0x1D7CE + digit): str(digit % 10) for digit in range(50)},
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        "＋": "+", "＝": "=", "％": "%", "＄": "$", "：": ":", "∶": ":", "．": ".", "，": ",", "∓": "±", "’": "'",
        "°": " degrees ", "√": r"\sqrt ",
    }
)  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LATEX: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # GSM8K's calculator
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|boldsymbol|emph|bm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|big[lr]?|Big[lr]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\(?:pm|mp)(?![a-zA-Z])"), "±"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])"), " degrees "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"\\(?:[,:;! ]|q?quad(?![a-z]))"), " "),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\$\$?(?=[^\s$])([^$\n]*[^\s$])\$\$?(?!\d)"), r" \1 "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+"), lambda m: f"^{{{m.group().translate(_SUPER)}}}"),
    (re.compile(f"[{''.join(_VULGAR)}]"), lambda m: "\\frac{{{}}}{{{}}}".format(*_VULGAR[m.group()].split("/"))),
]  # fmt: skip
_MARKDOWN: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<![\d*])\*\*(?=\S)([^*\n]*?)(?<=\S)\*\*(?![\d*])"), r"\1"),
    (re.compile(r"(?<=[\d)])\s?\*\*\s?(?=[-\d({])"), "^"),
    (re.compile(r"(?<![\w*)\]}])\*(?=\S)([^*\n]*?)(?<=\S)\*(?![\w*(\[{\\])"), r"\1"),
    (re.compile(r"\*\*|__|`+|~~"), ""),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)|(?<=\d)\s+[xX]\s+(?=[-(\\])"), "*"),
]


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Text in the one notation that is read: ASCII signs, * and / for the operators, no markdown, no dollar pairs."""
    text = text[-MAX_TEXT:].translate(_ONE_FOR_ONE)
    for pattern, into in [*_LATEX, *_MARKDOWN]:
        text = pattern.sub(into, text)
    return text
