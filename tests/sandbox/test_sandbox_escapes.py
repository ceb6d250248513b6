"""Row S1: model-written code that tries to get out, hold on, or use the machine up, at every level of protection."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from escape_attempts import ATTACKS, PREFIX, QUICK, Attack, World, carry_out, left_over
from sandbox_levels import LEVELS, level_or_skip

from llm_pg import sandbox
from llm_pg.sandbox.launch import RunningSandbox
from llm_pg.sandbox.levels import open_to_all

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
NOBODY = 65534


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[World, str]]:
    with tempfile.TemporaryDirectory(prefix="llm-pg-world-") as root:
        runs = os.path.join(root, "runs")
        os.mkdir(runs)
        os.chmod(root, 0o755)
        os.chmod(runs, 0o1777)
        target = World(Path(root))
        yield target, runs
        target.close()


def _attacks_by_level() -> Iterator[Any]:
    for name in LEVELS:
        for attack in ATTACKS:
            # What uses the machine up does not depend on Landlock's version, so the middle level is left for -m slow.
            again = name == "Landlock" and attack.ends[0] != "ok"
            yield pytest.param(attack, name, id=f"{name}: {attack.name}", marks=[pytest.mark.slow] * again)


@pytest.mark.parametrize("attack, name", _attacks_by_level())
def test_the_attack_changes_nothing_outside_and_ends_in_time(
    attack: Attack, name: str, world: tuple[World, str]
) -> None:
    target, runs = world
    outcome = carry_out(attack, level_or_skip(name), target, runs)
    assert outcome.held, outcome
    assert outcome.status in attack.ends, outcome
    assert outcome.seconds < {**QUICK, **attack.limits}["wall_s"] + 5


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.control], ids=lambda attack: attack.name)
def test_without_a_sandbox_the_same_attack_succeeds(attack: Attack, tmp_path: Path) -> None:
    target, runs = World(tmp_path), str(tmp_path / "runs")
    os.mkdir(runs)
    try:
        outcome = carry_out(attack, sandbox.Level(reason="a control"), target, runs)
        assert outcome.escapes or outcome.changes or outcome.contacts
    finally:
        target.close()


def _common_python() -> str:
    """An interpreter that any user can run, or a skip."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path) and open_to_all(path) and open_to_all(str(HERE)):
            version = subprocess.run(
                [path, "-c", "import sys; print(sys.version_info >= (3, 10))"], capture_output=True
            )
            if version.stdout.strip() == b"True":
                return path
    pytest.skip("no Python of version 3.10 or newer that other users can read, or a checkout that they cannot")


@pytest.mark.parametrize("at", [["first Landlock"], pytest.param([], marks=pytest.mark.slow, id="every level")])
@pytest.mark.parametrize("user", ["an ordinary user", "root with a user id per run"])
def test_all_attacks_are_held_when_run_by(user: str, at: list[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can run the list as another user; it was run as this one above")
    command = [_common_python(), "-B", str(HERE / "escape_attempts.py"), *at]
    if user == "an ordinary user":
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed")
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["user"] == (NOBODY if user == "an ordinary user" else 0)
    if user != "an ordinary user":
        assert all("a user id per run" in outcome["facts"] for outcome in report["outcomes"])
    assert len(report["outcomes"]) in ([len(ATTACKS)] if at else [2 * len(ATTACKS), 3 * len(ATTACKS)])
    for outcome in report["outcomes"]:
        assert not outcome["escapes"] + outcome["changes"] + outcome["contacts"] + outcome["left"], outcome
        assert outcome["right_end"], outcome


@pytest.mark.parametrize("fork", [False, True])
def test_when_the_trainer_is_killed_its_runs_end_and_their_folders_go(
    fork: bool, level: sandbox.Level, runs: str
) -> None:
    code = "import os, time\n" + "os.fork()\n" * fork + "while True: time.sleep(1)\n"
    script = (
        f"import tempfile; tempfile.tempdir = {runs!r}\n"
        f"from llm_pg import sandbox\n"
        f"from llm_pg.sandbox import Level\n"
        f"sandbox.run({code!r}, limits=sandbox.Limits(wall_s=60, fork={fork}), level={level!r})\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=HERE.parents[1])
    deadline = time.monotonic() + 20
    while len([found for found in left_over(runs) if found.startswith("process")]) < 1 + fork:
        assert trainer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while left_over(runs):
        assert time.monotonic() < deadline, left_over(runs)
        time.sleep(0.02)


def test_a_run_cannot_see_or_signal_another_one(level: sandbox.Level, runs: str) -> None:
    """Two runs of one user at the same time: the referee of a test and its solution are such a pair."""
    other = RunningSandbox(sandbox.Job("import time; time.sleep(60)"), sandbox.Limits(wall_s=60), level)
    deadline = time.monotonic() + 20
    while not (found := [name for name in left_over(runs) if name.startswith("process")]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    program = int(found[0].split()[1])
    look = (
        "attempt('other folders', os.listdir, os.path.dirname(os.getcwd()))\n"
        f"for pid in ({other.process.pid}, {program}):\n"
        "    attempt('signal', os.kill, pid, 9)\n"
        "    attempt('limits', __import__('resource').prlimit, pid, 0)\n"
        "    attempt('memory', open, f'/proc/{pid}/mem', 'rb')\n"
    )
    result = sandbox.run(PREFIX + look, "trainer=1\n", level=level)
    assert result.status == "ok"
    assert "ESCAPED" not in result.stdout, result.stdout
    assert other.process.poll() is None
    other.stop()
    assert other.finish().status == "stopped"
