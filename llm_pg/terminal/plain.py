"""Plain lines, one a step, and a table at the end: for pipes, files and logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor.evidence import prompt_of
from ..doctor.finding import Finding
from ..evaluate import Evaluation
from .figures import Left, Pace, clipped, duration, harmless, phases_of
from .starting import STARTING, StartingBar, StartingLines

SHOWN = 400  # characters of a prompt or a completion


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its first step.

    Attributes:
        name: of the run. algorithm: row of the table. max_steps: last step.
        groups: of a step, on all ranks. rows: completions of a step on this rank. passes: over them in training.
        logging_steps: between lines. samples: completions shown now and then.
        every: phases that come only every so many steps (eval, save). at_end: those that also follow the last step.
        unit: the metric that counts up to max_steps.
    """

    name: str
    algorithm: str
    max_steps: int
    groups: int
    rows: int
    passes: int = 1
    logging_steps: int = 1
    samples: int = 1
    every: tuple[tuple[str, int], ...] = ()
    at_end: tuple[str, ...] = ()
    unit: str = "step"


class Terminal:
    """Prints to standard output; `quiet` keeps to warnings, findings and the end's table."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.plan: Plan | None = None
        self.pace = Pace(0)
        self.starting: StartingLines | StartingBar = StartingLines(self.say)
        self._stepped = False
        self._ended = 0  # completions of the phase that goes on

    @classmethod
    def silent(cls) -> Terminal:
        """Prints nothing at all: every rank but the first."""
        return cls(quiet=True, console=Console(quiet=True))

    def begin(self, plan: Plan) -> None:
        """What the steps will be."""
        self.plan, self.pace = plan, Pace(plan.max_steps, dict(plan.every), plan.at_end)

    def predict(self, low: float, high: float) -> None:
        """All steps of the run will take between `low` and `high` seconds; evaluations come on top."""
        self.pace.predicted = low, high
        left = self.pace.remaining()
        assert left is not None
        steps = f"{self.pace.last_step} steps and the evaluations"
        self.say(f"Time: {left_text(left)} for {steps}; the first steps narrow it.")

    def recall(self, lines: Sequence[dict[str, Any]], before: Evaluation | None, seconds: float) -> None:
        """What an earlier process did of the run: lines of metrics.jsonl, the evaluation before the first step, and
        the seconds that it took in all."""
        self.pace.recall(lines)
        if before is not None:
            Terminal.evaluation(self, "Before the first step", before)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around evaluations and steps; a live screen is there inside."""
        yield

    def phase(self, name: str, begins: bool) -> None:
        """A phase begins or ends, before the steps or of one."""
        if name not in STARTING or self._stepped or self.quiet:
            return
        self._ended = 0
        self.starting.begin(name) if begins else self.starting.end()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A phase that no clock counts."""
        self.phase(name, True)
        try:
            yield
        finally:
            self.phase(name, False)

    def progress(self, done: int, total: int) -> None:
        """Inside a phase before the steps: so much of it is done."""
        if not self._stepped:
            self.starting.progress(done, total)

    def sampled(self, tokens: int, ended: int) -> None:
        """Inside the sampling phase: so many tokens and ends of completions more."""
        self._ended += ended
        self.progress(self._ended, 0)

    def trained(self, rows: int) -> None:
        """Inside the training phase: so many completions more."""

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(escape(text))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]{escape(text)}[/]")

    def finding(self, finding: Finding) -> None:
        """What the doctor found: cause, evidence, what to change."""
        colour = {"problem": "red", "warning": "yellow"}.get(finding.level, "cyan")
        self.console.print(
            f"[bold {colour}]{finding.level.upper()}[/] [bold]{escape(finding.cause)}[/]\n"
            f"  evidence  {escape(finding.evidence)}\n  change    {escape(finding.change)}\n"
            f"  [dim]source    {escape(finding.source)}[/]"
        )

    def step(self, values: dict[str, Any], seconds: float) -> None:
        """The metrics of a step that took `seconds` of the wall's clock, its checkpoint before it included."""
        unit = self.plan.unit if self.plan is not None else "step"
        done = int(values[unit])
        # A run of language makes one step a line, also where it goes on from an earlier process.
        before = done - 1 if unit == "step" else self.pace.step
        self.pace.observe(done, seconds, phases_of(values), steps=max(done - before, 1))
        self._stepped = True
        if self._due(done, before):
            self.console.print("[dim]·[/] " + step_line(values, self.pace, unit))

    def sample(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Completions of the step, as in completions/; a few are shown at every tenth line."""
        plan = self.plan
        if plan is None or not plan.samples or not self._due(step, step - 1) or (step // plan.logging_steps) % 10:
            return
        for row in rows[: plan.samples]:
            self.console.print(escape("    " + "\n    ".join(sample_lines(row, SHOWN))))

    def _due(self, step: int, before: int) -> bool:
        """Whether a line is due after `step`, where the last metrics were those of the step `before`."""
        plan = self.plan
        if self.quiet or plan is None:
            return False
        return step // plan.logging_steps > before // plan.logging_steps or step >= plan.max_steps

    def evaluation(self, title: str, result: Evaluation) -> None:
        if self.quiet:
            return
        sampled = f", sampled {result.sampled}" if result.sampled else ""
        reward = f", reward {result.reward.number()}" if result.reward else ""
        self.console.print(
            f"[bold]{escape(title)}[/]: pass rate greedy {result.greedy}{sampled}{escape(reward)}  "
            f"({result.num_prompts} held-out prompts)"
        )
        if title not in ("Before", "After") and result.unreached():
            self.console.print(f"[dim]{escape(result.unreached())}[/]")

    def summary(
        self, summary: dict[str, Any], before: Evaluation | None, after: Evaluation | None, places: Sequence[str]
    ) -> None:
        self.console.print()
        if after is not None:
            self._evaluations(before, after)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds_by_phase"].items())
        self.console.print(f"Seconds: {summary['seconds_total']:.1f} in all: {phases}")
        for place in places:
            self.console.print(escape(place))

    def _evaluations(self, before: Evaluation | None, after: Evaluation) -> None:
        table = Table(title="Held-out prompts, before and after", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column)
        table.add_row("pass rate, greedy [95 %]", str(before.greedy) if before else "-", str(after.greedy))
        if after.sampled:
            table.add_row("pass rate, sampled [95 %]", str(before.sampled) if before else "-", str(after.sampled))
        for k, share in after.pass_at.items():
            table.add_row(f"pass@{k}", str(before.pass_at.get(k, "-")) if before else "-", str(share))
        for name, label in (("reward", "greedy"), ("sampled_reward", "sampled")):
            means = [getattr(each, name) if each else None for each in (before, after)]
            if means[1] is not None:
                cells = (escape(mean.number()) if mean else "-" for mean in means)
                table.add_row(f"mean reward, {label} [95 %]", *cells)
        for name, form in (("strict", "the answer in its form"), ("lenient", "in any form")):
            shares = [getattr(each, name) if each else None for each in (before, after)]
            if shares[1] is not None:
                table.add_row(f"{name} ({form})", *(str(share) if share else "-" for share in shares))
        lengths = [f"{each.mean_length:.1f}" if each else "-" for each in (before, after)]
        table.add_row("mean length, tokens", *lengths)
        self.console.print(table)
        if after.unreached():
            self.console.print(escape(after.unreached()))
        if before:
            self._examples(before, after)

    def _examples(self, before: Evaluation, after: Evaluation) -> None:
        table = Table(title="Three of them", title_justify="left")
        for column in ("prompt", "before", "after"):
            table.add_column(column, overflow="fold", max_width=60)
        pairs = list(zip(before.examples, after.examples, strict=True))
        changed = [pair for pair in pairs if not pair[0]["passed"] and pair[1]["passed"]]
        shown = (changed + [pair for pair in pairs if pair not in changed])[:3]
        for old, new in shown:
            marks = ["[green]✓[/]" if x["passed"] else "[red]✗[/]" for x in (old, new)]
            answers = [escape(clipped(harmless(x["completion"]), SHOWN)) for x in (old, new)]
            cells = [f"{answer} {mark}" for answer, mark in zip(answers, marks, strict=True)]
            table.add_row(escape(clipped(harmless(prompt_of(old)), SHOWN)), *cells)
        self.console.print(table)


def step_line(values: dict[str, Any], pace: Pace, unit: str = "step") -> str:
    last = pace.last_step
    parts = [f"{unit} {values[unit]:>{len(str(last))}}/{last}"]
    for name, label, form in (
        ("reward", "reward", ".3f"),
        ("return_mean", "return", ".2f"),
        ("kl", "kl", ".4f"),
        ("entropy", "entropy", ".3f"),
        ("completion_length", "length", ".1f"),
        ("grad_norm", "grad", ".2f"),
        ("uniform_groups", "no signal", ".0%"),
    ):
        if values.get(name) is not None:
            parts.append(f"{label} {values[name]:{form}}")
    parts.append(f"{values['seconds']:.2f} s")
    left = pace.remaining()
    if left is not None and pace.step < last:
        parts.append(f"left {left_text(left)}")
    return "  ".join(parts)


def left_text(left: Left) -> str:
    """Expected time with its range, where the range is wide enough to be read; the range alone where that is known."""
    low, high = (duration(round(seconds)) for seconds in (left.low, left.high))
    if low == high:
        return low
    span = f"{low.split()[0] if low.split()[-1] == high.split()[-1] else low} to {high}"
    return span if left.middle is None else f"{duration(round(left.middle))} ({span})"


def sample_lines(row: dict[str, Any], width: int) -> list[str]:
    """A row of completions/ in three lines: prompt, completion, scores."""
    parts = ", ".join(f"{name} {_score(value)}" for name, value in (row.get("parts") or {}).items())
    several = len(row.get("parts") or {}) > 1
    cut = ", truncated" if row.get("truncated") else ""
    return [
        f"prompt      {clipped(harmless(prompt_of(row)).strip('↵ '), width)}",
        f"completion  {clipped(harmless(str(row['completion'])), width)}",
        f"reward      {_score(row['reward'])}{f' = {parts}' if several else ''}{cut}",
    ]


def _score(value: float | None) -> str:
    return "unscorable" if value is None else f"{value:.3g}"
