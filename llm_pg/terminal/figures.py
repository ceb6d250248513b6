"""Numbers as a person reads them at a glance. Pure: no terminal, no clock."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = ".:-=+*#@"
WINDOW = 50  # steps whose spread is measured
FEWEST = 3  # warm steps from which a mean and its spread are taken
FEW = 10  # warm steps below which the range is never narrower than MARGIN: rare long steps have not been seen yet
MARGIN = 1.5
COLD = 4.0  # how many times as long as the others the first step may take: workers start, kernels are compiled
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn"}


def sparkline(values: Sequence[float | None], width: int, levels: str = LEVELS) -> str:
    """The series in at most `width` characters, each the mean of its share of it, from its lowest to its highest.

    What was not measured (None, not finite) is left out, or a space where all of a character's share is; a constant
    series is in the middle.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    cuts = [round(k * len(values) / count) for k in range(count + 1)]
    means = []
    for begin, end in pairwise(cuts):
        known = [v for v in values[begin:end] if v is not None and math.isfinite(v)]
        means.append(fmean(known) if known else None)
    present = [m for m in means if m is not None]
    if not present:
        return " " * count
    low, span = min(present), max(present) - min(present)

    def level(mean: float | None) -> str:
        if mean is None:
            return " "
        share = (mean - low) / span if span > 0 else 0.5
        return levels[min(int(share * len(levels)), len(levels) - 1)]

    return "".join(level(mean) for mean in means)


def brief(value: float) -> str:
    """Three digits; what is left of a 0 by rounding is 0."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-9 else "0"


def duration(seconds: float) -> str:
    """0.21 s, 42 s, 3:05 min, 2:10 h."""
    if seconds < 10 and seconds != round(seconds):
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def harmless(text: str) -> str:
    """One line of text without characters that could steer a terminal; those are shown by their numbers."""
    text = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    return "".join(c if unicodedata.category(c) not in _HIDDEN else f"⟨U+{ord(c):04X}⟩" for c in text)


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t by the expansion in 1/freedom (Abramowitz and Stegun 26.7.5); good from 2 on."""
    z = NormalDist().inv_cdf(share)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def neighbours(values: Sequence[float]) -> float:
    """Correlation of each value with the next, from 0 (none, or alternating) to 0.9."""
    mean = fmean(values)
    total = sum((v - mean) ** 2 for v in values)
    if total <= 0:
        return 0.0
    return min(max(sum((a - mean) * (b - mean) for a, b in pairwise(values)) / total, 0.0), 0.9)


class Left(NamedTuple):
    """Seconds that are left. middle: expected, None before FEWEST warm steps; low, high: ends of the range."""

    middle: float | None
    low: float
    high: float


class Pace:
    """Seconds of steps, and how long the rest takes.

    The first step warms up and counts only until there are others. What comes only now and then (held-out evaluation,
    checkpoints) is counted on its own: its mean times how often it is still to come. The 95 % range is that of a sum of
    steps like the last ones, with the uncertainty of their mean: s·t·sqrt(n + n²/m) around n·mean, for n steps left and
    m seen; where neighbours are alike (r, their correlation), m is taken as m·(1-r)/(1+r), since a machine that is busy
    now is busy in the next step too.

    Args:
        last_step: of the run. every: phase -> steps between two of it; 0 = never. at_end: phases that also follow the
            last step.
    """

    def __init__(self, last_step: int, every: dict[str, int] | None = None, at_end: Sequence[str] = ()) -> None:
        self.last_step, self.every, self.at_end = last_step, every or {}, at_end
        self.step = 0
        self.predicted: tuple[float, float] | None = None  # seconds of all steps of the run, before the first
        self.plain: list[float] = []
        self.extra: dict[str, list[float]] = {}

    def observe(self, step: int, seconds: float, phases: dict[str, float], steps: int = 1) -> None:
        """A step, or as many as `steps`, that took `seconds`, of which the phases in `phases`."""
        self.step = step
        self.plain.append(self._plain(seconds, phases) / steps)

    def spend(self, name: str, seconds: float) -> None:
        """A phase that comes now and then took so long."""
        self.extra.setdefault(name, []).append(seconds)

    def recall(self, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl by an earlier process, maybe on another machine: a range until there are own steps."""
        seen = [self._plain(line.get("seconds", 0.0), phases_of(line)) for line in lines]
        if seen:
            self.step = int(lines[-1]["step"])
            warm = (seen[1:] or seen)[-WINDOW:]
            self.predicted = self.last_step * min(warm) / MARGIN, self.last_step * max(warm) * MARGIN

    def _plain(self, seconds: float, phases: dict[str, float]) -> float:
        """Seconds of a step without the phases that come only now and then, which are noted."""
        rare = {name: s for name, s in phases.items() if name in self.every}
        for name, s in rare.items():
            self.spend(name, s)
        return max(seconds - sum(rare.values()), 0.0)

    def mean(self) -> float | None:
        seen = self._seen()
        return fmean(seen) if seen else None

    def _seen(self) -> list[float]:
        """The last steps; the first one only while there is no other."""
        return (self.plain[1:] or self.plain)[-WINDOW:]

    def remaining(self) -> Left | None:
        """None where nothing is known yet: before the first step of a run that was not predicted."""
        steps = self._of_steps(self.last_step - self.step)
        if steps is None:
            return None
        rest = sum(fmean(seconds) * self._to_come(name) for name, seconds in self.extra.items() if name in self.every)
        return Left(None if steps.middle is None else steps.middle + rest, steps.low + rest, steps.high + rest)

    def _of_steps(self, left: int) -> Left | None:
        """Seconds of `left` steps alone."""
        if not self.plain:
            share = left / max(self.last_step, 1)
            return None if self.predicted is None else Left(None, *(share * seconds for seconds in self.predicted))
        seen, warm = self._seen(), len(self.plain) - 1
        if warm < FEWEST:
            shortest = min(seen) / (MARGIN if warm else COLD)
            return Left(None, left * shortest, left * max(seen) * MARGIN)
        middle, half = left * fmean(seen), 0.0
        if left:
            quantile = student_quantile(0.975, len(seen) - 1)
            alike = (1 + neighbours(seen)) / (1 - neighbours(seen))
            half = quantile * stdev(seen) * math.sqrt(alike * (left + left**2 / len(seen)))
        margin = MARGIN if warm < FEW else 1.0
        return Left(middle, min(max(middle - half, 0.0), middle / margin), max(middle + half, middle * margin))

    def _to_come(self, name: str) -> int:
        """How often it is still to come."""
        if self.step >= self.last_step:
            return 0
        every = self.every[name]
        return (name in self.at_end) + ((self.last_step - 1) // every - self.step // every if every else 0)


def phases_of(line: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase of a line of metrics.jsonl."""
    return {name.removeprefix("seconds/"): s for name, s in line.items() if name.startswith("seconds/")}
