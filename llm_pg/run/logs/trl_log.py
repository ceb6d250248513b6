"""The numbers of a run under TRL's names and with TRL's meaning, for `log_history` and callbacks.

An entry of TRL's log is a mean over the steps since the entry before; `learning_rate`, `grad_norm` and `num_tokens` are
those of the last step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...evaluate import Evaluation

# TRL's name -> ours, where the same quantity has another name here.
NAMES = {
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "uniform_groups",
    "clip_ratio/region_mean": "clip_fraction",
    "step_time": "seconds",
}
# Names that both have; those that begin with one of the prefixes too.
SHARED = ("loss", "policy_loss", "reward", "reward_std", "kl", "entropy", "entropy_coef", "aux_loss")
PREFIXES = ("completions/", "clip_ratio/", "rewards/")
LAST = ("learning_rate", "grad_norm", "num_tokens")


def renamed(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's line of metrics that TRL logs too, by TRL's names; what is not a number is left out."""
    numbers = {name: float(value) for name, value in line.items() if _is_number(value)}
    out = {name: numbers[name] for name in (*SHARED, "learning_rate", "grad_norm") if name in numbers}
    out.setdefault("loss", numbers.get("policy_loss", math.nan))  # of a line written before there was a `loss`
    out.update({theirs: numbers[ours] for theirs, ours in NAMES.items() if ours in numbers})
    out.update({name: value for name, value in numbers.items() if name.startswith(PREFIXES)})
    for name, value in numbers.items():
        if name.startswith("reward/"):
            out[f"rewards/{name.removeprefix('reward/')}/mean"] = value
        elif name.startswith("log/"):
            out[name.removeprefix("log/")] = value
    return {name: value for name, value in out.items() if not math.isnan(value)}


def named_evaluation(evaluation: Evaluation, prefix: str = "eval") -> dict[str, float]:
    """An evaluation by our names, with `<prefix>_` for `eval/`, and by TRL's: `eval_reward` is the mean reward of
    sampled completions, as TRL evaluates, and of the greedy ones where none are sampled; ours is `eval_greedy_reward`.
    """
    ours = {name.removeprefix("eval/"): value for name, value in evaluation.metrics().items()}
    named = {f"greedy_{name}" if name.startswith("reward") else name: value for name, value in ours.items()}
    sampled = evaluation.sampled_reward or evaluation.reward
    theirs = {"completions/mean_length": evaluation.mean_length} | ({} if sampled is None else {"reward": sampled.mean})
    return {f"{prefix}_{name}": value for name, value in {**named, **theirs}.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class TrlLog:
    """Gathers the lines of metrics between two entries of the log.

    Attributes:
        newest: the last entry that was taken. num_tokens: of prompts and completions, so far.
    """

    def __init__(self) -> None:
        self.newest: dict[str, float] = {}
        self._values: dict[str, list[float]] = {}
        self.num_tokens, self._losses = 0.0, [0.0, 0.0]

    def add(self, line: Mapping[str, Any]) -> None:
        """A step's line of metrics."""
        values = renamed(line)
        self.num_tokens += sum(float(line.get(name) or 0) for name in ("prompt_tokens", "tokens"))
        if "loss" in values:
            self._losses = [self._losses[0] + values["loss"], self._losses[1] + 1]
        for name, value in {**values, "num_tokens": self.num_tokens}.items():
            if name in LAST:
                self._values[name] = [value]
            else:
                self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The entry of the steps since the last call; of the last ones again where there was none since."""
        if self._values:
            self.newest = {name: math.fsum(values) / len(values) for name, values in self._values.items()}
            self._values = {}
        return self.newest

    @property
    def train_loss(self) -> float:
        """Mean of `loss` over all steps."""
        total, count = self._losses
        return total / count if count else math.nan
