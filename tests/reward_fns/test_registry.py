"""What is shipped, as data."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns import registry
from reward_fns.registry import RewardInfo

PURE = (
    "countdown",
    "exact_match",
    "format_tags",
    "length_penalty",
    "number_match",
    "repetition_penalty",
    "sort_letters",
)
ROW = {"answer": "5", "numbers": [1, 2], "target": 3, "letters": "ba", "completion_ids": [1], "max_length": 10}


@pytest.mark.parametrize("name", sorted(registry.rewards()))
def test_every_shipped_function_states_its_range_and_floor_and_has_the_plain_form(name):
    shipped = registry.rewards()[name]
    parameters = inspect.signature(shipped.function).parameters
    assert next(iter(parameters)) == "completion"
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())
    assert "Range" in shipped.function.__doc__
    assert "Floor" in shipped.function.__doc__
    assert shipped.summary
    assert shipped.name == shipped.function.__name__


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_rewards_stay_in_their_range_on_any_text(text):
    for name in PURE:
        info = registry.rewards()[name].info
        assert info.low <= registry.rewards()[name].function(text, **ROW) <= info.high


@pytest.mark.parametrize("name", sorted(registry.tasks()))
def test_a_task_generates_rows_demonstrations_and_names_its_reward(name):
    module = import_module(registry.tasks()[name])
    rows, shown = module.prompts(0, 20), module.demonstrations(0, 20)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in shown]
    reward = registry.rewards()[module.REWARD]
    for row, demonstration in zip(rows, shown, strict=True):
        assert set(demonstration) == {"prompt", "completion"}
        assert reward.function(demonstration["completion"], **row) == reward.info.high


def test_the_two_tasks_are_listed_by_name():
    assert {"sort_letters", "countdown"} <= set(registry.tasks())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"low": 0, "high": 1, "floor": 2, "checks": "answer"}, "floor lies in the range"),
        ({"low": 0, "high": 1, "floor": 0, "checks": "shape"}, "pays junk of that form in full"),
    ],
)
def test_a_floor_that_cannot_be_honest_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        RewardInfo(**fields)


def test_listing_rewards_and_tasks_imports_nothing_heavy():
    code = (
        "import sys; from reward_fns import registry; registry.rewards(), registry.tasks(); "
        "heavy = {'torch', 'numpy', 'sympy', 'math_verify', 'jsonschema', 'regex', 'llm_pg.trainer'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr
