"""Data whose columns have other names than a run asks for: the message names the setting that helps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError, load_config
from llm_pg.run.before.preflight import check_inputs

REWARD = """
def same(completion, answer):
    return float(completion == answer)
"""


def refusal(tmp_path: Path, row: dict[str, Any], *settings: str) -> str:
    """What a run of these data is told before anything is loaded."""
    data, reward = tmp_path / "rows.jsonl", tmp_path / "same.py"
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    reward.write_text(REWARD)
    sizes = ["prompts_per_step=2", "num_eval_prompts=0", "num_generations=2"]
    given = [f"data_files={data}", f'reward_funcs=["{reward}:same"]', "model_name_or_path=none/none", *sizes]
    try:
        check_inputs(load_config(None, [*given, *settings]))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("prompt", ["question", "problem", "instruction", "input", "query", "text"])
@pytest.mark.parametrize("answer", ["solution", "ground_truth", "target", "label"])
def test_the_settings_that_messages_propose_make_the_data_usable(tmp_path: Path, prompt: str, answer: str) -> None:
    row: dict[str, Any] = {"id": 1, answer: "4", prompt: "2+2="}
    settings: list[str] = []
    for _ in range(2):
        told = refusal(tmp_path, row, *settings)
        settings += re.findall(r"[Ss]et ([a-z_]+=(?:{.*?}|[a-z_]+))", told)
    assert len(settings) == 2
    assert refusal(tmp_path, row, *settings) == ""


def test_messages_are_proposed_as_prompts_only_where_no_answer_is_in_them(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    assert "Set prompt_column=messages: it holds lists" in refusal(tmp_path, {"messages": [asked], "answer": "4"})
    told = refusal(tmp_path, {"messages": [asked, said], "answer": "4"})
    assert "end with the assistant's answer" in told
    assert 'row["messages"][:-1]' in told


def test_nothing_is_proposed_where_no_column_has_a_usual_name(tmp_path: Path) -> None:
    told = refusal(tmp_path, {"left": "2+2=", "right": "4"})
    assert "Say which column holds the prompt with data.prompt_column" in told
    assert "Set prompt_column" not in told
