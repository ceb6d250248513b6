"""Numbers as a person reads them at a glance. Pure: no terminal, no clock."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, stdev

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = ".:-=+*#@"
WINDOW = 50  # steps whose spread is measured
FEWEST = 3  # steps before a range is told
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn"}


def sparkline(values: Sequence[float | None], width: int, levels: str = LEVELS) -> str:
    """The series in at most `width` characters, each the mean of its share of it, from its lowest to its highest.

    What was not measured (None, not finite) is left out, or a space where all of a character's share is; a constant
    series stands in the middle.
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


class Pace:
    """Seconds of steps, and how long the rest takes.

    What comes only now and then (held-out evaluation, checkpoints) is counted apart: its mean times how often it is
    still to come. The 95 % range is that of a sum of steps like the last ones, with the uncertainty of their mean:
    s·t·sqrt(n + n²/m) around n·mean, for n steps left and m seen; where neighbours are alike (r, their correlation), m
    is taken as m·(1-r)/(1+r), since a machine that is busy now is busy in the next step too.

    Args:
        last_step: of the run. every: phase -> steps between two of it; 0 = never.
    """

    def __init__(self, last_step: int, every: dict[str, int] | None = None) -> None:
        self.last_step, self.every = last_step, every or {}
        self.step = 0
        self.plain: list[float] = []
        self.extra: dict[str, list[float]] = {}

    def observe(self, step: int, seconds: float, phases: dict[str, float]) -> None:
        """A step that took `seconds`, of which the phases in `phases`."""
        self.step = step
        apart = {name: s for name, s in phases.items() if name in self.every}
        for name, s in apart.items():
            self.extra.setdefault(name, []).append(s)
        self.plain.append(max(seconds - sum(apart.values()), 0.0))

    def mean(self) -> float | None:
        seen = self._seen()
        return fmean(seen) if seen else None

    def _seen(self) -> list[float]:
        """The last steps. The first one warms up, and is left out once there are others."""
        return (self.plain[1:] if len(self.plain) > FEWEST else self.plain)[-WINDOW:]

    def remaining(self) -> tuple[float, float, float] | None:
        """Seconds left: expected, and the range's ends. None before there are three steps."""
        seen, left = self._seen(), self.last_step - self.step
        if len(seen) < FEWEST:
            return None
        middle, half = left * fmean(seen), 0.0
        if left:
            quantile = student_quantile(0.975, len(seen) - 1)
            alike = (1 + neighbours(seen)) / (1 - neighbours(seen))
            half = quantile * stdev(seen) * math.sqrt(alike * (left + left**2 / len(seen)))
        for name, seconds in self.extra.items():
            middle += fmean(seconds) * self._to_come(name)
        return middle, max(middle - half, 0.0), middle + half

    def _to_come(self, name: str) -> int:
        """How often it is still to come before the last step, which ends the run without it."""
        every = self.every[name]
        return (self.last_step - 1) // every - self.step // every if every and self.step < self.last_step else 0
