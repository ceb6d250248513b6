"""From sampled ids to the text that reward functions and people read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .template import control_ids, special_ids


def special_words(tokenizer: Any, ends: Collection[int], chat_template_kwargs: dict[str, Any]) -> dict[int, str]:
    """The special tokens that are words of the model, such as <think> and <answer>, by id.

    All but those that say nothing by themselves: begin, end (`ends`: ids that end a completion), padding, and what the
    chat template writes around a turn.
    """
    words = special_ids(tokenizer) - control_ids(tokenizer, chat_template_kwargs) - set(ends)
    return {number: str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(words)}


class Reader:
    """Decodes completions, without special tokens.

    Args:
        tokenizer: of the model. words: special tokens that are in the text all the same, by id.
    """

    def __init__(self, tokenizer: Any, words: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.left_out = special_ids(tokenizer) - set(words) if words else None

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        left_out = self.left_out
        if left_out is not None:
            rows = [[number for number in row if number not in left_out] for row in rows]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=left_out is None)
        return texts
