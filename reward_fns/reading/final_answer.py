r"""Where the final answer of a completion is: the one reader of every grader of text.

1. Thinking is not the answer: only what follows the last </think> (or the closing tag of another name for it) is read,
   and a completion that ends inside its thinking has no answer.
2. The last of the forms that a prompt can ask for: <answer>...</answer>, \boxed{...}, or a line after ####.
3. Without one, what follows "the answer is" or "Answer:", unless the text corrects itself after it. "The answer is not
   72" gives none.
4. Else the text itself, of which a grader reads the last sentence that holds what it looks for.

Markdown and math delimiters around an answer are not part of it. One candidate is read, so that a list of answers is
one guess. `form` asks for one of the forms: an answer anywhere else is then none.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

WINDOW = 4_000  # characters at the end of a completion that are read
MAX_ANSWER = 2_000  # characters of an answer

Form = Literal["any", "marked", "tag", "box", "hashes"]
FORMS: dict[str, tuple[str, ...]] = {
    "any": ("tag", "box", "hashes", "said", "text"),
    "marked": ("tag", "box", "hashes"),
    "tag": ("tag",),
    "box": ("box",),
    "hashes": ("hashes",),
}
_THINKING = ("think", "thinking", "thought", "reasoning", "scratchpad")
_CLOSED = re.compile(rf"</(?:{'|'.join(_THINKING)})>|\[/THINK\]", re.IGNORECASE)
_OPENED = re.compile(rf"<(?:{'|'.join(_THINKING)})>|\[THINK\]", re.IGNORECASE)
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</answer>|<answer>", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*(?=[{\d])")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_SAID = re.compile(
    r"(?:\b(?:final\s+)?answer[*_]*\s*(?:is|was|equals|would\s+be|should\s+be|=|:)[*_]*\s*:?|^[ \t*_]*A(?:ns)?[.:])"
    r"[ \t*_]*(?:\n[ \t]*)*(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
_CORRECTED = re.compile(
    r"\b(?:wait|actually|correction|mistake|sorry|scratch that|on second thought|let me (?:re|double))|\bno,",
    re.IGNORECASE,
)
_DENIED = re.compile(r"not\b(?:.*?\b(?:but|it is|it's)\b:?\s+(?:rather\s+)?(.*))?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[A-Z\"'(\[*_$\\<#-]|$)")
_AROUND = re.compile(r"\A(?:[\s*_`~]|#+\s)+|[\s*_`~]+(?=[.,;!?]?\s*\Z)|\s+\Z")
_DOLLARS = re.compile(
    r"\A\$\$?(?=\S)([^$]*[^\s$])\$\$?([.,;!]?)\Z|\A\\\((.*)\\\)[.,;]?\Z|\A\\\[(.*)\\\][.,;]?\Z", re.DOTALL
)


@dataclass(frozen=True)
class FinalAnswer:
    """What a completion says in the end: the text, cleaned, and where it was found.

    form: "tag", "box", "hashes", "said" (after "the answer is"), "text" (all of it), or "none" where there is no
    answer: the thinking did not end, or the form that was asked for is missing.
    """

    text: str
    form: str

    @property
    def is_marked(self) -> bool:
        return self.form in FORMS["marked"]


NONE = FinalAnswer("", "none")


def final_answer(completion: str, form: Form | Collection[str] = "any") -> FinalAnswer:
    """The final answer of a completion, by the order in the head of this module.

    form: "any", "marked" (one of the three forms), "tag", "box" or "hashes".

    Raises ValueError for another form.
    """
    allowed = _allowed(form)
    text = after_thinking(completion)
    if text is None:
        return NONE
    found = _marked(text, allowed)
    if found is not None:
        return found
    text = text[-WINDOW:]
    if "said" in allowed:
        said = _said(text)
        if said is not None:
            return said
    return FinalAnswer(text.strip(), "text") if "text" in allowed else NONE


def after_thinking(completion: str) -> str | None:
    """What follows the thinking; all of it where there is none; None where it did not end."""
    end = start = 0
    for match in _CLOSED.finditer(completion):
        end = match.end()
    for match in _OPENED.finditer(completion, end):
        start = match.end()
    return None if start else completion[end:]


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, brackets matched; None without one that is closed."""
    found = _last_box(text)
    return None if found is None else found[1]


def clean(answer: str) -> str:
    """An answer without the markdown, code marks and math delimiters around it."""
    previous = None
    while answer != previous:
        previous = answer
        answer = _AROUND.sub("", answer)
        match = _DOLLARS.match(answer)
        if match:
            answer = next((group for group in (match[1], match[3], match[4]) if group is not None), answer)
    return answer


def sentences(text: str) -> list[str]:
    """The sentences and lines of the end of a text, the last one first; empty ones left out."""
    lines = text[-WINDOW:].split("\n")
    if len(text) > WINDOW:  # the window may begin inside a number
        lines[0] = lines[0].partition(" ")[2]
    parts = [part for line in lines for part in _SENTENCE_END.split(line)]
    return [part for part in reversed(parts) if part.strip()]


def _allowed(form: Form | Collection[str]) -> Collection[str]:
    if not isinstance(form, str):
        return form
    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}; got {form!r}.")
    return FORMS[form]


def _marked(text: str, allowed: Collection[str]) -> FinalAnswer | None:
    """The last of the marked forms that are allowed."""
    found: list[tuple[int, str, str]] = []
    if "tag" in allowed and (tag := _last_tag(text)) is not None:
        found.append((tag[0], "tag", tag[1]))
    if "box" in allowed and (box := _last_box(text)) is not None:
        found.append((box[0], "box", box[1]))
    if "hashes" in allowed and (line := _last_hashes(text[-WINDOW:])) is not None:
        found.append((line[0] + max(0, len(text) - WINDOW), "hashes", line[1]))
    if not found:
        return None
    tags = [entry for entry in found if entry[1] == "tag"]
    place, form, content = max(found)
    if tags and tags[0][0] <= place <= tags[0][0] + len(tags[0][2]) + len("<answer>"):
        place, form, content = tags[0]  # a box inside the tag
    if len(content) > MAX_ANSWER:
        return FinalAnswer("", form)
    inner = boxed(content) if form != "box" else None
    return FinalAnswer(clean(content if inner is None else inner), form)


def _last_tag(text: str) -> tuple[int, str] | None:
    """Place and content of the last <answer>; without a closing tag (it is a common stop word) up to the end."""
    start = None
    for match in _TAG.finditer(text):
        start = match
    if start is None:
        return None
    end = _TAG_END.search(text, start.end())
    return start.start(), text[start.end() : end.start() if end else len(text)]


def _last_box(text: str) -> tuple[int, str] | None:
    place = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if place < 0:
        return None
    match = _BOX.match(text, place)
    if match is None:
        return None
    if text[match.end()] != "{":
        return place, text[match.end()]  # \boxed 5
    depth = 0
    for here in range(match.end(), min(len(text), match.end() + MAX_ANSWER)):
        depth += (text[here] == "{") - (text[here] == "}")
        if depth == 0:
            return place, text[match.end() + 1 : here].strip()
    return None


def _last_hashes(text: str) -> tuple[int, str] | None:
    """The last line after ####. It is also markdown's heading: before the end it counts with a value only."""
    from reward_fns.reading.numerals import is_value

    found = list(_HASHES.finditer(text))
    for match in reversed(found):
        if not text[match.end() :].strip() or is_value(match[1]):
            return match.start(), match[1]
    return None


def _said(text: str) -> FinalAnswer | None:
    found = list(_SAID.finditer(text))
    if not found:
        return None
    after = text[found[-1].end() :]
    lines = after.split("\n", 1)
    parts = _SENTENCE_END.split(lines[0], maxsplit=1)
    rest = " ".join([*parts[1:], *lines[1:]])
    if _CORRECTED.search(rest):
        return None
    denied = _DENIED.match(parts[0])
    if denied is None:
        return FinalAnswer(clean(parts[0].strip()), "said")
    if denied[1]:
        return FinalAnswer(clean(denied[1].strip()), "said")  # not 72 but 71
    return FinalAnswer(rest.strip(), "text") if rest.strip() else FinalAnswer("", "said")
