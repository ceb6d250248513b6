"""A scored batch as JSON and tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...prompts import Prompt
from ...rewards.tally import Scores
from ...rollouts import TextRollouts
from ..experience import Experience

# What a batch has when it is sampled and scored; the rest is computed when it is trained on.
_TENSORS = (
    *("mask_BT", "logp_BT", "group_B", "reward_BT", "discount_BT", "cut_BT", "valid_B", "truncated_B"),
    *("part_reward_B", "part_weight_B", "greedy_B", "tokens_BT"),
)


def pack(experience: Experience) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Without the columns that reward functions logged beside their scores, which nobody reads after scoring."""
    parts = [pack(part) for part in experience.collected]
    numbers = {
        "prompts": [prompt.index for prompt in experience.prompts],
        "texts": experience.texts,
        "scores": {**dataclasses.asdict(dataclasses.replace(experience.scores, extra={}, tokens=None))},
        "num_generations": experience.num_generations,
        "collected": [own for own, _ in parts],
    }
    tensors = {f"collected{i}.{name}": x for i, (_, own) in enumerate(parts) for name, x in own.items()}
    for name in _TENSORS:
        value = getattr(experience.rollouts, name)
        if value is not None:
            tensors[name] = value
    return numbers, tensors


def unpack(
    numbers: dict[str, Any], tensors: Mapping[str, Tensor], prompts: Mapping[int, Prompt], pieces: Any
) -> Experience:
    """prompts: by index. pieces: see `Experience`."""
    own = [prompts[index] for index in numbers["prompts"]]
    group = numbers["num_generations"]
    fields: dict[str, Any] = {name: tensors[name] for name in _TENSORS if name in tensors}
    rollouts = TextRollouts(prompt_ids_B=[prompt.ids for prompt in own for _ in range(group)], **fields)
    collected = []
    for i, part in enumerate(numbers["collected"]):
        prefix = f"collected{i}."
        below = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        collected.append(unpack(part, below, prompts, pieces))
    return Experience(own, rollouts, numbers["texts"], Scores(**numbers["scores"]), group, pieces, collected=collected)
