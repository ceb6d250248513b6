"""What several ranks have in flight, in one checkpoint; and each rank's part of it, on any number of ranks.

A batch is kept as each rank sampled it. The same number of ranks takes the same parts back, bit for bit; another number
deals the groups out anew, in the order that they have on all ranks together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...config.check import share
from ...prompts import Prompt
from ..experience import Experience
from ..refill import of_groups
from .serialization import unpack

# What JSON holds of batches, and their tensors.
RankBatches = tuple[list[dict[str, Any]], dict[str, Tensor]]


def of_all(parts: Sequence[RankBatches]) -> RankBatches:
    """What every rank tells of itself, in their order, as one: the batches that all of them have."""
    have = [{(entry["batch"], entry["version"]) for entry in reported} for reported, _ in parts]
    common = set.intersection(*have)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for rank, (reported, own) in enumerate(parts):
        for entry in reported:
            batch = entry["batch"]
            if (batch, entry["version"]) not in common:
                continue
            entries.append({**entry, "rank": rank} if rank else entry)
            tensors.update({_prefix(rank) + n: x for n, x in own.items() if n.startswith(f"{batch}.")})
    return entries, tensors


def by_batch(
    reported: Sequence[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[int, int, list[RankBatches]]]:
    """Batch, version, and what each rank had of it, with the names of tensors as `serialization.pack` gave them."""
    for batch, version in dict.fromkeys((entry["batch"], entry["version"]) for entry in reported):
        parts: list[RankBatches] = []
        for entry in (e for e in reported if e["batch"] == batch):
            prefix = f"{_prefix(entry.get('rank', 0))}{batch}."
            own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
            parts.append(([entry], own))
        yield batch, version, parts


def of_rank(
    parts: Sequence[RankBatches], number: int, count: int, prompts: Mapping[int, Prompt], pieces: Any, device: Any
) -> tuple[Experience, dict[str, float]] | None:
    """The part of rank `number` of `count` in a batch, and the seconds that it took.

    None where it is to be sampled again: another number of ranks, and groups that were refilled, whose rounds belong to
    the ranks that made them.
    """

    def opened(part: RankBatches) -> Experience:
        (entry,), tensors = part
        return unpack(entry["experience"], {n: x.to(device) for n, x in tensors.items()}, prompts, pieces)

    if len(parts) == count:
        (entry,), _ = parts[number]
        return opened(parts[number]), entry["seconds"]
    whole = [opened(part) for part in parts]
    if any(experience.collected for experience in whole):
        return None
    groups = [(experience, group) for experience in whole for group in range(len(experience.prompts))]
    mine = of_groups([groups[place] for place in share(len(groups), number, count)], whole)
    if number:  # what functions had to say is reported once
        mine = dataclasses.replace(mine, scores=dataclasses.replace(mine.scores, problems={}))
    took = [entry["seconds"] for (entry,), _ in parts]
    return mine, {phase: max(each.get(phase, 0.0) for each in took) for phase in took[0]}


def _prefix(rank: int) -> str:
    return f"rank{rank}." if rank else ""
