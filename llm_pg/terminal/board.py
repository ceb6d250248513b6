"""What the live screen shows, as values, and how it is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .figures import LEVELS, Pace, brief, clipped, duration, sparkline
from .plain import Plan, left_text, sample_lines

PHASES = {
    "wait": "waiting",  # for a batch that is sampled ahead
    "sample": "sampling",
    "reward": "rewards",
    "reference": "reference",
    "teacher": "teacher",
    "value": "critic",
    "update": "training",
    "eval": "held out",
    "save": "saving",
}
# Greedy, held out; from before the first step to after the last.
PASS_RATE, HELD_OUT_REWARD = "pass rate", "held-out reward"
# (metric, label, how its last value is written)
CURVES = (
    ("reward", "reward", "{:.3f}"),
    ("return_mean", "return", "{:.2f}"),
    ("true_return_mean", "true return", "{:.2f}"),
    (PASS_RATE, "pass rate", "{:.1%}"),
    (HELD_OUT_REWARD, "held out", "{:.3f} reward"),
    ("kl", "KL", "{:.4f} nats/token"),
    ("teacher_kl", "to teacher", "{:.4f} nats/token"),
    ("entropy", "entropy", "{:.3f} nats/token"),
    ("completion_length", "length", "{:.1f} tokens"),
    ("uniform_groups", "no signal", "{:.0%} of groups"),
    ("grad_norm", "gradient", "{:.2f}"),
)
QUICK = 2.0  # seconds: the phases of a shorter step are shown as shares of the last one, as bars would only flicker
BAR = 26
LABEL, VALUE, RANGE = 12, 22, 18


@dataclass
class RunningPhase:
    """A phase that goes on."""

    name: str
    began: float
    tokens: int = 0
    done: int = 0
    total: int = 0


@dataclass
class Board:
    """The state of the screen. history: metric -> (step, value) of the steps that measured it."""

    plan: Plan
    pace: Pace
    began: float
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    running: RunningPhase | None = None
    sample: dict[str, Any] | None = None
    sampled_at: tuple[int, float] = (0, -math.inf)
    findings: list[str] = field(default_factory=list)

    def note(self, name: str, step: int, value: Any) -> None:
        if isinstance(value, (int, float)) and math.isfinite(value):
            self.history.setdefault(name, []).append((step, float(value)))

    def signal_to_noise(self) -> float | None:
        """Squared length of the expected gradient over the variance of a step's, from the means so far; both are
        estimates whose single values say little. Negative: nothing but noise is seen."""
        signal = [v for _, v in self.history.get("gradient_signal", [])]
        noise = [v for _, v in self.history.get("gradient_noise", [])]
        if not signal or not noise or fmean(noise) <= 0:
            return None
        return fmean(signal) * self.plan.groups / fmean(noise)


def draw(board: Board, now: float, width: int, height: int, levels: str = LEVELS) -> RenderableType:
    """The screen. The parts at its end that do not fit into `height` are left out."""
    parts = [
        _title(board, now, width),
        _phases(board, now, width),
        _curves(board, width, levels),
        _facts(board),
        _sample(board, width),
    ]
    kept: list[RenderableType] = []
    room = height - 1  # a full screen would scroll
    for part in parts:
        room -= sum(line.row_count if isinstance(line, Table) else 1 for line in part)
        if room < 0:
            break
        kept += part
    return Group(*kept)


def _sample(board: Board, width: int) -> list[RenderableType]:
    if board.sample is None:
        return []
    lines = [Text(clipped(line, width), no_wrap=True) for line in sample_lines(board.sample, width - LABEL)]
    return [Rule(f"a completion of step {board.sampled_at[0]}", style="dim", align="left"), *lines]


def _title(board: Board, now: float, width: int) -> list[RenderableType]:
    plan, step = board.plan, board.pace.step
    grid = Table.grid(padding=(0, 1), expand=False)
    left = board.pace.remaining()
    reported = f"left {left_text(left)}" if left and step < plan.max_steps else ""
    bar = ProgressBar(total=plan.max_steps, completed=step, width=BAR)
    place = f"{plan.unit} {step}/{plan.max_steps}"
    grid.add_row(Text(place, style="bold"), bar, Text(reported or f"for {duration(now - board.began)}"))
    name = Text(clipped(f"{plan.algorithm}  {plan.name}", width), style="bold cyan", no_wrap=True)
    return [name, grid]


def _phases(board: Board, now: float, width: int) -> list[RenderableType]:
    running = board.running  # once: the loop may end the phase while this thread draws
    shown = [n for n in PHASES if n in board.spent or (running is not None and running.name == n)]
    total = sum(board.spent.values()) or 1.0
    quick = (board.pace.mean() or math.inf) < QUICK
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=LABEL - 1)
    grid.add_column(width=BAR)
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=max(width - LABEL - BAR - 2, 10))
    for name in shown:
        going = running if running is not None and running.name == name and not quick else None
        if going is not None:
            bar, reported = _going(going, now), _progress(going, now)
        else:
            spent = board.spent.get(name, 0.0)
            bar = ProgressBar(total=total, completed=spent, width=BAR, complete_style="blue", finished_style="blue")
            reported = f"{duration(spent)}, {spent / total:.0%}"
            if name == "sample" and board.last.get("tokens_per_second"):
                reported += f"  {board.last['tokens_per_second']:,.0f} tokens/s"
        grid.add_row(Text(PHASES[name], style="bold" if going else ""), bar, Text(reported))
    return [grid] if shown else []


def _going(going: RunningPhase, now: float) -> ProgressBar:
    if not going.total:
        return ProgressBar(total=None, pulse=True, width=BAR, animation_time=now)
    return ProgressBar(total=going.total, completed=min(going.done, going.total), width=BAR)


def _progress(going: RunningPhase, now: float) -> str:
    seconds = max(now - going.began, 1e-9)
    reported = duration(seconds)
    if going.total:
        reported += f"  {going.done:,} of {going.total:,}"
    if going.tokens:
        reported += f"  {going.tokens / seconds:,.0f} tokens/s"
    return reported


def _curves(board: Board, width: int, levels: str) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=LABEL - 1)
    grid.add_column(width=VALUE, no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    room = max(width - LABEL - VALUE - RANGE - 3, 8)
    for name, label, form in CURVES:
        points = board.history.get(name)
        if not points:
            continue
        line = sparkline([value for _, value in points], room, levels)
        if board.plan.unit != "step":
            form = form.replace("token", "step")
        known = [value for _, value in points]
        ends = f"{brief(min(known))} to {brief(max(known))}" if min(known) < max(known) else ""
        value = Text(form.format(points[-1][1]), style="bold")
        grid.add_row(label, value, Text(line, style="green"), Text(ends, style="dim"))
    return [Text(""), grid] if grid.row_count else []


def _facts(board: Board) -> list[RenderableType]:
    facts = []
    ratio = board.signal_to_noise()
    if ratio is not None:
        reported = f"{ratio:.2f}" if ratio > 0 else "under 0, noise only"
        facts.append(f"signal to noise of a step's gradient {reported}")
    if board.last.get("memory"):
        facts.append(f"memory {board.last['memory']:,.0f} MB")
    if board.last.get("unscorable"):
        facts.append(f"unscorable {board.last['unscorable']:.1%}")
    if board.last.get("truncated"):
        facts.append(f"truncated {board.last['truncated']:.0%}")
    out: list[RenderableType] = [Text("  ".join(facts), style="dim")] if facts else []
    if board.findings:
        out.append(Text(f"the doctor found: {', '.join(board.findings)} (above)", style="yellow"))
    return out
