"""The pictures of README and docs are what their scripts draw today."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from llm_pg.terminal import LiveTerminal
from llm_pg.terminal.board import CURVES, PHASES, draw
from llm_pg.terminal.plain import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "figures"))
import results
import terminal


@pytest.mark.parametrize("path", list(results.pictures()), ids=lambda path: path.name)
def test_a_chart_is_what_its_script_draws_from_the_measurements(path: Path) -> None:
    """Where this fails: python recipes/figures/results.py"""
    assert path.read_text(encoding="utf-8") == results.pictures()[path]


def drawn_today() -> list[str]:
    """The live screen of a run that measured everything that the quickstart measures."""
    live = LiveTerminal(console=Console(file=io.StringIO()), now=lambda: 0.0)
    live.begin(Plan("sort_letters-grpo-seed0", "grpo", 100, groups=64, rows=256))
    seconds = {f"seconds/{phase}": 1.0 for phase in ("sample", "reward", "reference", "update")}
    measured = {name: 0.5 for name, _, _ in CURVES if "return" not in name and "teacher" not in name}
    facts = {"gradient_signal": 1.0, "gradient_noise": 1.0, "memory": 800.0, "tokens_per_second": 1.0}
    live.step({"step": 1, **measured, **facts, **seconds}, 1.0)
    live.sample(1, [{"prompt": "sort: ba=", "completion": "ab", "reward": 1.0, "parts": {}}])
    out = io.StringIO()
    assert live.board is not None
    Console(file=out, width=terminal.COLUMNS).print(draw(live.board, 1.0, terminal.COLUMNS, terminal.LINES))
    return out.getvalue().splitlines()


def labels(lines: list[str]) -> list[str]:
    """The name in the first column of every line."""
    known = sorted({label for _, label, _ in CURVES} | set(PHASES.values()), key=len, reverse=True)
    return [next((name for name in known if line.startswith(f"{name} ")), line.split(" ")[0]) for line in lines if line]


def test_the_recording_has_the_lines_that_the_terminal_draws() -> None:
    """Where this fails: python recipes/figures/terminal.py"""
    recorded = terminal.last_screen(terminal.OUT.read_text(encoding="utf-8"))
    begin = next(i for i, line in enumerate(recorded) if line.startswith("grpo  sort_letters"))
    today = [line for line in drawn_today() if line.strip()]
    assert labels(recorded[begin:]) == labels(today)
    assert labels(today)[2:6] == ["sampling", "rewards", "reference", "training"]
