"""Dynamic sampling: groups that say nothing are replaced by groups of further prompts, up to a budget of rounds.

A group whose rewards are all equal has advantage 0 under a group baseline. Its place in the batch is given to the
first mixed group among those of `Prompts.further` for that place; where none of the rounds brings one, the group
that came first stays. A place's further prompts are a function of (seed, step, round, place), so no state is kept for
them, and what a place ends up with does not depend on other places, nor on the number of ranks.

What it does to the gradient. Let m(x) be the probability that a group of prompt x is mixed, M its mean over prompts.
Accepted prompts come with probability proportional to m(x), and an accepted group has 1/m(x) times the mean weight of
any group of x. The two cancel: with R rounds the expected policy gradient of a place is the one without dynamic
sampling times (1 - (1 - M)^(R+1)) / M (exact for independent prompts and a reduction by constants; proven by
enumeration in the tests). So its direction is kept, and its length no longer falls with the share of mixed groups.

What is biased: terms that equal groups have too. A KL penalty, an entropy bonus and a critic's loss are then means
over prompts weighted by m(x), and so are the reward and the lengths of the batch (`sampled_reward` is of the step's
own prompts). A reduction by the tokens of the batch (dapo) divides by those of mixed groups.

Departure from Yu et al. 2025 (DAPO, arXiv 2503.14476): there a step samples until it is full; here a budget bounds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..estimators.returns import reward_to_go, total_return
from ..prompts import Prompt
from ..rewards.tally import Scores
from ..rollouts import TextRollouts, is_last
from .experience import Experience

Again = Callable[[list[Prompt], Tensor], Experience]


def mixed_groups(experience: Experience, truncation_penalty: float = 0.0, *, to_go: bool = False) -> Tensor:
    """bool (P): groups in which not every token of the scorable completions is credited with the same return.

    truncation_penalty: what the algorithm takes off truncated completions. to_go: whether it credits a token with the
    rewards from there on; then rewards of several turns that add up to the same are not silent, nor is any reward that
    is discounted.
    """
    rollouts = experience.rollouts
    late_BT = is_last(rollouts.mask_BT) & rollouts.truncated_B.unsqueeze(1)
    reward_BT = rollouts.reward_BT - truncation_penalty * late_BT
    if to_go:
        credit_BT = reward_to_go(reward_BT, rollouts.discount_BT, rollouts.cut_BT, rollouts.bootstrap_BT)
    else:
        credit_BT = total_return(reward_BT, rollouts.discount_BT).unsqueeze(1).expand_as(reward_BT)
    kept_BT, groups = rollouts.mask_BT & rollouts.valid_B.unsqueeze(1), (len(experience.prompts), -1)
    high_P = credit_BT.masked_fill(~kept_BT, -torch.inf).reshape(groups).amax(1)
    low_P = credit_BT.masked_fill(~kept_BT, torch.inf).reshape(groups).amin(1)
    return high_P > low_P


def refill(
    first: Experience,
    again: Again,
    further: Callable[[int], Sequence[Prompt | None]],
    places_P: Tensor,
    *,
    rounds: int,
    truncation_penalty: float = 0.0,
    to_go: bool = False,
) -> Experience:
    """`first` with its equal groups replaced by mixed ones, where the rounds bring them.

    Args:
        first: the step's own groups. again: completions of further prompts, given the places of their random streams.
        further: round (from 1) -> the prompt for each place of the step on all ranks; None = there are no more.
        places_P: int64, the place of each group of `first` in the step. rounds: the budget.
        truncation_penalty, to_go: see `mixed_groups`.
    """

    def mixed(experience: Experience) -> list[bool]:
        answer: list[bool] = mixed_groups(experience, truncation_penalty, to_go=to_go).tolist()
        return answer

    collected, chosen = [first], [(first, group) for group in range(len(first.prompts))]
    missing = [group for group, is_mixed in enumerate(mixed(first)) if not is_mixed]
    for number in range(1, rounds + 1):
        prompts = further(number)
        asked = [(g, prompt) for g in missing if (prompt := prompts[int(places_P[g])]) is not None]
        if not asked:
            break
        # Of every round the places have random streams of their own.
        places = places_P[torch.tensor([g for g, _ in asked])] + number * len(prompts)
        more = again([prompt for _, prompt in asked], places)
        collected.append(more)
        for place, is_mixed in enumerate(mixed(more)):
            if is_mixed:
                chosen[asked[place][0]] = (more, place)
                missing.remove(asked[place][0])
    return joined(chosen, collected)


def joined(chosen: Sequence[tuple[Experience, int]], collected: list[Experience]) -> Experience:
    """One experience of the chosen groups, in their order, that remembers all that was collected for it."""
    if len(collected) == 1:  # it says so: ranks tell each other the same names
        return dataclasses.replace(collected[0], collected=collected)
    return dataclasses.replace(of_groups(chosen, collected), collected=collected)


def of_groups(chosen: Sequence[tuple[Experience, int]], parts: Sequence[Experience]) -> Experience:
    """The chosen groups of some experiences below each other, in their order."""
    size = parts[0].num_generations
    starts, total = {}, 0
    for experience in parts:
        starts[id(experience)] = total
        total += len(experience.texts)
    rows = [starts[id(experience)] + group * size + i for experience, group in chosen for i in range(size)]
    rollouts = _stacked([experience.rollouts for experience in parts]).rows(torch.tensor(rows))
    rollouts.group_B = torch.arange(len(chosen), device=rollouts.group_B.device).repeat_interleave(size)
    texts = [text for experience in parts for text in experience.texts]
    return Experience(
        [experience.prompts[group] for experience, group in chosen],
        rollouts,
        [texts[row] for row in rows],
        _scores([experience.scores for experience in parts], rows),
        size,
        parts[0].pieces,
    )


def _stacked(parts: Sequence[TextRollouts]) -> Any:
    """All rows below each other, padded to the longest."""
    width = max(part.mask_BT.shape[1] for part in parts)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(TextRollouts):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "inserted_B" and any(value is not None for value in values):
            values = [value or [()] * len(part.mask_BT) for value, part in zip(values, parts, strict=True)]
        if values[0] is None:
            continue
        if isinstance(values[0], Tensor):
            wide = [_widened(x, width) if field.name.endswith("_BT") else x for x in values]
            fields[field.name] = torch.cat(wide)
        else:
            fields[field.name] = [row for value in values for row in value]
    return TextRollouts(**fields)


def _widened(x_BT: Tensor, width: int) -> Tensor:
    filler = x_BT.new_zeros(len(x_BT), width - x_BT.shape[1], *x_BT.shape[2:])
    return torch.cat([x_BT, filler], 1)


def _scores(parts: Sequence[Scores], rows: Sequence[int]) -> Scores:
    """Of the chosen rows; what functions reported for themselves is averaged over all that was collected."""
    sizes = [len(part.reward) for part in parts]

    def picked(columns: Sequence[Sequence[Any] | None]) -> list[Any]:
        whole = [v for column, n in zip(columns, sizes, strict=True) for v in (column or [None] * n)]
        return [whole[row] for row in rows]

    problems: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, causes in part.problems.items():
            reported = problems.setdefault(name, {})
            for cause, count in causes.items():
                reported[cause] = reported.get(cause, 0) + count
    metrics = {}
    for name in sorted({name for part in parts for name in part.metrics}):
        known = [(part.metrics[name], n) for part, n in zip(parts, sizes, strict=True) if name in part.metrics]
        metrics[name] = sum(value * n for value, n in known) / sum(n for _, n in known)
    return Scores(
        picked([part.reward for part in parts]),
        {name: picked([part.parts.get(name) for part in parts]) for name in _names(parts, "parts")},
        {name: picked([part.extra.get(name) for part in parts]) for name in _names(parts, "extra")},
        metrics,
        problems,
        parts[0].weights,
    )


def _names(parts: Sequence[Scores], field: str) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in getattr(part, field)))
