"""What the ranks of a run agree on beside gradients, by messages of their strategy; with one rank the identity."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..distributed.network import lost_connection
from ..distributed.strategy import Strategy
from ..metrics import metric
from .guard import RunStopped

T = TypeVar("T")


class Ranks:
    """The processes of one run.

    Args:
        strategy: sends their messages.
        accelerator: accelerate's, which is ended with the run.
    """

    def __init__(self, strategy: Strategy, accelerator: Any = None) -> None:
        self.strategy, self.accelerator = strategy, accelerator
        self.number, self.count, self.is_main = strategy.rank, strategy.num_ranks, strategy.is_main

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set on any rank: one small message."""
        if self.count == 1:
            return list(flags)
        own = torch.tensor(flags, dtype=torch.int32, device=self.strategy.device)
        return [bool(x) for x in self.strategy.all_sum(own).tolist()]

    def gather(self, value: T) -> list[T]:
        """Of every rank, in order; values travel as pickles between ranks of one run only."""
        return self.strategy.gather(value)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank, if it came to an end on every rank.

        Where it raised on one, that rank raises its error and the others RunStopped with the first rank's cause: all
        end, and none waits for one that is gone.
        """
        if self.count == 1:
            return work()
        failure: Exception | None = None
        result: T | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  raised again below, once the other ranks know
            failure = error
        if not self.any_of([failure is not None])[0]:
            return result  # type: ignore[return-value]
        causes = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        raise RunStopped(next(f"Rank {rank} ended the run: {cause}" for rank, cause in enumerate(causes) if cause))

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Inside the block a connection to another rank that is lost ends the run with one paragraph."""
        try:
            yield
        except Exception as error:
            lost = lost_connection(error) if self.count > 1 else None
            if lost is None:
                raise
            raise RunStopped(
                f"Rank {self.number} of {self.count} lost its connection to another rank ({lost}). That rank's process "
                "or machine has ended, or the network between is gone; every rank ends. Read what the others printed, "
                "mend the cause, and start all of them again with --resume: it goes on from the newest checkpoint."
            ) from None

    def leave(self, close: Callable[[], None]) -> None:
        """Ends the process groups, on all ranks together, after all that each of them had to do.

        A thread of a group that still holds a tensor of Python's while the interpreter ends aborts the process, and a
        launcher then ends the other ranks, whatever they are writing. The barrier has no tensors: once it is through,
        those of all calls before it are let go. What else holds a group is let go before it is destroyed.

        Args:
            close: ends what has groups of its own.
        """
        if self.count > 1:
            self.accelerator.wait_for_everyone()
            close()
            gc.collect()
        self.accelerator.end_training()


def merge_metrics(parts: Sequence[dict[str, Any]], rows: Sequence[int]) -> dict[str, Any]:
    """Returns the metrics of one step from those of each rank, each added up as its row of `METRICS` says.

    Args:
        parts: the metrics of each rank; a name may be missing in some.
        rows: completions of each rank.
    """
    extremes = _clip_extremes(parts, rows)
    if len(parts) == 1:
        return {**parts[0], **extremes}
    out: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        holders = [(part, count) for part, count in zip(parts, rows, strict=True) if name in part]
        values = [part[name] for part, _ in holders]
        row = metric(name)
        how = "mean" if row is None else row.ranks
        if how == "sum":
            out[name] = sum(values)
        elif all(value == values[0] for value in values):
            out[name] = values[0]
        elif how == "max":
            out[name] = max(values)
        elif how == "min":
            out[name] = min((value for value in values if value), default=0.0)
        else:
            out[name] = weighted_mean(values, [count * _share(part, how) for part, count in holders])
    for name in [name for name in out if (row := metric(name)) is not None and row.ranks == "deviation"]:
        of = name.removeprefix("rewards/").removesuffix("/std")
        out[name] = _deviation(parts, name, "reward" if name == "reward_std" else f"reward/{of}", out, rows)
    return {**out, **extremes}


def _clip_extremes(parts: Sequence[dict[str, Any]], rows: Sequence[int]) -> dict[str, float]:
    """The least and the largest rank's own share of clipped tokens; the shares of `parts` are of the tokens of all."""
    tokens = [part.get("completion_length", 0.0) * count for part, count in zip(parts, rows, strict=True)]
    out: dict[str, float] = {}
    for name, extreme in (("low_min", min), ("high_max", max)):
        mean_name = f"clip_ratio/{name.partition('_')[0]}_mean"
        if all(mean_name in part for part in parts) and all(tokens):
            shares = [float(part[mean_name]) for part in parts]
            own = [share * sum(tokens) / n for share, n in zip(shares, tokens, strict=True)]
            out[f"clip_ratio/{name}"] = shares[0] if len(parts) == 1 else extreme(own)
    return out


def _share(part: dict[str, Any], how: str) -> float:
    """What each completion of a rank counts for in the mean over all ranks."""
    if how == "mean of tokens":
        return float(part["completion_length"])
    if how == "mean of ended":
        return 1.0 - float(part["truncated"])
    return 1.0 - part.get("unscorable", 0.0) if how == "mean of scored" else 1.0


def _deviation(
    parts: Sequence[dict[str, Any]], name: str, mean_of: str, whole: dict[str, Any], rows: Sequence[int]
) -> float:
    """Of the rewards on all ranks, from each rank's mean and deviation and the mean of all."""
    counts = [round(count * _share(part, "mean of scored")) for part, count in zip(parts, rows, strict=True)]
    squares = math.fsum(
        (count - 1) * part[name] ** 2 + count * (part[mean_of] - whole[mean_of]) ** 2
        for part, count in zip(parts, counts, strict=True)
        if count and name in part
    )
    return math.sqrt(squares / (sum(counts) - 1)) if sum(counts) > 1 else 0.0


def weighted_mean(values: Iterable[float], weights: Iterable[float]) -> float:
    """Weighted mean of the numbers among the values; NaN where there are none."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v)]
    total = math.fsum(w for _, w in pairs)
    return math.fsum(v * w for v, w in pairs) / total if total else math.nan
