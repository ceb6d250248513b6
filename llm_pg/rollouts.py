"""The one data type of both tracks: a batch of sampled rows of steps, with what happened at each.

A row is a completion (steps are tokens) or an episode or a segment of one (steps are actions). A rollout of text or of
an environment carries its own inputs beside this in a subclass; the algorithms read only what is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import to_device

_BY_ROW = ("_B", "_BT")  # how the names of fields end whose first axis is the rows
# What the host has to know to lay out a batch, fetched together.
_ON_HOST = ("mask_BT", "tokens_BT", "group_B", "valid_B", "truncated_B")


@dataclass
class Rollouts:
    """Sampled rows of steps, checked at the border. A field may have further axes after the B or BT of its name.

    Attributes:
        mask_BT: bool, True where the policy acted (for text: each completion token, the EOS included).
        logp_BT: log-probability of each action under the distribution that was really sampled; nats, <= 0 for discrete
            actions.
        group_B: int64, 0..P-1; rows with the same number share their prompt or start state.
        reward_BT: r_t; a verdict on a whole completion is at its last token.
        discount_BT: factor between step t and t+1, 0 where the episode ends (and outside the mask).
        cut_BT: True where the row stops although the episode does not.
        valid_B: False where the row could not be scored: it enters no baseline and gets weight 0.
        truncated_B: True where the row hit a length limit.
        part_reward_B: score of each reward function (B, F), NaN = it gave none; None = there is one function alone.
        part_weight_B: weight of each (B, F).
        role_B: int64, the number of the row's role, by which `baseline_column` tells running means apart.
        greedy_B: return of the greedy completion of the row's prompt, the baseline `greedy`.
        entropy_BT: entropy of the distribution that each action was drawn from, nats.
        ref_logp_BT: log-probability of the same actions under the frozen reference.
        teacher_logp_BT: log-probability of the same actions under the teacher.
        value_BT: V(s_t) of the critic.
        bootstrap_BT: V(s_{t+1}), read where `cut_BT`.
    """

    mask_BT: Tensor
    logp_BT: Tensor
    group_B: Tensor
    reward_BT: Tensor
    discount_BT: Tensor
    cut_BT: Tensor
    valid_B: Tensor
    truncated_B: Tensor
    part_reward_B: Tensor | None = None
    part_weight_B: Tensor | None = None
    role_B: Tensor | None = None
    greedy_B: Tensor | None = None
    entropy_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    teacher_logp_BT: Tensor | None = None
    value_BT: Tensor | None = None
    bootstrap_BT: Tensor | None = None

    def __post_init__(self) -> None:
        self.mask_BT, self.valid_B = self.mask_BT.bool(), self.valid_B.bool()
        self._host: dict[str, tuple[Tensor, Tensor]] = {}  # fields as they were fetched, and what they hold
        shape = self.mask_BT.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"Rollouts need at least one row and one step, shape (B, T); mask_BT has {tuple(shape)}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            expected = tuple(shape) if field.name.endswith("_BT") else tuple(shape[:1])
            if field.name.endswith(_BY_ROW) and tuple(value.shape[: len(expected)]) != expected:
                raise ValueError(
                    f"Rollouts.{field.name} has shape {tuple(value.shape)}; with mask_BT {tuple(shape)} it must "
                    f"begin with {expected}."
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """By one look at the device."""
        numbers = {name: x for name, x in vars(self).items() if name.endswith("_BT") and isinstance(x, Tensor)}
        numbers = {name: x_BT for name, x_BT in numbers.items() if x_BT.is_floating_point()}
        facts = [*(torch.isfinite(x_BT).all() for x_BT in numbers.values()), self.group_B.min() >= 0]
        *finite, counted = torch.stack(facts).tolist()
        for (name, x_BT), is_finite in zip(numbers.items(), finite, strict=True):
            if not is_finite:
                self._check_finite(name, x_BT)
        if not counted:
            raise ValueError("Rollouts.group_B holds a negative number; groups are numbered from 0.")

    def _check_finite(self, name: str, value_BT: Tensor) -> None:
        finite = torch.isfinite(value_BT)
        bad = ~(finite.flatten(2).all(2) if value_BT.dim() > 2 else finite) & self.mask_BT
        if bad.any():
            row, step = (int(i) for i in bad.nonzero()[0])
            first = value_BT[row, step][~finite[row, step]].flatten()[0]
            raise ValueError(
                f"Rollouts.{name} holds {float(first)} at row {row}, step {step} (of "
                f"{int(bad.sum())} such places inside the mask); only finite numbers can be trained on."
            )

    def on_host(self, name: str) -> Tensor:
        """Returns a field in the host's memory.

        On an accelerator the first call waits for it, and fetches what the host needs to lay out batches; the rows of
        these rollouts that `rows` gives know it too.

        Args:
            name: mask_BT, tokens_BT, group_B, valid_B or truncated_B.
        """
        value: Tensor = getattr(self, name)
        if value.device.type == "cpu":
            return value
        if name not in self._host or self._host[name][0] is not value:
            fields = {key: x for key in _ON_HOST if isinstance(x := getattr(self, key, None), Tensor)}
            flat = torch.cat([x.reshape(-1).long() for x in fields.values()]).cpu()
            parts = flat.split([x.numel() for x in fields.values()])
            for (key, x), part in zip(fields.items(), parts, strict=True):
                self._host[key] = x, part.view(x.shape).to(x.dtype)
        return self._host[name][1]

    def rows(self, index: Tensor | slice) -> Any:
        """Returns the rows of every field whose name ends in _B or _BT.

        Args:
            index: int64, numbers of rows, in any order. Those of the host make nobody wait.
        """
        self.on_host("mask_BT")  # once, not for each part of a batch
        rows = self._copy()
        there = to_device(index, self.mask_BT.device) if isinstance(index, Tensor) else index
        for name, value in self.__dict__.items():
            if value is None or not name.endswith(_BY_ROW):
                continue
            if isinstance(value, Tensor):
                rows.__dict__[name] = value[there]
            else:
                rows.__dict__[name] = value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]
        if self._host and (isinstance(index, slice) or index.device.type == "cpu"):
            known = {name: x for name, (of, x) in self._host.items() if of is self.__dict__[name]}
            rows._host = {name: (rows.__dict__[name], x[index]) for name, x in known.items()}
        return rows

    def steps(self, kept: Tensor) -> Any:
        """Returns single steps as rows of one step each.

        Args:
            kept: int64, numbers of the flattened B·T, rising.
        """
        steps = self._copy()
        row = kept // self.mask_BT.shape[1]
        every = len(kept) == self.mask_BT.numel()
        for name, value in self.__dict__.items():
            if not isinstance(value, Tensor):
                continue
            if name.endswith("_BT"):
                flat = value.flatten(0, 1)
                steps.__dict__[name] = (flat if every else flat[kept]).unsqueeze(1)
            elif name.endswith("_B"):
                steps.__dict__[name] = value[row]
        return steps

    def _copy(self) -> Any:
        """The same fields, not checked again: what was checked once holds for every micro-batch of it."""
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__, _host={})
        return same

    def changed(self, **fields: Any) -> Any:
        """Returns the same rows with other fields, checked.

        Args:
            **fields: by their names.
        """
        other = dataclasses.replace(self, **fields)
        other._host = dict(self._host)
        return other

    @property
    def length_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    @classmethod
    def of_scored_text(
        cls,
        *,
        mask_BT: Tensor,
        logp_BT: Tensor,
        group_B: Tensor,
        reward_B: Tensor | Sequence[float | None],
        truncated_B: Tensor | None = None,
        valid_B: Tensor | None = None,
        gamma: float = 1.0,
        **others: Any,
    ) -> Any:
        """Returns rollouts whose only reward is one of the whole completion, given at each row's last token.

        Args:
            mask_BT: bool, each completion token, the EOS included.
            logp_BT: log-probability of each token by the sampler, nats.
            group_B: int64, the number of each row's group.
            reward_B: (B,), finite; in a list None = could not be scored.
            truncated_B: True where the row hit the length limit; None = no row did.
            valid_B: False where a row could not be scored, beside those that are None.
            gamma: discount for each token, in (0, 1].
            **others: further fields.

        Raises:
            ValueError: a reward that is not finite.
        """
        mask_BT = mask_BT.bool()
        known_B = torch.ones_like(mask_BT[:, 0])
        if not isinstance(reward_B, Tensor):
            reward_B, known_B = known(reward_B)
        if not reward_B.isfinite().all():
            row = int((~reward_B.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward_B holds {float(reward_B[row])} at row {row}: only finite numbers of {reward_B.dtype} can be "
                "trained on. A row that could not be scored has valid_B False, or None in a list of rewards."
            )
        reward_B, known_B = (to_device(x_B, mask_BT.device) for x_B in (reward_B, known_B))
        valid_B = known_B if valid_B is None else valid_B.bool() & known_B
        last_BT = is_last(mask_BT)
        reward_B = torch.where(valid_B, reward_B, torch.zeros_like(reward_B))
        return cls(
            mask_BT=mask_BT,
            logp_BT=logp_BT,
            group_B=group_B,
            reward_BT=last_BT * reward_B.to(logp_BT.dtype).unsqueeze(1),
            discount_BT=(mask_BT & ~last_BT).to(logp_BT.dtype) * gamma,
            cut_BT=torch.zeros_like(mask_BT),
            valid_B=valid_B,
            truncated_B=torch.zeros_like(valid_B) if truncated_B is None else truncated_B.bool(),
            **others,
        )


def known(rewards: Sequence[float | None], device: Any = None) -> tuple[Tensor, Tensor]:
    """Returns float32 rewards, 0 where there is None, and where there is a reward: what `valid_B` says of rows."""
    values = torch.tensor([0.0 if reward is None else reward for reward in rewards], dtype=torch.float32)
    there = torch.tensor([reward is not None for reward in rewards], dtype=torch.bool)
    return (values, there) if device is None else (to_device(values, device), to_device(there, device))


def distinct(prompt_ids_B: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Returns the prompts of rows, each once and in the order of their first rows, and each row's place among them.

    A prompt is an object: its rows hold one and the same tuple, as `TextRollouts` has it, so that nobody hashes
    thousands of token ids to find a group again. Equal tuples are two prompts, which costs time and changes no result.
    """
    prompts: list[tuple[int, ...]] = []
    place: dict[int, int] = {}
    places = []
    for prompt in prompt_ids_B:
        at = place.setdefault(id(prompt), len(prompts))
        if at == len(prompts):
            prompts.append(prompt)
        places.append(at)
    return prompts, places


def is_last(mask_BT: Tensor) -> Tensor:
    """True at the last step inside each row's mask, (B, T)."""
    after_BT = mask_BT.flip(1).long().cumsum(1).flip(1)
    return mask_BT & (after_BT == 1)


# Of one row: (step, ids that are before that step's token and were not sampled).
Inserted = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass
class TextRollouts(Rollouts):
    """Completions of a causal LM. `tokens_BT` is what was sampled, never re-tokenised; right-padded with any id.

    A step is a sampled token and nothing else. What an environment says between two of them (a tool's result, a user's
    turn) is a part of the state in which the next one is chosen, so it is beside the steps, in `inserted_B`: no
    estimator meets it, and no weight, reward or discount can fall on it.

    prompt_ids_B: token ids of each row's prompt; equal ones become one object here, see `distinct`.
    inserted_B: for each row, pairs of a step t and the ids that its context holds before token t, by rising t; None =
        nothing was inserted in any row. What came after the last sampled token is left out: no token depends on it.
    """

    tokens_BT: Tensor | None = None
    prompt_ids_B: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    inserted_B: list[Inserted] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        same: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.prompt_ids_B = [same.setdefault(prompt, prompt) for prompt in self.prompt_ids_B]
        lengths = None if self.inserted_B is None else self.lengths()
        for row, pieces in enumerate(self.inserted_B or ()):
            assert lengths is not None
            steps, length = [step for step, _ in pieces], lengths[row]
            if steps != sorted(set(steps)) or any(not 0 <= step < length for step in steps):
                raise ValueError(
                    f"TextRollouts.inserted_B has pieces before the steps {steps} of row {row}, which has {length} "
                    "sampled tokens; steps must rise and each must be that of a sampled token."
                )

    def lengths(self) -> list[int]:
        """Sampled tokens of each row."""
        lengths: list[int] = self.on_host("mask_BT").sum(1).tolist()
        return lengths

    def completion_ids(self) -> list[list[int]]:
        """Each row's sampled tokens without padding, the end token included."""
        tokens = self.on_host("tokens_BT").tolist()
        return [row[:n] for row, n in zip(tokens, self.lengths(), strict=True)]

    def context_ids(self) -> list[list[int]]:
        """What follows each row's prompt as the model reads it: sampled and inserted tokens."""
        if self.inserted_B is None:
            return self.completion_ids()
        rows = []
        for sampled, pieces in zip(self.completion_ids(), self.inserted_B, strict=True):
            row, at = [], 0  # type: list[int], int
            for step, ids in pieces:
                row += [*sampled[at:step], *ids]
                at = step
            rows.append(row + sampled[at:])
        return rows

    def place_BT(self) -> Tensor:
        """The place of each sampled token in its row of `context_ids`, on the host."""
        place_BT = torch.arange(self.mask_BT.shape[1]).repeat(len(self.mask_BT), 1)
        for row, pieces in enumerate(self.inserted_B or ()):
            for step, ids in pieces:
                place_BT[row, step:] += len(ids)
        return place_BT

    @property
    def context_length_B(self) -> Tensor:
        """Tokens after the prompt, sampled and inserted, on the host."""
        length_B = self.on_host("mask_BT").sum(1)
        if self.inserted_B is None:
            return length_B
        return length_B + torch.tensor([sum(len(ids) for _, ids in pieces) for pieces in self.inserted_B])
