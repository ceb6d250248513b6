"""Which curves the page shows, and from which metrics."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from statistics import quantiles

from ..doctor.evidence import Run
from ..metrics import METRICS
from .svg import Chart, Series

SEED = re.compile(r"[-_]?seed[-_]?\d+$")
SHARES = {"uniform_groups", "truncated", "clip_fraction", "unscorable"}
# Shown only where they were ever anything but 0.
SILENT_AT_ZERO = {"truncated", "clip_fraction", "unscorable", "skipped_updates", "value_loss"}
SPEED = {"tokens_per_second"}
CURVES = (
    ("return_std", "Spread of the return"),
    ("kl", "KL to the reference"),
    ("teacher_kl", "KL to the teacher"),
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
    found = [
        _held_out(runs, *PASSES),
        _pass_at(runs),
        _held_out(runs, *REWARDS),
        *_seeds(runs),
        _returns(runs),
        _reward(runs),
        _parts(runs),
    ]
    outcome = [chart for chart in found if chart is not None]
    health = [_curve(runs, name, title) for name, title in CURVES if name not in SPEED]
    speed = [*(_curve(runs, name, title) for name, title in CURVES if name in SPEED), _phases(runs)]
    groups: dict[str, Sequence[Chart | None]] = {
        "Outcome": outcome,
        "Health": health,
        "Speed": speed,
        "Logged by reward functions": _logged(runs),
    }
    shown = []
    for group, of_group in groups.items():
        for chart in of_group:
            if chart is not None and any(series.points for series in chart.series):
                chart.group = group
                shown.append(_with_runs(chart, runs))
    return shown


def _with_runs(chart: Chart, runs: Sequence[Run]) -> Chart:
    """The chart with the run of every line whose x are the run's steps."""
    if chart.x == "step" and not chart.title.endswith("over seeds"):
        for series in chart.series:
            series.run = series.style if len(runs) > 1 else 0
    return chart


def clocks(runs: Sequence[Run]) -> list[dict[str, list[float]]]:
    """Of each run the steps that were measured, and the tokens sampled and the seconds passed after each of them."""
    out = []
    for run in runs:
        sums = {"tokens": 0.0, "seconds": 0.0}
        clock: dict[str, list[float]] = {"step": [], "tokens": [], "seconds": []}
        for line in run.metrics:
            clock["step"].append(line.get(run.counter, 0))
            for name in sums:
                sums[name] += line.get(name) or 0.0
                clock[name].append(round(sums[name], 2))
        out.append(clock)
    return out


def _logged(runs: Sequence[Run]) -> list[Chart]:
    """What reward functions gave to `log_metric`."""
    names = sorted({name for run in runs for m in run.metrics for name in m if name.startswith("log/")})
    return [
        Chart(
            name.removeprefix("log/"),
            "",
            "Mean over the completions of a step.",
            [Series(_name(run, runs, name), _floats(run, name), style=place) for place, run in enumerate(runs)],
        )
        for name in names
    ]


def _name(run: Run, runs: Sequence[Run], own: str) -> str:
    return run.name if len(runs) > 1 else own


# Title, unit, ends of the axis; the names of an evaluation in before.json, in the metrics and in the summary.
PASSES = ("Pass rate", "share", (0.0, 1.0), ("greedy", "eval/greedy", "pass_rate_after_interval"))
REWARDS = ("Held-out reward", "reward", (None, None), ("reward", "eval/reward", "reward_after"))


def _held_out(
    runs: Sequence[Run],
    title: str,
    unit: str,
    ends: tuple[float | None, float | None],
    names: tuple[str, str, str],
) -> Chart:
    """A mean over the held-out prompts before, during and after the run, with its interval."""
    in_before, metric, in_summary = names
    series = []
    for place, run in enumerate(runs):
        band: list[tuple[float, float, float]] = []
        points: list[tuple[float, float]] = []
        before = run.before.get(in_before)
        if before:
            points.append((0, before["mean"]))
            band.append((0, before["low"], before["high"]))
        for m in run.metrics:
            if m.get(metric) is not None:
                points.append((m["step"], m[metric]))
                band.append((m["step"], m[f"{metric}_low"], m[f"{metric}_high"]))
        after = run.summary.get(in_summary)
        if after:
            points.append((run.summary.get("steps", run.max_steps), after[0]))
            band.append((run.summary.get("steps", run.max_steps), after[1], after[2]))
        series.append(Series(_name(run, runs, "greedy"), points, band, marks=True, style=place))
    caption = "Held-out prompts, greedy. Bars: 95 % intervals over prompts."
    return Chart(title, unit, caption, series, *ends)


def _pass_at(runs: Sequence[Run]) -> Chart | None:
    """pass@k over k, before and after: a curve that only rises at its left end has grown surer, not abler."""
    series: list[Series] = []
    for run in runs:
        before = {k: (v["mean"], v["low"], v["high"]) for k, v in (run.before.get("pass_at") or {}).items()}
        for when, shares in (("before", before), ("after", run.summary.get("pass_at") or {})):
            reported = sorted((int(k), *share) for k, share in shares.items())
            label = when if len(runs) == 1 else f"{run.name}, {when}"
            points, band = (
                [(float(k), mean) for k, mean, _, _ in reported],
                [(float(k), a, b) for k, _, a, b in reported],
            )
            series.append(Series(label, points, band, marks=True, style=len(series)))
    if max((len(s.points) for s in series), default=0) < 2:
        return None
    caption = "Held-out prompts: the chance that one of k samples passes (unbiased), by k. Bars: 95 % intervals."
    return Chart("pass@k", "share", caption, series, 0.0, 1.0, x="k")


def _seeds(runs: Sequence[Run]) -> list[Chart]:
    """Where runs differ in nothing but their seed: the median and the quartiles over them, a line for each setting."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run), []).append(run)
    if max(map(len, groups.values())) < 2:
        return []
    out = []
    for name, title in (("return_mean", "Return"), ("reward", "Reward")):
        series = []
        for place, of_group in enumerate(groups.values()):
            found = [points for run in of_group if (points := _floats(run, name))]
            if found:
                label = f"{SEED.sub('', of_group[0].name)}, {len(found)} seed{'s' if len(found) > 1 else ''}"
                band = median_band(found)
                series.append(Series(label, [(x, mid) for x, _, mid, _ in band], [(x, a, b) for x, a, _, b in band]))
                series[-1].style = place
        caption = f"{METRICS[name].meaning} Line: the median of the seeds; band: between their quartiles."
        out.append(Chart(f"{title} over seeds", METRICS[name].unit, caption, series, smooth=False))
    return out


def _without_seed(run: Run) -> str:
    settings = {
        (section, name): value
        for section, values in run.config.items()
        for name, value in values.items()
        if section != "run"
    }
    return repr(sorted(settings.items(), key=str))


def median_band(
    curves: Sequence[Sequence[tuple[float, float]]], num_points: int = 100
) -> list[tuple[float, float, float, float]]:
    """Returns (x, lower quartile, median, upper quartile) over the x that all curves reached, by straight lines
    between their points.

    Args:
        curves: points of each run in the order of x, at least one.
        num_points: of the band.
    """
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    first = min(first, last)
    out = []
    for k in range(num_points):
        x = first + (last - first) * k / (num_points - 1)
        values = [_between(curve, x) for curve in curves]
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        out.append((x, low, middle, high))
    return out


def _between(curve: Sequence[tuple[float, float]], x: float) -> float:
    place = bisect_left(curve, x, key=lambda point: point[0])
    if place == 0 or place == len(curve):
        return curve[min(place, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _returns(runs: Sequence[Run]) -> Chart:
    """Classic control: the return; for a single run also its spread, the true return and what counts as solved."""
    series = [
        Series(_name(run, runs, "return"), _floats(run, "return_mean"), style=place) for place, run in enumerate(runs)
    ]
    caption = METRICS["return_mean"].meaning
    if len(runs) == 1 and series[0].points:
        spread = dict(_floats(runs[0], "return_std"))
        series[0].band = [(x, y - spread.get(x, 0.0), y + spread.get(x, 0.0)) for x, y in series[0].points]
        caption += " Band: one standard deviation of an episode's return."
        series.append(Series("true return", _floats(runs[0], "true_return_mean"), style=1))
        goal = runs[0].summary.get("threshold")
        if goal is not None:
            series.append(Series("solved", [(x, goal) for x, _ in series[0].points], style=2))
    return Chart("Return", METRICS["return_mean"].unit, caption, [s for s in series if s.points])


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
    caption = METRICS["reward"].meaning
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
    unit, meaning, *_ = METRICS[name]
    if all(run.counter == "steps" for run in runs):
        unit = unit.replace("token", "step")
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
