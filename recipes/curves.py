"""What the control recipes draw with: curves of several seeds as a median and its quartiles, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_pg.control.record import ControlRun

# They differ in print and for the colour-blind (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Band:
    """A median and its quartiles at the same steps; all equal where there is one run. NaN where a run says nothing."""

    steps: NDArray[Any]
    low: NDArray[Any]
    median: NDArray[Any]
    high: NDArray[Any]


def band(curves: Sequence[Sequence[dict[str, float]]], key: str, num_columns: int = 200) -> Band | None:
    """Over the steps that every run reached: median and quartiles of `key`; None where no run has it.

    Args:
        curves: points of each run, see `ControlRun.points`.
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


def figure(num_panels: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('Plots need matplotlib: pip install "llm-policy-gradient[control]"') from error
    drawing = Figure(figsize=(width * num_panels**0.75, height), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, num_panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def draw_band(axis: Any, band_: Band, label: str | None, colour: str) -> None:
    axis.plot(band_.steps, band_.median, color=colour, label=label, linewidth=1.6)
    if (band_.high > band_.low).any():
        axis.fill_between(band_.steps, band_.low, band_.high, color=colour, alpha=0.2, linewidth=0)


def save(drawing: Any, path: Path) -> list[Path]:
    """Write `path` with the endings .png and .svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = [path.with_suffix(".png"), path.with_suffix(".svg")]
    drawing.savefig(out[0], dpi=120)
    drawing.savefig(out[1], metadata={"Date": None})
    return out


def compare(runs: Mapping[str, Sequence[ControlRun]], key: str, axis: Any, label: str | None = None) -> None:
    """One band for each name."""
    for (name, of_name), colour in zip(runs.items(), COLOURS, strict=False):
        found = band([run.points for run in of_name], key)
        if found is not None:
            draw_band(axis, found, name, colour)
    axis.set_xlabel("environment steps")
    axis.set_ylabel(label or key)
