"""What a run shows in a terminal: a bar while it goes, a curve and a few lines when it is over."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .curves import Band
from .record import Point, Run

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = " .:-=+*#"


class Bars:
    """One progress bar a seed; used as a context."""

    def __init__(self, console: Console, num_seeds: int, first_seed: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}% {task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks = [self._progress.add_task(f"seed {first_seed + i}", total=1.0, said="") for i in range(num_seeds)]

    def __enter__(self) -> Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)  # type: ignore[arg-type]

    def show(self, number: int) -> Callable[[Point], None]:
        """The function that shows a point of the run with this number."""

        def show(point: Point) -> None:
            said = f"{int(point['steps']):,} steps, return {point['return_mean']:.1f}, entropy {point['entropy']:.2f}"
            self._progress.update(self._tasks[number], completed=point["progress"], said=said)

        return show

    def done(self, number: int) -> None:
        self._progress.update(self._tasks[number], completed=1.0)


def curve(band: Band, width: int = 60, height: int = 10, unicode: bool = True) -> list[str]:
    """The median as columns of blocks over steps, with the quartiles as a shade where there are several runs.

    Args:
        band: values over steps. width, height: of the drawing, in characters, without the scale at its left.
        unicode: False draws with ASCII alone.
    """
    columns = band.resample(width)
    known = [x for x in (*columns.low, *columns.high) if not math.isnan(x)]
    if not known:
        return ["no episode has ended yet"]
    bottom, top = min(known), max(known)
    span = (top - bottom) or 1.0
    rows = []
    for row in range(height - 1, -1, -1):
        cells = "".join(
            _cell((low - bottom) / span, (mid - bottom) / span, (high - bottom) / span, row, height, unicode)
            for low, mid, high in zip(columns.low, columns.median, columns.high, strict=True)
        )
        edge = {height - 1: f"{top:>9.4g} ", 0: f"{bottom:>9.4g} "}.get(row, " " * 10)
        rows.append(f"{edge}{'│' if unicode else '|'}{cells}")
    last = f"{int(band.steps[-1]):,} steps"
    rows.append(" " * 10 + ("└" if unicode else "+") + ("─" if unicode else "-") * width)
    rows.append(" " * 11 + "0" + last.rjust(width - 1))
    return rows


def _cell(low: float, mid: float, high: float, row: int, height: int, unicode: bool) -> str:
    if math.isnan(mid):
        return " "
    levels = LEVELS if unicode else ASCII_LEVELS
    filled = mid * height - row
    if filled >= 1:
        return "█" if unicode else "#"
    if filled > 0 or (row == 0 and mid <= 0):
        return levels[max(min(int(filled * len(levels)), len(levels) - 1), 0)]
    if high * height > row and high > low:
        return "░" if unicode else "."
    return " "


def summary(runs: Sequence[Run]) -> list[str]:
    """A few lines: how far, how fast, what was reached, and what a person should know."""
    settings = runs[0].settings
    out = [
        f"{settings.row.name} on {settings.env}, {len(runs)} seed{'s' if len(runs) > 1 else ''}, "
        f"baseline {settings.row.baseline}",
    ]
    final = [run.points[-1]["return_mean"] for run in runs]
    out.append(f"return, mean of the last {settings.window} episodes: {_spread(final, '{:.2f}')}")
    true = [run.points[-1]["true_return_mean"] for run in runs if "true_return_mean" in run.points[-1]]
    if true:
        out.append(f"true return, which the reward only stands for: {_spread(true, '{:.2f}')}")
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
    for run in runs:
        out += [f"! seed {run.settings.seed}: {flag}" for flag in run.flags]
    return out


def _spread(values: Sequence[float], form: str) -> str:
    """The median, with the range where there are several."""
    if len(values) == 1:
        return form.format(values[0])
    low, mid, high = (form.format(x) for x in (min(values), statistics.median(values), max(values)))
    return f"median {mid} ({low} to {high})"
