"""What a person reads of finished runs: how far, how fast, what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..terminal.figures import brief, sparkline
from .record import ControlRun

WIDTH = 60  # characters of a curve


def lines(runs: Sequence[ControlRun], levels: str) -> list[str]:
    """The curve of each seed, and a few lines about all of them.

    Args:
        runs: of the same settings, one a seed.
        levels: the characters that draw a curve, from the lowest to the highest.
    """
    settings = runs[0].settings
    out = []
    for run in runs:
        curve = [point["return_mean"] for point in run.points]
        ends = f"({brief(min(curve))} to {brief(max(curve))})"
        out.append(f"seed {run.settings.seed:<4} return {sparkline(curve, WIDTH, levels)} {curve[-1]:.4g} {ends}")
    out += [
        "",
        f"{settings.spec.name} on {settings.env}, {len(runs)} seed{'s' if len(runs) > 1 else ''}, "
        f"baseline {settings.spec.baseline}",
    ]
    final = [run.points[-1]["return_mean"] for run in runs]
    out.append(f"return, mean of the last {settings.window} episodes: {_spread(final, '{:.2f}')}")
    true = [run.points[-1]["true_return_mean"] for run in runs if "true_return_mean" in run.points[-1]]
    if true:
        out.append(f"true return, of which the reward is a proxy: {_spread(true, '{:.2f}')}")
    threshold = runs[0].threshold
    if threshold is not None:
        solved = [run.solved_steps for run in runs if run.solved_steps is not None]
        episodes = [run.solved_episodes for run in runs if run.solved_episodes is not None]
        says = f"solved (mean return ≥ {threshold:g}): {len(solved)} of {len(runs)}"
        if solved:
            says += f", after {_spread(solved, '{:,.0f}')} steps, {_spread(episodes, '{:,.0f}')} episodes"
        out.append(says)
    out.append(f"steps a second: {_spread([run.steps_per_second for run in runs], '{:,.0f}')}")
    stale = [age for run in runs for age in run.staleness]
    if stale:
        out.append(f"staleness of a gradient: {_spread(stale, '{:.0f}')} updates, mean {statistics.mean(stale):.2f}")
    return out


def _spread(values: Sequence[float], form: str) -> str:
    """The median, with the range where there are several."""
    if len(values) == 1:
        return form.format(values[0])
    low, mid, high = (form.format(x) for x in (min(values), statistics.median(values), max(values)))
    return f"median {mid} ({low} to {high})"
