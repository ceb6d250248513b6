"""What a person reads while a run goes on: plain lines, one a step, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .evaluate import Evaluation


class Terminal:
    """Prints to standard output; `quiet` keeps to the end's table and warnings."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet

    @classmethod
    def silent(cls) -> Terminal:
        """Prints nothing at all: every rank but the first."""
        return cls(quiet=True, console=Console(quiet=True))

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(escape(text))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]{escape(text)}[/]")

    def step(self, values: dict[str, Any], max_steps: int) -> None:
        if self.quiet:
            return
        parts = [f"step {values['step']:>{len(str(max_steps))}}/{max_steps}", f"reward {values['reward']:.3f}"]
        for name, label, form in (
            ("kl", "kl", ".4f"),
            ("entropy", "entropy", ".3f"),
            ("completion_length", "length", ".1f"),
            ("grad_norm", "grad", ".2f"),
            ("uniform_groups", "no signal", ".0%"),
        ):
            if values.get(name) is not None:
                parts.append(f"{label} {values[name]:{form}}")
        parts.append(f"{values['seconds']:.2f} s")
        self.console.print("[dim]·[/] " + "  ".join(parts))

    def evaluation(self, title: str, result: Evaluation) -> None:
        if self.quiet:
            return
        sampled = f", sampled {result.sampled}" if result.sampled else ""
        self.console.print(
            f"[bold]{escape(title)}[/]: greedy {result.greedy}{sampled}  ({result.num_prompts} held-out prompts)"
        )

    def summary(
        self, summary: dict[str, Any], before: Evaluation | None, after: Evaluation, places: Sequence[str]
    ) -> None:
        table = Table(title="Held-out prompts, before and after", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column)
        table.add_row("pass rate, greedy [95 %]", str(before.greedy) if before else "-", str(after.greedy))
        if after.sampled:
            table.add_row("pass rate, sampled [95 %]", str(before.sampled) if before else "-", str(after.sampled))
        for k, share in after.pass_at.items():
            table.add_row(f"pass@{k}", str(before.pass_at.get(k, "-")) if before else "-", str(share))
        self.console.print()
        self.console.print(table)
        if before:
            self._examples(before, after)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds_by_phase"].items())
        self.console.print(f"Seconds: {summary['seconds_total']:.1f} in all: {phases}")
        for place in places:
            self.console.print(escape(place))

    def _examples(self, before: Evaluation, after: Evaluation) -> None:
        table = Table(title="Three of them", title_justify="left")
        for column in ("prompt", "before", "after"):
            table.add_column(column, overflow="fold", max_width=60)
        pairs = list(zip(before.examples, after.examples, strict=True))
        changed = [pair for pair in pairs if not pair[0]["passed"] and pair[1]["passed"]]
        shown = (changed + [pair for pair in pairs if pair not in changed])[:3]
        for old, new in shown:
            marks = ["[green]✓[/]" if x["passed"] else "[red]✗[/]" for x in (old, new)]
            cells = [f"{escape(x['completion'])} {mark}" for x, mark in zip((old, new), marks, strict=True)]
            table.add_row(escape(old["prompt"]), *cells)
        self.console.print(table)
