"""Row E7 of the fault list: what a reward function starts does not outlive its worker, the scorer or the trainer."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import reward_specimens as specimens
from reward_processes import guard_pids, is_alive, marked, worker_pids

from llm_pg.rewards import Scorer

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

ROOT = Path(__file__).parents[2]
WAYS = ["double fork", "popen in a session", "no SIGTERM", "async"]
MORE = ["fork", "setsid", "popen", "stopped", "thread", "multiprocessing"]
EVERY_WAY = [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE)]
COMPLETIONS = ["a", "BAD", "b", "c", "d", "e"]
ALL_BUT_THE_BAD = [1.0, None, 1.0, 1.0, 1.0, 1.0]


@pytest.fixture
def mark(monkeypatch):
    """A value in the environment of all that is started from here on."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("TEST_MARK", value)
    yield value
    for pid in marked("TEST_MARK", value):  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def scorer_of(name, **options):
    return Scorer([getattr(specimens, name)], **{"workers": 1, **options})


def score(scorer, completions=COMPLETIONS, row=None):
    return scorer.grade(["p"] * len(completions), completions, [[1]] * len(completions), [row or {}] * len(completions))


def soon(holds):
    """The kernel ends processes a moment after it was asked to."""
    until = time.monotonic() + 10.0
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def named(way):
    return "async_leaves" if way == "async" else "leaves"


@pytest.mark.parametrize("way", [*WAYS, *MORE])
def test_nothing_that_a_function_left_running_is_alive_when_the_scorer_is_closed(way, mark):
    with scorer_of(named(way)) as scorer:
        assert score(scorer, ["a"], {"way": way}).reward == [1.0]
        assert len(marked("TEST_MARK", mark)) > 2  # the guard, the worker, and what was left
    assert marked("TEST_MARK", mark) == []


@pytest.mark.parametrize("way", EVERY_WAY)
def test_nothing_is_alive_of_a_worker_that_was_replaced_at_its_deadline(way, mark):
    with scorer_of(named(way), deadline=2.0, max_unscorable=1.0) as scorer:
        score(scorer, ["a"], {"way": way})
        (guard,) = guard_pids(os.getpid())
        before = marked("TEST_MARK", mark)
        scores = score(scorer, ["a"], {"way": way, "hangs": True})
        assert scores.problems == {named(way): {"deadline": 1}}
        assert guard in before
        assert not set(before) & set(marked("TEST_MARK", mark))
        assert len(marked("TEST_MARK", mark)) <= 2  # the new guard and the new worker


TRAINER = """
import sys, time
from llm_pg.rewards import Scorer
with Scorer([sys.argv[1]], workers=2, deadline=600.0) as scorer:
    scorer.grade(["p"] * 2, ["a"] * 2, [[1]] * 2, [{"way": sys.argv[2]}] * 2)
    print("ready", flush=True)
    scorer.grade(["p"], ["a"], [[1]], [{"way": sys.argv[2], "hangs": len(sys.argv) > 3}])
    time.sleep(600)
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_nothing_is_alive_soon_after_the_trainer_is_killed(way, hangs, mark):
    function = f"{specimens.__file__}:{named(way)}"
    command = [sys.executable, "-c", TRAINER, function, way, *["hangs"] * hangs]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout.readline() == "ready\n"
    time.sleep(0.3)
    assert len(marked("TEST_MARK", mark)) > 5  # the trainer, two guards, two workers, and what was left
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    soon(lambda: marked("TEST_MARK", mark) == [])


def test_a_guard_that_is_killed_between_batches_costs_nothing(mark):
    with scorer_of("one", workers=2) as scorer:
        score(scorer)
        workers = worker_pids(os.getpid())
        for guard in guard_pids(os.getpid()):
            os.kill(guard, signal.SIGKILL)
        scores = score(scorer)
        assert scores.reward == [1.0] * len(COMPLETIONS)
        assert scores.problems == {}
        soon(lambda: not any(map(is_alive, workers)))
    assert marked("TEST_MARK", mark) == []


def test_a_guard_that_is_killed_in_the_middle_of_a_call_costs_that_completion(mark):
    with scorer_of("pause", deadline=30.0) as scorer:
        score(scorer, ["a"], {"seconds": 0.0})
        (worker,), (guard,) = worker_pids(os.getpid()), guard_pids(os.getpid())
        threading.Timer(0.5, os.kill, (guard, signal.SIGKILL)).start()
        scores = score(scorer, ["a"] * 6, {"seconds": 0.2})
        assert sorted(scores.reward, key=str) == [1.0] * 5 + [None]
        assert scores.problems == {"pause": {"killed by SIGKILL": 1}}
        soon(lambda: not is_alive(worker))
    assert marked("TEST_MARK", mark) == []


def test_a_function_that_ends_its_parent_process_ends_no_trainer(mark, tmp_path):
    (tmp_path / "fratricide.py").write_text(
        "import os, signal, time\ndef f(completion):\n    if completion == 'BAD':\n"
        "        os.kill(os.getppid(), signal.SIGTERM)\n        time.sleep(10)\n    return 1.0\n"
    )
    with Scorer([f"{tmp_path}/fratricide.py:f"], workers=1) as scorer:
        assert score(scorer).reward == ALL_BUT_THE_BAD
    assert marked("TEST_MARK", mark) == []


@pytest.mark.parametrize("in_process", [False, True], ids=["worker", "in_process"])
@pytest.mark.parametrize(
    "name", ["forks_and_returns", "batch_forks_and_returns", "async_forks_and_returns", "forks_and_raises"]
)
def test_a_child_that_comes_back_out_of_a_function_costs_one_completion(name, in_process, mark, caplog):
    with scorer_of(name, in_process=in_process) as scorer:
        scores = score(scorer)
        assert scores.reward == ALL_BUT_THE_BAD
        assert scores.problems == {name: {"ForkedChildError": 1}}
        assert score(scorer, ["x"] * 3).reward == [1.0] * 3
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"Reward function {name} failed on completion 1 of a batch (ForkedChildError)" in said
    assert "the child process returned from it as well" in said
    assert marked("TEST_MARK", mark) == []


def test_a_child_that_comes_back_late_is_ended_and_disturbs_no_later_batch(mark):
    with scorer_of("forks_and_returns_late") as scorer:
        assert score(scorer).reward == [1.0] * 6
        (worker,), (guard,) = worker_pids(os.getpid()), guard_pids(os.getpid())
        soon(lambda: score(scorer, ["x"]).reward == [1.0] and set(marked("TEST_MARK", mark)) == {worker, guard})
        assert score(scorer, ["x"] * 3).reward == [1.0] * 3


def test_a_child_that_ends_inside_the_function_costs_nothing(mark):
    with scorer_of("forks_in_order", deadline=60.0) as scorer:
        start = time.monotonic()
        assert score(scorer, ["a", "bb", "ccc"]).reward == [1.0, 2.0, 3.0]
        assert time.monotonic() - start < 20.0
    assert marked("TEST_MARK", mark) == []


def test_a_module_that_forks_while_it_is_imported_is_an_error(tmp_path, mark):
    (tmp_path / "forking.py").write_text("import os\nos.fork()\ndef f(completion):\n    return 1.0\n")
    with pytest.raises(ValueError, match="the child process returned from it as well"):
        Scorer([f"{tmp_path}/forking.py:f"])
    assert marked("TEST_MARK", mark) == []


def test_an_answer_that_nobody_waits_for_costs_the_worker_and_not_the_run(tmp_path, mark):
    """A child that writes to the pipe of its worker, which it has inherited."""
    (tmp_path / "stray.py").write_text(
        "import json, os, struct\ndef f(completion):\n    if completion == 'BAD':\n"
        "        body = json.dumps({'index': 99, 'cause': 'x', 'trace': ''}).encode()\n"
        "        for descriptor in range(3, 20):\n            try:\n"
        "                os.write(descriptor, struct.pack('>Q', len(body)) + body)\n"
        "            except OSError:\n                pass\n    return 1.0\n"
    )
    with Scorer([f"{tmp_path}/stray.py:f"], workers=1) as scorer:
        scores = score(scorer)
        assert scores.reward == ALL_BUT_THE_BAD
        assert scores.problems == {"f": {"wrote to the protocol's pipe": 1}}


def test_a_sandbox_whose_worker_is_ended_removes_its_folder(tmp_path, mark, monkeypatch):
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scorer_of("runs_endless_code", deadline=1.5) as scorer:
        scores = score(scorer)
    assert scores.problems == {"runs_endless_code": {"deadline": 1}}
    assert marked("TEST_MARK", mark) == []
    assert list(tmp_path.iterdir()) == []
