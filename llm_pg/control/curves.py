"""Curves of one run or of several seeds: a median and its quartiles over steps. Imports numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Band:
    """A median and its quartiles at the same steps; all equal where there is one run. NaN where a run says nothing."""

    steps: NDArray[Any]
    low: NDArray[Any]
    median: NDArray[Any]
    high: NDArray[Any]

    def resample(self, num_columns: int) -> Band:
        at = np.linspace(0, self.steps[-1], num_columns)
        return Band(at, *(np.interp(at, self.steps, y) for y in (self.low, self.median, self.high)))


def band(curves: Sequence[Sequence[dict[str, float]]], key: str, num_columns: int = 200) -> Band | None:
    """Over the steps that every run reached: median and quartiles of `key`; None where no run has it.

    Args:
        curves: points of each run, see `train.Run.points`.
        key: what to read of a point; None or NaN count as not known yet.
    """
    known = [
        [(p["steps"], p[key]) for p in points if p.get(key) is not None and not np.isnan(p[key])] for points in curves
    ]
    known = [pairs for pairs in known if pairs]
    if not known:
        return None
    last = min(pairs[-1][0] for pairs in known)
    at = np.linspace(min(max(pairs[0][0] for pairs in known), last), last, num_columns)
    values = np.stack([np.interp(at, *np.array(pairs, dtype=float).T) for pairs in known])
    low, median, high = np.percentile(values, [25, 50, 75], axis=0)
    return Band(at, low, median, high)


def episode_band(returns: Sequence[Sequence[float]], window: int) -> tuple[Band, Band]:
    """Mean and standard deviation of the return over the last `window` episodes, by episode, over several runs."""
    num_episodes = min(len(r) for r in returns)
    table = np.array([r[:num_episodes] for r in returns], dtype=float)
    views = np.lib.stride_tricks.sliding_window_view(table, min(window, num_episodes), axis=1)
    at = np.arange(num_episodes - views.shape[1] + 1, num_episodes + 1)
    bands = [Band(at, *np.percentile(x, [25, 50, 75], axis=0)) for x in (views.mean(2), views.std(2))]
    return bands[0], bands[1]
