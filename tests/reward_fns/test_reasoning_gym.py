"""Every task of reasoning-gym that is listed as good: its own answer earns 1, junk less than a half, nothing is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward_fns import reasoning_gym as ours

NONSENSE = ("", "I do not know", "lorem ipsum dolor", "#" * 40)
CONSTANTS = ("0", "1", "-1", "42", "a", "[]", "{}", "None", "yes", "no", "True", "False", "()", "[[0]]", "-", "A")
PAYLOADS = ("{}", "[{}]", "[[{}]]", "(lambda: {})()", "x = {}", "{} and x", "1 + {}")
ENTRIES = 12


def test_the_lists_do_not_overlap() -> None:
    lists = [set(ours.GOOD), set(ours.EXECUTES), set(ours.BROKEN)]
    assert sum(map(len, lists)) == len(set().union(*lists))


@pytest.mark.parametrize(
    "task, words",
    [("countdown", "executes the answer"), ("coin_flip", "is not used"), ("no_such", "none of our lists")],
)
def test_a_task_that_is_not_good_is_refused_by_prompts_and_reward(task: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ours.prompts(0, 2, task)
    with pytest.raises(ValueError, match=words):
        ours.reasoning_gym("42", gym_task=task, gym_entry="{}")


def test_the_last_answer_in_tags_counts() -> None:
    assert ours.answer_of("<answer>1</answer> no, <answer> 2\n</answer>.") == "2"
    assert ours.answer_of(" 7 ") == "7"
    assert ours.answer_of("<answer>3") == "<answer>3"


def installed() -> None:
    pytest.importorskip("reasoning_gym")


def test_every_task_of_the_library_is_on_a_list() -> None:
    installed()
    from reasoning_gym.factory import DATASETS

    assert set(DATASETS) == set(ours.GOOD) | set(ours.EXECUTES) | set(ours.BROKEN)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(ours.GOOD))
def test_the_gold_answer_earns_one_and_junk_less_than_a_half(task: str, tmp_path: Path) -> None:
    installed()
    rows = ours.prompts(5, ENTRIES, task)
    assert all(json.loads(json.dumps(row)) == row for row in rows)

    def earned(text: str, row: dict) -> float:
        return ours.reasoning_gym(text, row["gym_task"], row["gym_entry"], row["gym_options"])

    for row, shown in zip(rows, ours.demonstrations(5, ENTRIES, task), strict=True):
        assert earned(shown["completion"], row) == pytest.approx(1.0)
        for text in (*NONSENSE, row["prompt"]):
            assert text.strip() == row["answer"].strip() or earned(text, row) < 0.5, text
    for text in CONSTANTS:
        assert sum(earned(text, row) for row in rows) / ENTRIES < 0.5, text
    marker = tmp_path / "marker"
    for form in PAYLOADS:
        for call in (f"__import__('pathlib').Path({str(marker)!r}).touch()", f"open({str(marker)!r}, 'w')"):
            for row in rows[:3]:
                earned(form.format(call), row)
    assert not marker.exists()


@pytest.mark.slow
def test_rows_are_a_function_of_their_seed_in_any_process() -> None:
    installed()
    code = (
        "import json, hashlib; from reward_fns import reasoning_gym as g; "
        "print([(t, hashlib.md5(json.dumps(g.prompts(3, 3, t)).encode()).hexdigest()) for t in sorted(g.GOOD)])"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    assert outputs[0].stdout == outputs[1].stdout != b""
