"""The results of the reward functions on a batch, recorded as they come in, and the limits at which a run stops."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_pg.rewards.contract import MAX_REWARD
from llm_pg.rewards.globals import reported
from llm_pg.rewards.specs import RewardFunction

logger = logging.getLogger(__name__)

NOT_APPLICABLE = "returned None"


class RewardError(RuntimeError):
    """Scoring cannot go on: a function broke its contract, or too much of a batch could not be scored."""


@dataclass
class Scores:
    """What B completions earned.

    A completion is unscored where no function gave a score and where one failed (raised, returned NaN, was late,
    died). A function that returns None does not apply: the sum leaves it out. Completions to which no function applies
    do not count against `max_unscorable`, unless they are the whole batch. A function of weight 0 is only reported,
    so its failure costs nothing.

    Attributes:
        reward: the weighted sum of the functions that gave a score; None = unscored.
        parts: by function name, and by "function/part" for named parts.
        extra: columns from `log_extra`.
        weights: of the functions that are summed, by name, where there are several.
        tokens: where a function gave a number for each token, the reward of each token of each completion, weighted and
            summed over functions; a function's one number is at the last token. None in it = at the last token alone.
        metrics: means of what went to `log_metric`, and "rewards/<part>/mean".
        problems: by function, causes with the number of completions; "returned None" is counted only where it left a
            completion without any score.
    """

    reward: list[float | None]
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    problems: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    tokens: list[list[float] | None] | None = None

    def failures(self) -> dict[str, int]:
        """Returns the number of completions that each function failed on, of those that failed on any."""
        counts = {
            name: sum(count for cause, count in causes.items() if cause != NOT_APPLICABLE)
            for name, causes in self.problems.items()
        }
        return {name: count for name, count in counts.items() if count}


class Tally:
    """The ledger of one batch. `shown` outlives it: a cause that was logged once is not logged again.

    max_unscorable: share of a step's completions; the batch is `share` of them. lengths: tokens of each completion, as
    many as a function's rewards of its tokens must be; None = not known. whole: whether nobody scores other completions
    of the same step; then a batch to which no function applies is an error.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        size: int,
        max_unscorable: float,
        strict: bool,
        shown: set[tuple[str, str]],
        share: float = 1.0,
        lengths: Sequence[int] | None = None,
        *,
        whole: bool = True,
    ) -> None:
        self._names = [function.name for function in functions]
        self._functions = [function.function for function in functions]
        self._size, self._strict, self._shown, self._whole = size, strict, shown, whole
        self._most_unscorable = max_unscorable * size / share
        self._limit = f"over the limit max_unscorable={max_unscorable:g}"
        if share < 1:
            self._limit += f" of a step's {round(size / share)}"
        self._rewards: list[list[float | None]] = [[None] * size for _ in functions]
        self._lengths = lengths
        self._tokens: list[dict[int, list[float]]] = [{} for _ in functions]
        self._scored: list[set[int]] = [set() for _ in functions]
        self._failed: list[set[int]] = [set() for _ in functions]
        self._problems: list[Counter[str]] = [Counter() for _ in functions]
        self._parts: dict[str, list[float | None]] = {}
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def scored(self, function: int, index: int, answer: dict[str, Any]) -> None:
        self._scored[function].add(index)
        for column, value in answer["extra"].items():
            self._extra.setdefault(column, [None] * self._size)[index] = value
        for name, value in answer["metrics"]:
            self._metrics.setdefault(name, []).append(value)
        for part, value in answer["parts"].items():
            column = self._parts.setdefault(f"{self._names[function]}/{part}", [None] * self._size)
            column[index] = None if value is None or math.isnan(value) else value
        reward = answer["reward"]
        if isinstance(reward, list):
            self._check_length(function, index, len(reward))
            self._tokens[function][index] = reward
            reward = math.fsum(reward) if not any(map(math.isnan, reward)) else math.nan
        if reward is not None and math.isnan(reward):
            self.failed(function, index, "NaN", "")
        else:
            self._rewards[function][index] = reward

    def _check_length(self, function: int, index: int, given: int) -> None:
        if self._lengths is not None and given != self._lengths[index]:
            self.broken(
                function,
                "must return one number for a completion, or one for each of its tokens (as many as its "
                f"completion_ids, the end token included); it returned {given} for completion {index} of "
                f"{self._lengths[index]} tokens.",
            )

    def leave_out(self, functions: Sequence[int]) -> None:
        """These functions are not asked: they have no score for any completion."""
        for function in functions:
            self._scored[function].update(range(self._size))

    def failed(self, function: int, index: int, cause: str, trace: str) -> None:
        self._problems[function][cause] += 1
        self._failed[function].add(index)
        self._show(function, cause, trace, f"failed on completion {index} of a batch ({cause}), which stays unscored")
        count = len(self._failed[function])
        if self._strict or count > self._most_unscorable:
            rule = "strict is set" if self._strict else self._limit
            raise RewardError(
                f"Reward function {self._names[function]} could not score {count} of {self._size} completions of this "
                f"batch ({_counts(self._problems[function])}): {rule}." + (f" The last one:\n{trace}" if trace else "")
            )

    def retried(self, function: int, count: int, cause: str, trace: str) -> None:
        what = f"failed on {count} completions at once ({cause}); they are run again one by one"
        self._show(function, f"{cause} of many", trace, what)

    def broken(self, function: int, text: str) -> None:
        raise RewardError(f"Reward function {self._names[function]} {text}")

    def noticed(self, function: int, facts: dict[str, Any]) -> None:
        for cause, what in reported(self._functions[function], facts):
            self._show(function, cause, "", what)

    def scores(self, weights: Sequence[float]) -> Scores:
        """The batch added up. RewardError when too many completions have no score, or a sum is out of range."""
        for name, answered, failed in zip(self._names, self._scored, self._failed, strict=True):
            if lost := set(range(self._size)) - answered - failed:
                raise AssertionError(f"Reward function {name} neither answered nor failed on completions {lost}.")
        lost = set().union(*(failed for failed, weight in zip(self._failed, weights, strict=True) if weight))
        total = [None if index in lost else self._sum(index, weights) for index in range(self._size)]
        empty = [index for index, reward in enumerate(total) if reward is None]
        for function, failed in zip(self._problems, self._failed, strict=True):
            silent = sum(index not in lost and index not in failed for index in empty)
            if silent:
                function[NOT_APPLICABLE] += silent
        problems = {name: dict(causes) for name, causes in zip(self._names, self._problems, strict=True) if causes}
        counted = empty
        if len(empty) < self._size or not self._whole:  # where a function does not apply, nothing has failed, as in TRL
            counted = [index for index in empty if index in lost]
            self._warn_unscored(sorted({*empty} - {*counted}))
        if len(counted) > self._most_unscorable:
            causes = "; ".join(f"{name}: {_counts(Counter(found))}" for name, found in problems.items())
            raise RewardError(
                f"{len(counted)} of {self._size} completions of this batch could not be scored ({causes}): "
                f"{self._limit}."
            )
        parts = {**dict(zip(self._names, self._rewards, strict=True)), **dict(sorted(self._parts.items()))}
        metrics = {name: _mean(values) for name, values in sorted(self._metrics.items())}
        for name, column in parts.items():
            numbers = [value for value in column if value is not None]
            if numbers:
                metrics[f"rewards/{name}/mean"] = _mean(numbers)
        several = dict(zip(self._names, weights, strict=True)) if len(self._names) > 1 else {}
        extra = dict(sorted(self._extra.items()))
        return Scores(total, parts, extra, metrics, problems, several, self._of_tokens(total, weights))

    def _of_tokens(self, total: Sequence[float | None], weights: Sequence[float]) -> list[list[float] | None] | None:
        """`Scores.tokens`."""
        if not any(self._tokens):
            return None
        rows: list[list[float] | None] = []
        for index, reward in enumerate(total):
            given = [
                (weight, by_index[index])
                for weight, by_index in zip(weights, self._tokens, strict=True)
                if index in by_index
            ]
            if reward is None or not given:
                rows.append(None)
                continue
            row = [math.fsum(weight * values[step] for weight, values in given) for step in range(len(given[0][1]))]
            whole = [
                weight * value
                for weight, rewards, by_index in zip(weights, self._rewards, self._tokens, strict=True)
                if index not in by_index and (value := rewards[index]) is not None
            ]
            row[-1] = math.fsum([row[-1], *whole])
            rows.append(row)
        return rows

    def _sum(self, index: int, weights: Sequence[float]) -> float | None:
        """The weighted sum of the scores that were given; None without one. RewardError where it is out of range."""
        given = [(weight, rewards[index]) for weight, rewards in zip(weights, self._rewards, strict=True)]
        scored = [weight * reward for weight, reward in given if reward is not None]
        total = math.fsum(scored) if scored else None
        if total is not None and not abs(total) <= MAX_REWARD:
            reported = [f"{n} {w:g} × {r:g}" for n, (w, r) in zip(self._names, given, strict=True) if r is not None]
            raise RewardError(
                f"Completion {index} of this batch has the weighted reward {total:g} ({', '.join(reported)}), and "
                f"float32 does not hold what is computed from rewards beyond {MAX_REWARD:g}. Lower the weights or the "
                "rewards."
            )
        return total

    def _warn_unscored(self, indexes: Sequence[int]) -> None:
        if indexes and ("", NOT_APPLICABLE) not in self._shown:
            self._shown.add(("", NOT_APPLICABLE))
            logger.warning(
                "All reward functions returned None for %d of %d completions of a batch (the first is %d): they stay "
                "unscored and carry no gradient. Let one function apply to every row. Logged once.",
                len(indexes),
                self._size,
                indexes[0],
            )

    def _show(self, function: int, cause: str, trace: str, what: str) -> None:
        name = self._names[function]
        if (name, cause) in self._shown:
            return
        self._shown.add((name, cause))
        logger.warning(
            "Reward function %s %s. Logged once for this cause.%s", name, what, f"\n{trace}" if trace else ""
        )


def _mean(values: Sequence[float]) -> float:
    """fsum is exactly rounded, so a mean does not depend on the order in which workers answered; NaN out of range."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # beyond float64, or infinities of both signs
        return math.nan


def _counts(causes: Counter[str]) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in causes.most_common())
