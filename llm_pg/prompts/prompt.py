"""The prompt as the sampler, the reward functions and the metrics see it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("llm_pg.prompts")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its place in its set (training or held out), from 0; the same in every run with the same data, seed and
            settings, so it names the prompt in metrics.
        text: what the model reads, the chat template applied.
        messages: the conversation that the template was applied to; None for a plain prompt.
        ids: the token ids of `text`, with the special tokens that the tokenizer puts around a plain prompt.
        row: every column of its row, renamed and extracted ones included; what reward functions receive.
    """

    index: int
    text: str
    messages: list[dict[str, str]] | None
    ids: tuple[int, ...]
    row: dict[str, Any]


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256, in hex, of the ids and rows of these prompts in their order: equal for equal data.

    A value that JSON does not know enters as its text, or, if its text could hold a memory address, as its type.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.ids, prompt.row], sort_keys=True, default=_plain).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return name if type(value).__str__ is object.__str__ else f"{name} {value}"
