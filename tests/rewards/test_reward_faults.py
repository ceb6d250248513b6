"""Rows W1 to W6 of the fault list: a reward function fails in every way, and the run loses only what it must."""

import gc
import logging
import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import reward_specimens as specimens
from reward_processes import is_alive, worker_pids

from llm_pg.rewards import RewardError, Scorer

pytestmark = pytest.mark.faults

SPECIMENS = specimens.__file__
ROOT = Path(__file__).parents[2]
COMPLETIONS = ["a", "b", "c", "BAD", "d", "e", "f", "g"]
ALL_BUT_THE_BAD = [1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0]


def scorer_of(*names, **options):
    return Scorer([getattr(specimens, name) for name in names], **{"workers": 1, **options})


def score(scorer, completions=COMPLETIONS, rows=None, **options):
    rows = rows if rows is not None else [{} for _ in completions]
    return scorer.grade(["p"] * len(completions), completions, [[1]] * len(completions), rows, **options)


def timed(scorer, completions=COMPLETIONS, rows=None):
    start = time.monotonic()
    scores = score(scorer, completions, rows)
    return scores, time.monotonic() - start


# W1: raises


@pytest.mark.parametrize("name", ["raises", "batch_raises"])
@pytest.mark.parametrize("in_process", [False, True])
def test_an_exception_leaves_one_completion_unscored_and_is_counted_by_name(name, in_process):
    with scorer_of(name, "one", in_process=in_process) as scorer:
        scores = score(scorer)
    assert scores.parts == {name: ALL_BUT_THE_BAD, "one": [1.0] * 8}
    assert scores.reward == [2.0, 2.0, 2.0, None, 2.0, 2.0, 2.0, 2.0]
    assert scores.problems == {name: {"ZeroDivisionError": 1}}


def test_the_traceback_is_shown_once_and_begins_in_the_users_function(caplog):
    with scorer_of("raises") as scorer:
        for _ in range(3):
            score(scorer)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "ZeroDivisionError: division by zero" in messages[0]
    assert f'File "{SPECIMENS}"' in messages[0]
    assert "perform.py" not in messages[0]


@pytest.mark.parametrize("name", ["exits_politely", "async_exits_politely"])
@pytest.mark.parametrize("in_process", [False, True])
def test_a_polite_exit_is_an_exception_like_any_other(name, in_process):
    with scorer_of(name, in_process=in_process) as scorer:
        scores = score(scorer)
    assert scores.reward == ALL_BUT_THE_BAD
    assert scores.problems == {name: {"SystemExit": 1}}


def test_over_the_limit_the_run_stops_with_function_share_cause_and_traceback():
    with scorer_of("one", "raises") as scorer:
        assert score(scorer, ["BAD"] * 2 + ["x"] * 8).problems == {"raises": {"ZeroDivisionError": 2}}
        with pytest.raises(RewardError, match=r"(?s)raises could not score 3 of 10 .*ZeroDivisionError: 3.*in raises"):
            score(scorer, ["BAD"] * 3 + ["x"] * 7)
        assert score(scorer).problems == {"raises": {"ZeroDivisionError": 1}}  # and the scorer is still good


def test_of_a_part_of_a_step_the_limit_is_the_steps_and_is_named_as_it_was_set():
    with scorer_of("raises") as scorer:
        scorer.share = 0.25
        assert score(scorer, ["BAD"] * 3 + ["x"]).problems == {"raises": {"ZeroDivisionError": 3}}
        with pytest.raises(RewardError, match=r"limit max_unscorable=0\.2 of a step's 16"):
            score(scorer, ["BAD"] * 4)


def test_a_function_that_always_fails_stops_the_run_long_before_the_batch_is_through():
    with scorer_of("raises_always") as scorer, pytest.raises(RewardError, match=r"could not score 103 of 512"):
        score(scorer, ["x"] * 512)


def test_strict_stops_at_the_first_failure():
    with scorer_of("raises", strict=True) as scorer, pytest.raises(RewardError, match=r"1 of 8 .* strict is set"):
        score(scorer)


def test_a_batch_without_any_score_stops_the_run_even_when_no_function_failed():
    with scorer_of("returns_none") as scorer:
        assert score(scorer, ["BAD"] * 7 + ["x"] * 3).reward == [None] * 7 + [1.0] * 3
        with pytest.raises(RewardError, match=r"10 of 10 .* could not be scored .*returns_none: returned None: 10"):
            score(scorer, ["BAD"] * 10)


# W2, W3: hangs, with and without the interpreter's lock


@pytest.mark.parametrize("name", ["hangs", "holds_the_lock", "judge"])
def test_a_hanging_completion_costs_its_deadline_and_no_more(name):
    with scorer_of(name, deadline=1.0) as scorer:
        score(scorer, ["warm"] * 4)
        scores, seconds = timed(scorer)
        assert scores.reward == ALL_BUT_THE_BAD
        assert scores.problems == {name: {"deadline": 1}}
        assert 1.0 <= seconds < 2.0
        assert score(scorer, ["x"] * 4).reward == [1.0] * 4  # the worker was replaced


def test_a_hanging_batch_function_is_run_again_one_by_one_and_only_the_guilty_one_is_lost():
    with scorer_of("batch_hangs", deadline=0.5, batch_deadline=1.0) as scorer:
        scores, seconds = timed(scorer)
    assert scores.reward == ALL_BUT_THE_BAD
    assert scores.problems == {"batch_hangs": {"deadline": 1}}
    assert seconds < 5.0  # 1.5 s of deadlines; the rest is a busy machine starting two workers


def test_a_batch_function_known_to_be_fast_is_not_waited_for_by_the_completion():
    with scorer_of("batch_hangs", deadline=0.5) as scorer:
        score(scorer, ["x"] * 40)
        completions = [*COMPLETIONS, *["x"] * 32]
        scores, seconds = timed(scorer, completions)
    assert scores.reward == [*ALL_BUT_THE_BAD, *[1.0] * 32]
    assert seconds < 5.0  # 40 x 0.5 s by the rule for a function that is not known


def test_an_async_function_that_blocks_its_loop_loses_only_the_guilty_completion():
    with scorer_of("judge_that_blocks", deadline=0.5) as scorer:
        scores = score(scorer)
    assert scores.reward == ALL_BUT_THE_BAD
    assert scores.problems == {"judge_that_blocks": {"deadline": 1}}


def test_the_deadline_is_one_completions_and_not_the_jobs(monkeypatch):
    monkeypatch.setattr("llm_pg.rewards.scorer.PIECES", 1)  # all in one job
    rows = [{"seconds": 0.2} for _ in COMPLETIONS]
    with scorer_of("pause", deadline=0.8) as scorer:
        scores, seconds = timed(scorer, rows=rows)
    assert scores.reward == [1.0] * 8
    assert seconds > 1.6


def test_the_import_of_a_slow_module_does_not_count_towards_the_deadline(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.6)\n\ndef f(completion):\n    return 1.0\n")
    with Scorer([f"{tmp_path}/slow.py:f"], deadline=0.3) as scorer:
        assert score(scorer, ["a", "b"]).reward == [1.0, 1.0]


def test_what_a_shipped_function_requires_is_imported_before_the_clock_starts(tmp_path):
    (tmp_path / "slow_dependency.py").write_text("import time\ntime.sleep(0.6)\n")
    (tmp_path / "needy.py").write_text(
        "class Info:\n    requires = ('slow_dependency',)\n\n"
        "def f(completion):\n    import slow_dependency\n    return 1.0\n\nf.reward_info = Info\n"
    )
    with Scorer([f"{tmp_path}/needy.py:f"], deadline=0.3, workers=1) as scorer:
        assert score(scorer, ["a"]).reward == [1.0]


def test_a_worker_that_takes_too_long_to_load_is_an_error(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\nmark = Path(__file__).with_name('mark')\n"
        "if mark.exists():\n    time.sleep(1e6)\nmark.touch()\n\ndef f(completion):\n    return 1.0\n"
    )
    with (
        Scorer([f"{tmp_path}/slow.py:f"], load_deadline=0.5) as scorer,
        pytest.raises(RewardError, match=r"over 0\.5 s to load"),
    ):
        score(scorer, ["a"])


# W4: returns what it should not


@pytest.mark.parametrize(
    "result, words",
    [
        ([1.0, "0.5"], "one for each completion (or for each a list with one for each token); value 1 is '0.5' (str)"),
        ([1.0], "it returned 1."),
        ({"a": 1.0}, "it returned {'a': 1.0} (dict)"),
        (0.5, "it returned 0.5 (float)"),
        ("0.5", "it returned '0.5' (str)"),
        ([1.0, float("inf")], "all finite; value 1 is inf (float)"),
    ],
)
def test_a_batch_answer_of_the_wrong_kind_names_function_expectation_and_first_bad_value(result, words):
    with scorer_of("returns_fixed") as scorer, pytest.raises(RewardError) as caught:
        score(scorer, ["a", "b"], [{"result": result}] * 2)
    assert str(caught.value).startswith("Reward function returns_fixed must return a list of 2 numbers")
    assert words in str(caught.value)


@pytest.mark.parametrize("result, words", [("0.5", "'0.5' (str)"), ([[1.0]], "[1.0] (list)"), ({"r": 1}, "keys ['r']")])
def test_a_plain_answer_of_the_wrong_kind_names_function_and_value(result, words):
    with scorer_of("returns_fixed_plain") as scorer, pytest.raises(RewardError) as caught:
        score(scorer, ["a"], [{"result": result}])
    assert "returns_fixed_plain must return a number, None, a list with a number for each token, or a dict" in str(
        caught.value
    )
    assert words in str(caught.value)


def test_an_infinite_reward_is_an_error():
    with scorer_of("returns_infinity") as scorer, pytest.raises(RewardError, match=r"all finite; .* is inf"):
        score(scorer, ["a"])


def test_nan_leaves_a_completion_unscored_and_is_counted():
    with scorer_of("returns_nan") as scorer:
        scores = score(scorer)
    assert scores.reward == ALL_BUT_THE_BAD
    assert scores.problems == {"returns_nan": {"NaN": 1}}


@pytest.mark.parametrize("result", [[None, True], [1, 0.5], [False, None]])
def test_numbers_booleans_and_none_are_taken(result):
    with scorer_of("returns_fixed", max_unscorable=1.0) as scorer:
        scores = score(scorer, ["a", "b"], [{"result": result}] * 2)
    assert scores.reward == [None if value is None else float(value) for value in result]


def test_numpy_values_are_taken_from_a_worker():
    with scorer_of("returns_numpy", "returns_numpy_scalar") as scorer:
        assert score(scorer, ["a", "b"]).reward == [2.0, 2.0]


# W5: takes its process down


@pytest.mark.parametrize(
    "name, cause, options",
    [
        ("exits", "exit code 3", {}),
        ("segfaults", "killed by SIGSEGV", {}),
        ("memory_bomb", "MemoryError", {"memory_gib": 1.0}),
        ("writes_into_the_pipe", "wrote to the protocol's pipe", {}),
    ],
)
def test_a_worker_that_is_taken_down_is_replaced_and_one_completion_lost(name, cause, options):
    with scorer_of(name, **options) as scorer:
        scores = score(scorer)
        assert scores.reward == ALL_BUT_THE_BAD
        assert scores.problems == {name: {cause: 1}}
        assert score(scorer, ["x"] * 4).reward == [1.0] * 4


def test_a_worker_killed_between_batches_costs_nothing():
    with scorer_of("one", workers=2) as scorer:
        score(scorer, ["x"] * 4)
        for pid in worker_pids(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        scores = score(scorer, ["x"] * 4)
    assert scores.reward == [1.0] * 4
    assert scores.problems == {}


def test_a_worker_killed_after_it_was_given_a_job_and_before_it_began_blames_no_function():
    with scorer_of("one") as scorer:
        score(scorer, ["x"])
        (pid,) = worker_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        scores = score(scorer, ["x"] * 4)
    assert scores.reward == [1.0] * 4
    assert scores.problems == {}


def test_workers_killed_at_once_with_a_job_each_lose_no_completion():
    with scorer_of("one", workers=2) as scorer:
        while any(worker.state == "loading" for worker in scorer.pool.workers):
            score(scorer, ["x"] * 4)
        pids = worker_pids(os.getpid())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids]).start()
        scores = score(scorer, ["x"] * 4)
    assert scores.reward == [1.0] * 4
    assert scores.problems == {}


def test_a_worker_that_the_machine_holds_up_is_waited_for():
    with scorer_of("one", deadline=0.3) as scorer:
        score(scorer, ["x"])
        (pid,) = worker_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.8, os.kill, (pid, signal.SIGCONT)).start()
        scores = score(scorer, ["x"])
        assert worker_pids(os.getpid()) == [pid]
    assert scores.reward == [1.0]


@pytest.mark.parametrize(
    "completions, rewards, problems",
    [
        (["a", "b", "c"], [1.0, 1.0, 1.0], {}),
        (["a", "b", "BAD", "c"], [1.0, 1.0, None, 1.0], {"exits_after_a_while": {"exit code 3": 1}}),
    ],
    ids=["late", "dead"],
)
def test_answers_that_wait_in_the_pipe_when_a_worker_is_found_late_or_dead_still_count(
    completions, rewards, problems, monkeypatch
):
    """The parent was held up after it had looked for answers, and the worker's time ran out meanwhile."""
    monkeypatch.setattr("llm_pg.rewards.scorer.PIECES", 1)
    with scorer_of("exits_after_a_while", deadline=0.6, max_unscorable=1.0) as scorer:
        pool, pauses = scorer.pool, [1.2]
        select = selectors.DefaultSelector.select

        def select_and_be_held_up(selector, timeout=None):
            events = select(selector, timeout)
            if not events and pauses and any(worker.has_begun for worker in pool.workers):
                time.sleep(pauses.pop())
            return events

        monkeypatch.setattr(selectors.DefaultSelector, "select", select_and_be_held_up)
        scores = score(scorer, completions)
    assert not pauses
    assert scores.reward == rewards
    assert scores.problems == problems


def test_children_of_a_worker_end_with_it(tmp_path):
    pid_file = tmp_path / "pid"
    completions = ["child", *["x"] * 7]
    with scorer_of("leaves_a_child") as scorer:
        scores = score(scorer, completions, [{"pid_file": str(pid_file)}] * 8)
    assert scores.reward == [None, *[1.0] * 7]
    assert not is_alive(int(pid_file.read_text()))


def test_workers_end_with_a_scorer_and_leave_no_descriptor():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with scorer_of("one", workers=2) as scorer:
            score(scorer, ["a"])
            assert len(worker_pids(os.getpid())) == 2
        assert worker_pids(os.getpid()) == []
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


PARENT = """
import sys, time
from llm_pg.rewards import Scorer
with Scorer([sys.argv[1]]) as scorer:
    scorer.grade(["p"], ["warm"], [[1]], [{}])
    print("ready", flush=True)
    scorer.grade(["p"], ["BAD"], [[1]], [{}])
"""


@pytest.mark.parametrize("name", ["hangs", "holds_the_lock"])
def test_workers_end_when_the_trainer_is_killed_even_in_the_middle_of_a_call(name):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{SPECIMENS}:{name}"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout.readline() == "ready\n"
    workers = worker_pids(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5.0
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))


# W6: meddles


@pytest.mark.parametrize("in_process", [False, True])
def test_a_function_that_changes_its_inputs_changes_nothing_for_the_others(in_process):
    rows = [{"numbers": [1, 2, place]} for place in range(4)]
    with scorer_of("batch_meddles", "clean", in_process=in_process) as scorer:
        first, second = (score(scorer, ["a", "b", "c", "d"], rows) for _ in range(2))
    assert first == second
    assert first.parts == {"batch_meddles": [3.0, 4.0, 5.0, 6.0], "clean": [102.0, 103.0, 104.0, 105.0]}
    assert rows == [{"numbers": [1, 2, place]} for place in range(4)]


def test_printing_changing_directory_and_seeding_have_no_effect_on_the_run(tmp_path):
    rows = [{"numbers": [1, 2, place]} for place in range(8)]
    random.seed(5)
    state, here = random.getstate(), os.getcwd()
    with scorer_of("meddles", "where", "draws", output=tmp_path / "prints.log") as scorer:
        with_meddler = score(scorer, rows=rows)
    with scorer_of("clean", "where", "draws") as scorer:
        without = score(scorer, rows=rows)
    assert with_meddler.parts["meddles"] == without.parts["clean"]
    assert with_meddler.parts["where"] == without.parts["where"] == [float(len(here))] * 8
    assert with_meddler.parts["draws"] == without.parts["draws"]
    assert (random.getstate(), os.getcwd()) == (state, here)
    assert "noise" in (tmp_path / "prints.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_a_full_disk_does_not_take_of_prints_is_dropped_and_said_once(caplog):
    rows = [{"numbers": [1, 2, place]} for place in range(8)]
    with scorer_of("meddles", "one", "prints_to_stderr", output=Path("/dev/full")) as scorer:
        first, second = (score(scorer, rows=rows) for _ in range(2))
    with scorer_of("clean", "one", "one") as scorer:
        clean = score(scorer, rows=rows)
    assert first.reward == second.reward == clean.reward
    assert first.problems == {}
    said = [record.getMessage() for record in caplog.records]
    assert [text.split()[2] for text in said] == ["meddles", "prints_to_stderr"]
    assert all("is dropped: No space left on device" in text for text in said)


@pytest.mark.parametrize("name", ["draws", "async_draws"])
def test_a_function_that_draws_gives_the_same_scores_on_any_number_of_workers(name):
    drawn = []
    for workers in (1, 2, 3):
        with scorer_of(name, workers=workers) as scorer:
            drawn.append(score(scorer, [str(number) for number in range(40)]).reward)
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 40


def test_draws_are_a_function_of_the_batch_and_not_of_what_came_before():
    with scorer_of("draws") as scorer:
        first = score(scorer, trainer_state={"global_step": 1})
        second = score(scorer, trainer_state={"global_step": 2})
    with scorer_of("draws") as scorer:
        resumed = score(scorer, trainer_state={"global_step": 2})
    assert second == resumed
    assert first.reward != second.reward


# The cost of all this


def test_a_trivial_function_costs_under_a_millisecond_a_completion():
    completions = [f"the answer is {number}" * 20 for number in range(512)]
    rows = [{"answer": number} for number in range(512)]
    with scorer_of("one", workers=2) as scorer:
        score(scorer, completions, rows)
        seconds = min(timed(scorer, completions, rows)[1] for _ in range(3))
    assert seconds / 512 < 1e-3


def test_logging_says_everything_under_one_name(caplog):
    with caplog.at_level(logging.WARNING, logger="llm_pg.rewards"), scorer_of("raises") as scorer:
        score(scorer)
    assert {record.name.rpartition(".")[0] for record in caplog.records} == {"llm_pg.rewards"}


@pytest.mark.faults
def test_a_long_pause_before_the_first_batch_is_not_held_against_the_workers() -> None:
    """The pool is opened, and the caller is busy for longer than loading may take (a warm start, say)."""
    with Scorer(["exact_match"], workers=1, load_deadline=3.0) as scorer:
        time.sleep(3.2)
        scores = scorer.grade(["p"], ["a"], [[1]], [{"answer": "a"}])
    assert scores.reward == [1.0]
