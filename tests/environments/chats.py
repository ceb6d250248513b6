"""A chat template with tools for the character tokenizer, and tools for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_pg.sampling.protocol import Completions, SamplingParams

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name + ';' }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']\n' }}{% else %}"
    "{{ m.role[0] + ':' + m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments}"
    " | tojson }}</tool_call>{% endfor %}{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def call(name: str, **arguments: Any) -> str:
    """A turn that calls a tool."""
    import json

    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def double(number: int) -> int:
    """Twice a number.

    Args:
        number: any
    """
    return 2 * number


def process(word: str) -> str:
    """The process that this runs in.

    Args:
        word: is not read
    """
    return f"{word} {os.getpid()}"


def broken(how: str) -> str:
    """Raises, sleeps or dies.

    Args:
        how: which of them
    """
    if how == "sleep":
        time.sleep(60)
    if how == "die":
        os._exit(3)
    raise KeyError(how)


async def patient(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long
    """
    await asyncio.sleep(seconds)
    return "waited"


class Scripted:
    """Says what a script has for each row, turn by turn; ids of the character tokenizer, with the end token.

    Attributes:
        prompts: what it was given, turn by turn.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Sequence[str]], ends: bool = True) -> None:
        self.tokenizer, self.rows = tokenizer, [list(turns) for turns in rows]
        self.ends = ends
        self.prompts: list[list[tuple[int, ...]]] = []

    def sample(self, prompt_ids: Any, num_generations: int, params: SamplingParams, keys_B: Tensor) -> Completions:
        self.prompts.append([tuple(ids) for ids in prompt_ids for _ in range(num_generations)])
        live = [turns for turns in self.rows if turns]
        said = [self.tokenizer(turns.pop(0), add_special_tokens=False)["input_ids"] for turns in live]
        end = [self.tokenizer.eos_token_id] if self.ends else []
        ids = [[*row, *end][: params.max_completion_length] for row in said]
        width = max(map(len, ids))
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask_BT = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
        cut_B = torch.tensor([row[-1] != self.tokenizer.eos_token_id for row in ids])
        return Completions(tokens_BT, mask_BT, -torch.ones(tokens_BT.shape), cut_B)
