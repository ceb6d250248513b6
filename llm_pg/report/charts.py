"""Which curves the page shows, and from which metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..doctor.evidence import Run
from ..metrics import METRICS
from .svg import Chart, Series

SHARES = {"uniform_groups", "truncated", "clip_fraction", "unscorable"}
# Shown only where they were ever anything but 0.
SILENT_AT_ZERO = {"truncated", "clip_fraction", "unscorable", "skipped_updates", "value_loss"}
CURVES = (
    ("kl", "KL to the reference"),
    ("entropy", "Entropy"),
    ("completion_length", "Completion length"),
    ("uniform_groups", "Groups without signal"),
    ("grad_norm", "Gradient norm"),
    ("truncated", "Truncated"),
    ("clip_fraction", "Clipped tokens"),
    ("unscorable", "Unscorable"),
    ("value_loss", "Value loss"),
    ("skipped_updates", "Skipped updates"),
    ("sampler_gap", "Sampler against trainer"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_second", "Sampling speed"),
)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All panels that have data, in the order of the page."""
    found = [_pass_rate(runs), _pass_at(runs), _reward(runs), _parts(runs)]
    found += [_curve(runs, name, title) for name, title in CURVES]
    found.append(_phases(runs))
    return [chart for chart in found if chart and any(series.points for series in chart.series)]


def _name(run: Run, runs: Sequence[Run], own: str) -> str:
    return run.name if len(runs) > 1 else own


def _pass_rate(runs: Sequence[Run]) -> Chart:
    series = []
    for place, run in enumerate(runs):
        band: list[tuple[float, float, float]] = []
        points: list[tuple[float, float]] = []
        before = run.before.get("greedy")
        if before:
            points.append((0, before["mean"]))
            band.append((0, before["low"], before["high"]))
        for m in run.metrics:
            if m.get("eval/greedy") is not None:
                points.append((m["step"], m["eval/greedy"]))
                band.append((m["step"], m["eval/greedy_low"], m["eval/greedy_high"]))
        after = run.summary.get("pass_rate_after_interval")
        if after:
            points.append((run.summary.get("steps", run.max_steps), after[0]))
            band.append((run.summary.get("steps", run.max_steps), after[1], after[2]))
        series.append(Series(_name(run, runs, "greedy"), points, band, marks=True, style=place))
    caption = "Held-out prompts, greedy. Bars: 95 % intervals over prompts."
    return Chart("Pass rate", "share", caption, series, 0.0, 1.0)


def _pass_at(runs: Sequence[Run]) -> Chart | None:
    """pass@k over k, before and after: a curve that only rises at its left end has grown surer, not abler."""
    series: list[Series] = []
    for run in runs:
        before = {k: (v["mean"], v["low"], v["high"]) for k, v in (run.before.get("pass_at") or {}).items()}
        for when, shares in (("before", before), ("after", run.summary.get("pass_at") or {})):
            told = sorted((int(k), *share) for k, share in shares.items())
            label = when if len(runs) == 1 else f"{run.name}, {when}"
            points, band = [(float(k), mean) for k, mean, _, _ in told], [(float(k), a, b) for k, _, a, b in told]
            series.append(Series(label, points, band, marks=True, style=len(series)))
    if max((len(s.points) for s in series), default=0) < 2:
        return None
    caption = "Held-out prompts: the chance that one of k samples passes (unbiased), by k. Bars: 95 % intervals."
    return Chart("pass@k", "share", caption, series, 0.0, 1.0, x="k")


def _reward(runs: Sequence[Run]) -> Chart:
    series = []
    for place, run in enumerate(runs):
        points = [(float(s), v) for s, v in run.series("reward")]
        spread = dict(run.series("reward_std"))
        band = []
        for step, value in points:
            half = 1.96 * spread.get(int(step), 0.0) / math.sqrt(run.prompts_per_step)
            band.append((step, value - half, value + half))
        series.append(Series(_name(run, runs, "reward"), points, band if len(runs) == 1 else [], style=place))
    caption = METRICS["reward"][1]
    if len(runs) == 1:
        caption += " Band: at most the 95 % interval of the mean (a group counted as one sample)."
    return Chart("Reward", "reward", caption, series)


def _parts(runs: Sequence[Run]) -> Chart | None:
    """The reward functions side by side, where there are several of them."""
    if len(runs) > 1:
        return None
    names = sorted({name for m in runs[0].metrics for name in m if name.startswith("reward/")})
    if len(names) < 2:
        return None
    series = [
        Series(name.removeprefix("reward/"), _floats(runs[0], name), style=place) for place, name in enumerate(names)
    ]
    return Chart("Reward by part", "reward", "Mean of each reward function, unweighted.", series)


def _floats(run: Run, name: str) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in run.series(name)]


def _curve(runs: Sequence[Run], name: str, title: str) -> Chart | None:
    if name in SILENT_AT_ZERO and not any(v for run in runs for v in run.values(name)):
        return None
    unit, meaning = METRICS[name]
    series = [Series(_name(run, runs, title), _floats(run, name), style=place) for place, run in enumerate(runs)]
    low, high = (0.0, 1.0) if name in SHARES else (0.0, None)
    return Chart(title, unit, meaning, series, low, high, smooth=name != "learning_rate")


def _phases(runs: Sequence[Run]) -> Chart:
    if len(runs) > 1:
        series = [Series(run.name, _floats(run, "seconds"), style=place) for place, run in enumerate(runs)]
        return Chart("Seconds of a step", "s", "The whole step.", series, 0.0)
    names = sorted({name for m in runs[0].metrics for name in m if name.startswith("seconds/")})
    series = []
    for place, name in enumerate(names):
        points = _floats(runs[0], name)
        series.append(
            Series(name.removeprefix("seconds/"), points, marks=len(points) < len(runs[0].metrics) // 2, style=place)
        )
    return Chart("Seconds of a step, by phase", "s", "How long each phase took.", series, 0.0)
