"""State of a reward function's module that stays in a worker is named, and nothing else is."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reward_state as specimens

from llm_pg.rewards import Scorer
from llm_pg.rewards.globals import GlobalsWatch

ROOT = Path(__file__).parents[2]
KEEPERS = {
    "keeps_a_list": "history",
    "batch_keeps_a_list": "history",
    "async_keeps_a_list": "history",
    "keeps_a_number": "calls",
    "keeps_a_sum": "total",
    "keeps_a_set": "seen",
    "keeps_a_dict": "counts",
    "keeps_a_count": "numbers",
    "keeps_a_text": "latest",
    "keeps_an_object": "tracker.rewards",
    "keeps_a_class": "Tracker.made",
    "keeps_an_attribute": "keeps_an_attribute.calls",
}


@pytest.fixture(autouse=True)
def as_imported():
    yield
    importlib.reload(specimens)


def score(names, *, batches=3, **options):
    functions = [getattr(specimens, name) for name in names]
    with Scorer(functions, **{"workers": 1, **options}) as scorer:
        for batch in range(batches):
            completions = [f"{batch} {letter}" for letter in "abcd"]
            scorer.grade(["p"] * 4, completions, [[1]] * 4, [{}] * 4)


def said(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", KEEPERS)
def test_a_state_that_stays_in_the_workers_is_named_once(name, workers, caplog):
    score([name], workers=workers, batches=6)
    (message,) = said(caplog)
    assert message.startswith(f"Reward function {name} keeps a state: its module's global `{KEEPERS[name]}` changes")
    assert "reward_in_process=true" in message


@pytest.mark.parametrize("name", ["pure", "lazy", "cached", "begins_its_own_run"])
def test_a_pure_function_and_what_is_made_once_are_not_named(name, caplog):
    score([name], batches=6)
    assert said(caplog) == []


def test_a_function_beside_one_with_a_state_is_not_named(caplog):
    score(["pure", "keeps_a_list", "lazy"])
    assert [message.split(":")[0] for message in said(caplog)] == ["Reward function keeps_a_list keeps a state"]


@pytest.mark.parametrize("name", [*KEEPERS, "reads_globals", "logs_to_wandb", "logs_to_trackio"])
def test_in_the_process_that_trains_nothing_is_said(name, caplog, monkeypatch):
    monkeypatch.setattr(specimens, "threshold", 0.5)
    score([name], in_process=True)
    assert said(caplog) == []


def test_a_global_that_was_set_after_the_import_is_named_with_both_values(caplog, monkeypatch):
    monkeypatch.setattr(specimens, "threshold", 0.5)
    monkeypatch.setitem(specimens.settings, "strict", True)
    score(["reads_globals", "pure"])
    first, second = said(caplog)
    assert first.startswith("Reward function reads_globals reads the global `threshold`, which is 0.5 (float) in the")
    assert "and 0.25 (float) in the worker" in first
    assert "`settings`, which is 1 items (dict) in the program that trains and 0 items (dict)" in second
    assert "reward_in_process=true" in first


def test_a_global_that_the_main_part_of_a_script_makes_is_named_as_not_defined(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from llm_pg.rewards import Scorer\n\ndef bonus(completion):\n    return float(weight)\n\n"
        "if __name__ == '__main__':\n    weight = 2\n"
        "    with Scorer([bonus], workers=1, max_unscorable=1.0) as scorer:\n"
        "        scorer.grade(['p'], ['a'], [[1]], [{}])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "bonus reads the global `weight`, which is 2 (int) in the program that trains and not defined" in done.stderr
    assert "NameError" in done.stderr


@pytest.mark.parametrize("name, call", [("logs_to_wandb", "wandb.log"), ("logs_to_trackio", "trackio.log")])
def test_a_tracker_without_a_run_in_the_worker_is_named(name, call, caplog):
    score([name])
    (message,) = said(caplog)
    assert message.startswith(f"Reward function {name} calls {call}, and runs in a worker process, where")
    assert "log_metric" in message


def test_a_look_costs_microseconds():
    watch = GlobalsWatch(specimens.keeps_an_object)
    begin = time.perf_counter()
    for _ in range(1000):
        watch.state()
    assert (time.perf_counter() - begin) / 1000 < 2e-4
