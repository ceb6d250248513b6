"""A scored batch: as rollouts, and as what a person can read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..estimators.kl import k3
from ..prompts import Prompt
from ..rewards.tally import Scores
from ..rollouts import TextRollouts

MOST_TOKENS_OF_A_CHARACTER = 4  # bytes of the longest character in UTF-8
LONGEST_COLUMN = 2_000  # characters of a column beside a completion


@dataclass
class Experience:
    """A scored batch. Row i belongs to prompt i // num_generations.

    Attributes:
        prompts: of the groups.
        rollouts: tensors of the completions, as the algorithm reads them.
        texts: of each completion.
        scores: what each completion earned, in parts.
        num_generations: completions of each prompt.
        pieces: splits ids into the text of each token; None = not known.
        collected: with dynamic sampling all that was sampled for it, round by round; [] = this is all.
        staleness: with rollouts ahead, the updates between the weights it was sampled with and those it meets; None =
            none.
    """

    prompts: list[Prompt]
    rollouts: TextRollouts
    texts: list[str]
    scores: Scores
    num_generations: int
    pieces: Pieces | None = None
    collected: list[Experience] = field(default_factory=list)
    staleness: int | None = None

    def metrics(self) -> dict[str, float]:
        """Facts of the batch; see `metrics.METRICS`."""
        rollouts = self.rollouts
        valid_B, reward_B = rollouts.on_host("valid_B"), rollouts.reward_BT.sum(1).cpu()
        known = reward_B[valid_B].double()
        values_PG, valid_PG = (x_B.view(-1, self.num_generations) for x_B in (reward_B, valid_B))
        most_P = values_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
        uniform_P = most_P <= values_PG.masked_fill(~valid_PG, torch.inf).amin(1)
        out = {
            "reward": float(known.mean()) if len(known) else float("nan"),
            "reward_std": float(known.std()) if len(known) > 1 else 0.0,
            "unscorable": 1 - float(valid_B.double().mean()),
            **{f"failed/{name}": count for name, count in self.scores.failures().items()},
            "uniform_groups": float(uniform_P.double().mean()),
            "completion_length": float(rollouts.on_host("mask_BT").sum(1).double().mean()),
            "truncated": float(rollouts.on_host("truncated_B").double().mean()),
            "tokens": sum(rollouts.lengths()),
            "prompt_tokens": self.num_generations * sum(len(prompt.ids) for prompt in self.prompts),
            **self._lengths(),
        }
        for name, values in self.scores.parts.items():
            scored = [v for v in values if v is not None]
            out[f"reward/{name}"] = sum(scored) / len(scored) if scored else float("nan")
            out[f"rewards/{name}/std"] = statistics.stdev(scored) if len(scored) > 1 else 0.0
        reported = {name: value for name, value in self.scores.metrics.items() if not name.startswith("rewards/")}
        out.update({f"log/{name}": value for name, value in reported.items()})
        if self.staleness is not None:
            out["staleness"] = self.staleness
        return {**out, **self._refilled()}

    def _lengths(self) -> dict[str, float]:
        """The spread of the lengths, by TRL's names."""
        length_B = self.rollouts.on_host("mask_BT").sum(1).double()
        ended = length_B[~self.rollouts.on_host("truncated_B")]
        out = {"min_length": float(length_B.min()), "max_length": float(length_B.max())}
        spread = {"mean": ended.mean(), "min": ended.min(), "max": ended.max()} if len(ended) else {}
        out.update({f"{kind}_terminated_length": float(spread.get(kind, 0.0)) for kind in ("mean", "min", "max")})
        return {f"completions/{name}": value for name, value in out.items()}

    def _refilled(self) -> dict[str, float]:
        """What dynamic sampling took, and the reward of the step's own prompts, which the batch's no longer is."""
        if not self.collected:
            return {}
        own = self.collected[0].rollouts
        known = own.reward_BT.sum(1).cpu()[own.on_host("valid_B")].double()
        return {
            "refill_rounds": len(self.collected) - 1,
            "groups_dropped": sum(len(part.prompts) for part in self.collected) - len(self.prompts),
            "sampled_reward": float(known.mean()) if len(known) else float("nan"),
            "tokens": sum(sum(part.rollouts.lengths()) for part in self.collected),
        }

    def readable(
        self, advantage_BT: Tensor, num_groups: int, more: dict[str, Tensor] | None = None
    ) -> list[dict[str, Any]]:
        """Returns the first groups as JSON rows: texts, scores, and the text and numbers of every token.

        Tokens that an environment inserted are in their place, with null for every number.

        Args:
            advantage_BT: advantage of each token.
            num_groups: groups from the first on.
            more: further numbers of every token, (B, T); null where NaN, and left out of a row that has none.
        """
        rollouts, rows = self.rollouts, []
        lengths, ids = rollouts.lengths(), rollouts.context_ids()
        places = rollouts.place_BT().tolist() if rollouts.inserted_B is not None else None

        def reported(x_BT: Tensor, row: int) -> list[float]:
            values: list[float] = x_BT[row, : lengths[row]].tolist()
            return values if places is None else _spread(values, places[row], len(ids[row]))

        numbers = {"logp": rollouts.logp_BT, "ref_logp": rollouts.ref_logp_BT, "weight": advantage_BT}
        if rollouts.ref_logp_BT is not None:
            numbers["kl"] = k3(rollouts.logp_BT, rollouts.ref_logp_BT)
        numbers["teacher_logp"] = rollouts.teacher_logp_BT
        known = {name: x.cpu() for name, x in numbers.items() if x is not None}
        others = {name: x.cpu() for name, x in (more or {}).items()}
        for i in range(min(num_groups * self.num_generations, len(self.texts))):
            prompt = self.prompts[i // self.num_generations]
            rows.append(
                {
                    "prompt_index": prompt.index,
                    "group": i // self.num_generations,
                    "prompt": prompt.text,
                    **({"messages": prompt.messages} if prompt.messages else {}),
                    **({"columns": given} if (given := columns_of(prompt)) else {}),
                    "completion": self.texts[i],
                    "ids": ids[i],
                    "reward": self.scores.reward[i],
                    "parts": {name: values[i] for name, values in self.scores.parts.items()},
                    "truncated": bool(rollouts.on_host("truncated_B")[i]),
                    **({} if self.staleness is None else {"staleness": self.staleness}),
                    **({} if self.pieces is None else {"pieces": self.pieces(ids[i])}),
                    "tokens": {name: _rounded(reported(x, i)) for name, x in known.items()}
                    | _known({name: reported(x, i) for name, x in others.items()}),
                }
            )
        return rows


def columns_of(prompt: Prompt) -> dict[str, Any]:
    """The other columns of a prompt's row, as JSON holds them; long ones shortened."""
    out = {}
    for name, value in prompt.row.items():
        if name != "prompt":
            plain = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
            text = value if isinstance(value, str) else str(value)
            out[name] = value if plain or value is None else text[:LONGEST_COLUMN]
    return out


def _spread(values: list[float], places: list[int], length: int) -> list[float]:
    """`values` at their places in a row of `length`; NaN elsewhere."""
    spread = [math.nan] * length
    for place, value in zip(places, values, strict=False):
        spread[place] = value
    return spread


def _rounded(values: list[float]) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 5) for v in values]


def _known(numbers: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """NaN as None; what is known of no token is left out."""
    clean = {name: _rounded(values) for name, values in numbers.items()}
    return {name: values for name, values in clean.items() if any(v is not None for v in values)}


class Pieces:
    """The text that each token adds; whole tokens are looked up once, as a step has tens of thousands of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Special tokens by name. A character made of several tokens belongs to the last of them."""
        pieces: list[str] = []
        pending: list[int] = []
        for token in ids:
            text = self._alone(token) if not pending else self._decode([*pending, token])
            pending.append(token)
            if text.endswith("\ufffd") and len(pending) < MOST_TOKENS_OF_A_CHARACTER:
                pieces.append("")
                continue
            pieces.append(text)
            pending = []
        if pending:
            pieces[-1] = self._decode(pending)
        return pieces

    def _alone(self, token: int) -> str:
        if token not in self.known:
            text = self._decode([token])
            # SentencePiece writes a leading space as ▁ and drops it when a token is decoded alone.
            spaced = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("▁")
            self.known[token] = f" {text}" if spaced and not text.startswith(" ") else text
        return self.known[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))
