"""The form of a completion: tags in order, or a regular expression. Shape only: junk in the right form is paid."""

import re
from collections.abc import Sequence
from typing import Any

from reward_fns.registry import reward

MAX_CHARACTERS = 100_000
SECONDS = 0.5


@reward(low=0.0, high=1.0, floor=1.0, checks="shape", special_tokens=True)
def format_tags(completion: str, tags: Sequence[str] = ("think", "answer"), **row: Any) -> float:
    """1 when the completion is <a>...</a><b>...</b> for the tags in order, each once and with text in it; else 0.

    Only white space may be before, between and after them, and no tag of the list may appear a second time, so a
    spray of tags earns 0.

    Range {0, 1}. Floor 1: junk between the right tags is paid in full; use it beside a reward for the answer.
    """
    if not tags or isinstance(tags, str):
        raise ValueError(f"format_tags needs a list of tag names, and got tags={tags!r}.")
    rest = completion
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if completion.count(opening) != 1 or completion.count(closing) != 1:
            return 0.0
        before, _, rest = rest.partition(opening)
        inside, found, rest = rest.partition(closing)
        if before.strip() or not found or not inside.strip():
            return 0.0
    return float(not rest.strip())


@reward(low=0.0, high=1.0, floor=1.0, checks="shape", requires=("regex",), special_tokens=True)
def format_regex(completion: str, pattern: str, whole: bool = True, **row: Any) -> float:
    """1 when the pattern matches the completion (all of it, or with `whole` false any part of it); else 0.

    The dot matches line breaks. The search is given half a second, so a pattern that backtracks without end on a
    crafted completion scores 0 and does not hang; so does a completion over 100,000 characters.

    Range {0, 1}. Floor 1: junk of the right form is paid in full. Raises ValueError for a pattern that is none.
    """
    import regex  # a dependency of transformers; the standard library's matcher has no time limit

    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, re.error) as error:
        raise ValueError(f"format_regex cannot compile the pattern {pattern!r}: {error}.") from error
    if len(completion) > MAX_CHARACTERS:
        return 0.0
    match = compiled.fullmatch if whole else compiled.search
    try:
        return float(match(completion, timeout=SECONDS) is not None)
    except TimeoutError:
        return 0.0
