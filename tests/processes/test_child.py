"""A child ends in one way, whoever is killed: with the process that started it, and with all that it has started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_pg.processes.child import Child, end_of

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]
ROOT = Path(__file__).parents[2]
ASYNCHRONOUS = """
from llm_pg.control.settings import resolve
from llm_pg.control.train import train
train(resolve("cartpole", "a3c", num_workers=2, total_steps=10**9), on_point=lambda point: print("point", flush=True))
"""


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """alive(): the processes that this test has started and that have not ended."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("TEST_MARK", mark)

    def found() -> list[int]:
        pids = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_dead = (place / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if f"TEST_MARK={mark}".encode() in (place / "environ").read_bytes().split(b"\0") and not is_dead:
                    pids.append(int(place.name))
        return pids

    yield found
    for pid in found():  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    "script, death", [("exit 3", "exit code 3"), ("kill -9 $$", "killed by SIGKILL"), ("sleep 60", "killed")]
)
def test_how_a_child_ended_is_said(script: str, death: str, alive: Callable[[], list[int]]) -> None:
    child = Child(["sh", "-c", script])
    assert child.end(patience=5.0 if death != "killed" else 0.0) == death
    assert alive() == []


def test_what_a_child_leaves_running_ends_with_it(alive: Callable[[], list[int]]) -> None:
    child = Child(["sh", "-c", "setsid sleep 60 & exit 0"])
    assert child.end(patience=5.0) == "exit code 0"
    assert alive() == []


def test_a_command_has_its_time_to_end_in_order(tmp_path: Path, alive: Callable[[], list[int]]) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        script = "trap 'sleep 0.3; echo in order; exit 0' TERM; echo ready; while true; do sleep 0.05; done"
        child = Child(["sh", "-c", script], output=output, grace=10.0)
    soon(lambda: "ready" in log.read_text())
    child.end()
    assert "in order" in end_of(log)
    assert alive() == []


def test_a_command_that_is_not_there_is_named_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        assert Child([str(tmp_path / "none")], output=output).end(patience=5.0) == "exit code 1"
    assert f"{tmp_path / 'none'} cannot be started: No such file" in end_of(log)


def test_a_guard_that_is_killed_takes_its_child_with_it(alive: Callable[[], list[int]]) -> None:
    child = Child(["sleep", "60"])
    soon(lambda: len(alive()) == 2)
    child.process.kill()
    soon(lambda: alive() == [])
    assert child.end(patience=5.0) == "killed by SIGKILL"


def test_asynchronous_workers_end_with_a_trainer_that_is_killed(alive: Callable[[], list[int]]) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", ASYNCHRONOUS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "point\n"
    assert len(alive()) > 3
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    soon(lambda: alive() == [])
