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

_BY_ROW = ("_B", "_BT")  # how the names of fields end whose first axis is the rows


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
        greedy_B: return of the greedy completion of the row's prompt, the baseline `greedy`.
        entropy_BT: entropy of the distribution that each action was drawn from, nats.
        ref_logp_BT: log-probability of the same actions under the frozen reference.
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
    greedy_B: Tensor | None = None
    entropy_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    value_BT: Tensor | None = None
    bootstrap_BT: Tensor | None = None

    def __post_init__(self) -> None:
        self.mask_BT, self.valid_B = self.mask_BT.bool(), self.valid_B.bool()
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
            if value.is_floating_point() and field.name.endswith("_BT"):
                self._check_finite(field.name, value)
        if int(self.group_B.min()) < 0:
            raise ValueError("Rollouts.group_B holds a negative number; groups are numbered from 0.")

    def _check_finite(self, name: str, value_BT: Tensor) -> None:
        finite = torch.isfinite(value_BT)
        if finite.all():
            return
        bad = ~(finite.flatten(2).all(2) if value_BT.dim() > 2 else finite) & self.mask_BT
        if bad.any():
            row, step = (int(i) for i in bad.nonzero()[0])
            first = value_BT[row, step][~finite[row, step]].flatten()[0]
            raise ValueError(
                f"Rollouts.{name} holds {float(first)} at row {row}, step {step} (of "
                f"{int(bad.sum())} such places inside the mask); only finite numbers can be trained on."
            )

    def rows(self, index: Tensor) -> Any:
        """Returns the rows of every field whose name ends in _B or _BT.

        Args:
            index: int64, numbers of rows, in any order.
        """
        rows = self._copy()
        for name, value in self.__dict__.items():
            if value is not None and name.endswith(_BY_ROW):
                chosen = value[index] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]
                rows.__dict__[name] = chosen
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
        same.__dict__.update(self.__dict__)
        return same

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
            reward_B, known_B = known(reward_B, mask_BT.device)
        if not reward_B.isfinite().all():
            row = int((~reward_B.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward_B holds {float(reward_B[row])} at row {row}: only finite numbers of {reward_B.dtype} can be "
                "trained on. A row that could not be scored has valid_B False, or None in a list of rewards."
            )
        valid_B = known_B if valid_B is None else valid_B.bool() & known_B
        last_BT = is_last(mask_BT)
        reward_B = torch.where(valid_B, reward_B, torch.zeros_like(reward_B))
        return cls(
            mask_BT=mask_BT,
            logp_BT=logp_BT,
            group_B=group_B,
            reward_BT=last_BT * reward_B.to(logp_BT.dtype).unsqueeze(1),
            discount_BT=(mask_BT & ~last_BT) * torch.tensor(gamma, dtype=logp_BT.dtype, device=logp_BT.device),
            cut_BT=torch.zeros_like(mask_BT),
            valid_B=valid_B,
            truncated_B=torch.zeros_like(valid_B) if truncated_B is None else truncated_B.bool(),
            **others,
        )


def known(rewards: Sequence[float | None], device: Any = None) -> tuple[Tensor, Tensor]:
    """Returns float32 rewards, 0 where there is None, and where there is a reward: what `valid_B` says of rows."""
    values = torch.tensor([0.0 if reward is None else reward for reward in rewards], dtype=torch.float32)
    there = torch.tensor([reward is not None for reward in rewards], dtype=torch.bool)
    return values.to(device), there.to(device)


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
        for row, pieces in enumerate(self.inserted_B or ()):
            steps, length = [step for step, _ in pieces], int(self.length_B[row])
            if steps != sorted(set(steps)) or any(not 0 <= step < length for step in steps):
                raise ValueError(
                    f"TextRollouts.inserted_B has pieces before the steps {steps} of row {row}, which has {length} "
                    "sampled tokens; steps must rise and each must be that of a sampled token."
                )

    def completion_ids(self) -> list[list[int]]:
        """Each row's sampled tokens without padding, the end token included."""
        assert self.tokens_BT is not None
        lengths = self.length_B.tolist()
        return [row[:n] for row, n in zip(self.tokens_BT.tolist(), lengths, strict=True)]

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
        """The place of each sampled token in its row of `context_ids`."""
        shift_BT = torch.zeros_like(self.mask_BT, dtype=torch.int64)
        for row, pieces in enumerate(self.inserted_B or ()):
            for step, ids in pieces:
                shift_BT[row, step:] += len(ids)
        return shift_BT + torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)

    @property
    def context_length_B(self) -> Tensor:
        """Tokens after the prompt, sampled and inserted."""
        if self.inserted_B is None:
            return self.length_B
        inserted = [sum(len(ids) for _, ids in pieces) for pieces in self.inserted_B]
        return self.length_B + torch.tensor(inserted, device=self.mask_BT.device)
