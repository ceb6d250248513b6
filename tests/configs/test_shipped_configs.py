"""Every shipped config parses, says how to run it, and is whole: its data, here a stand-in, becomes prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_pg.config import load_config
from llm_pg.config.check import plan_batch, resolve_spec
from llm_pg.model.loading import character_tokenizer
from llm_pg.prompts import check_data, load_prompts
from reward_fns import countdown
from reward_fns.registry import rewards

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.y*ml"))
WHOLE = [path for path in CONFIGS if "dataset_name" in path.read_text(encoding="utf-8")]


def gsm8k(i: int) -> dict[str, Any]:
    return {"question": f"Tom has {i} boxes of 617 pens. How many?", "answer": f"{i} * 617 = ...\n#### {617 * i:,}"}


def gsm8k_is_right(row: dict[str, Any], text: str) -> str:
    boxes = int(row["question"].split()[2])
    assert row["question"] in text
    return f"They are {boxes} times 617.\n#### {boxes * 617}"


@cache
def puzzles(n: int) -> list[tuple[dict[str, Any], str]]:
    options = {"num_numbers": 4, "high": 40}
    return list(
        zip(
            countdown.prompts(0, n, **options),
            (row["completion"] for row in countdown.demonstrations(0, n, **options)),
            strict=True,
        )
    )


def countdown_is_right(row: dict[str, Any], text: str) -> str:
    assert str(row["target"]) in text
    assert str(row["numbers"]) in text
    solved = {(tuple(puzzle["numbers"]), puzzle["target"]): solution for puzzle, solution in puzzles(150)}
    return f"Let me see.\n<answer>{solved[tuple(row['numbers']), row['target']]}</answer>"


def countdown_row(i: int) -> dict[str, Any]:
    puzzle = puzzles(150)[i][0]
    return {"target": puzzle["target"], "nums": puzzle["numbers"]}


# How a hub dataset's rows look, and a right answer to one of its prompts.
STAND_INS: dict[str, tuple[Callable[[int], dict[str, Any]], Callable[[dict[str, Any], str], str]]] = {
    "openai/gsm8k": (gsm8k, gsm8k_is_right),
    "Jiayi-Pan/Countdown-Tasks-3to4": (countdown_row, countdown_is_right),
}


def write(path: Path, make: Callable[[int], dict[str, Any]], rows: range) -> str:
    path.write_text("".join(json.dumps(make(i)) + "\n" for i in rows), encoding="utf-8")
    return str(path)


def as_hub_folder(folder: Path, config_name: str | None, splits: list[str]) -> str:
    """A dataset card that maps a configuration and its splits to files, as on the hub."""
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": config_name or "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_parses_and_begins_with_its_command(path: Path) -> None:
    config = load_config(path)
    resolve_spec(config)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# llm-pg ")
    assert path.name in first
    unknown = {name for name in config.reward.reward_funcs if isinstance(name, str)} - set(rewards())
    assert not unknown


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in WHOLE], ids=lambda path: path.name)
def test_a_shipped_config_with_a_task_has_prompts_enough(path: Path) -> None:
    config = load_config(path)
    if config.data.task:
        assert "prompt" in check_data(config)


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
@pytest.mark.parametrize("source", ["as on the hub", "local files"])
def test_a_config_for_the_hub_is_whole_on_a_stand_in_of_its_data(path: Path, source: str, tmp_path: Path) -> None:
    shipped = load_config(path)
    make, right_answer = STAND_INS[str(shipped.data.dataset_name)]
    step = plan_batch(shipped).prompts
    if source == "local files":
        name = write(tmp_path / "rows.jsonl", make, range(2 * step + 5))
        overrides = ["dataset_name=null", f"data_files={name}"]
        sizes = (2 * step, 5)
    else:
        splits = [shipped.data.dataset_split.split("[")[0]]
        write(tmp_path / f"{splits[0]}.jsonl", make, range(2 * step))
        if shipped.data.dataset_eval_split:
            splits.append(shipped.data.dataset_eval_split)
            write(tmp_path / f"{splits[1]}.jsonl", make, range(2 * step, 2 * step + 9))
        overrides = [f"dataset_name={as_hub_folder(tmp_path, shipped.data.dataset_config, splits)}"]
        sizes = (2 * step if len(splits) == 2 else 2 * step - 5, 5)
    in_characters = "max_prompt_length=1000"  # the stand-in's tokens are single characters
    config = load_config(path, [*overrides, "num_eval_prompts=5", in_characters])

    columns = check_data(config)
    train, held_out = load_prompts(config, character_tokenizer(), context_length=32_768)
    assert (len(train), len(held_out)) == sizes
    if source == "local files":
        assert columns == list(train[0].row)
    reward = rewards()[config.reward.reward_funcs[0]].function
    for prompt in [train[-1], *held_out]:
        assert (prompt.messages is not None) == bool(config.data.chat)
        assert reward(right_answer(prompt.row, prompt.text), **prompt.row) == 1.0
        assert reward("I do not know.", **prompt.row) == 0.0


def test_there_are_real_configs_to_check() -> None:
    assert len(WHOLE) >= 3


def test_the_countdown_config_runs_on_the_shipped_task_as_its_comment_says() -> None:
    path = FOLDER / "countdown_qwen2.5-1.5b_grpo.yaml"
    comment = next(line for line in path.read_text().splitlines() if "dataset_name=null" in line)
    assert "task_options='{num_numbers: 4, high: 99}'" in comment
    config = load_config(
        path,
        [
            "dataset_name=null",
            "task=countdown",
            "columns={}",
            "task_options={num_numbers: 4, high: 99}",
            "num_train_prompts=64",
        ],
    )
    assert check_data(config) == ["prompt", "numbers", "target"]
