"""What is shown before the first step: a line at once, and one for everything that takes a while."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from llm_pg.config.arguments import COMMON, common_help, help_text
from llm_pg.config.schema import LEAVES
from llm_pg.metrics import Clock
from llm_pg.terminal import LiveTerminal, LogTerminal, Terminal
from llm_pg.terminal.plain import Plan
from llm_pg.terminal.starting import StartingLines

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["max_steps=1", "prompts_per_step=2", "num_generations=2", "num_eval_prompts=2", "eval_num_samples=0"]
QUICK += ["num_train_prompts=16", "warm_start_steps=4", "use_cpu=true"]


def started(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
    given = [sys.executable, "-m", "llm_pg", *words]
    return subprocess.run(given, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=250, check=False)


def test_the_first_lines_of_a_run_come_before_torch(tmp_path: Path) -> None:
    """torch alone takes seconds to import; a torch that cannot be imported is not missed by then."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is not to be imported')\n")
    ended = started(tmp_path, "quickstart", *QUICK)
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("llm-pg 0.1.0: grpo, a made model, sort_letters (runs in runs/sort_letters-grpo-seed0)")
    assert lines[1:] == ["Checking settings, data and rewards ...", "Loading torch and transformers ..."]
    assert "this torch is not to be imported" in ended.stderr


def test_every_phase_before_the_first_step_has_a_line_and_verbose_adds_the_log(tmp_path: Path) -> None:
    ended = started(tmp_path, "quickstart", *QUICK, "--verbose")
    said = [line for line in ended.stdout.splitlines() if line.endswith(" ...")]
    assert said == [
        "Checking settings, data and rewards ...",
        "Loading torch and transformers ...",
        "Loading the model and the data ...",
        "Warm start ...",
        "Answering the held-out prompts ...",
    ]
    assert "llm_pg.phases: warm_start took" in ended.stderr
    assert "|" not in ended.stderr  # a progress bar of a library
    assert ended.returncode == 0


@pytest.mark.slow
def test_quiet_leaves_the_table_of_the_end(tmp_path: Path) -> None:
    quiet = started(tmp_path, "quickstart", *QUICK, "--quiet")
    assert quiet.returncode == 0
    assert " ..." not in quiet.stdout
    assert quiet.stdout.strip().startswith("Held-out prompts, before and after")
    assert quiet.stderr == ""


def test_a_long_phase_says_how_far_it_is() -> None:
    said: list[str] = []
    now = [0.0]
    lines = StartingLines(said.append, lambda: now[0])
    lines.begin("warm_start")
    lines.tick()
    now[0] = 50.0
    lines.progress(70, 200)
    lines.tick()
    lines.end()
    lines.tick()
    assert said == ["Warm start ...", "Warm start: 0 s", "Warm start: 70 of 200 after 50 s"]


def test_the_lines_come_from_a_thread_that_ends_with_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_pg.terminal.starting.LINE_S", 0.05)
    said: list[str] = []
    lines = StartingLines(said.append)
    before = set(threading.enumerate())
    lines.begin("load")
    time.sleep(0.5)  # what loads calls nothing of ours
    lines.end()
    assert len(said) > 3
    time.sleep(0.2)
    count = len(said)
    time.sleep(0.2)
    assert len(said) == count
    assert set(threading.enumerate()) <= before


def test_lines_end_with_the_first_step_and_nothing_of_them_is_left_on_a_live_screen() -> None:
    out = io.StringIO()
    plain = Terminal(console=Console(file=out, width=100))
    clock = Clock(plain.phase)
    with clock("eval"):
        pass
    plain.begin(Plan("r", "grpo", 2, groups=1, rows=2))
    plain.step({"step": 1, "reward": 0.5, "seconds": 1.0}, 1.0)
    with clock("eval"):
        pass
    assert out.getvalue().count("Answering the held-out prompts ...") == 1

    out = io.StringIO()
    live = LiveTerminal(console=Console(file=out, force_terminal=True, width=100))
    with Clock(live.phase)("warm_start"):
        live.progress(7, 20)
    assert "Warm start" in out.getvalue()
    assert "7/20" in out.getvalue()
    with pytest.raises(ValueError, match="x"), Clock(live.phase)("load"):
        raise ValueError("x")
    live.say("after")  # a display that was left open would be drawn under it
    assert out.getvalue().rstrip().endswith("after")


def test_an_application_routes_what_a_run_says_by_a_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llm_pg")
    terminal = LogTerminal()
    terminal.begin(Plan("r", "grpo", 2, groups=1, rows=2))
    terminal.say("a [bold] line")
    terminal.warn("a warning")
    terminal.step({"step": 1, "reward": 0.5, "seconds": 1.0}, 1.0)
    found = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert found[:2] == [("llm_pg.run", "INFO", "a [bold] line"), ("llm_pg.run", "WARNING", "a warning")]
    assert found[2][2].startswith("· step 1/2  reward 0.500")


def test_the_short_help_is_a_screen_of_common_settings_and_the_long_one_has_all() -> None:
    text = common_help()
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 118
    assert "  num_generations=8 " in text
    assert "{native|transformers|vllm}" in text
    assert {leaf for names in COMMON.values() for leaf in names} <= set(LEAVES)
    assert all(f"  {leaf}=" in help_text() for leaf in LEAVES)


@pytest.mark.parametrize("option, wanted", [("--help", "What is trained:"), ("--help-all", "lora_target_modules=null")])
def test_both_helps_are_printed_and_end(option: str, wanted: str, tmp_path: Path) -> None:
    ended = started(tmp_path, "train", option)
    assert ended.returncode == 0
    assert wanted in ended.stdout
