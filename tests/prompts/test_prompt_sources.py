"""Every source of prompts gives the same prompts."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llm_pg.config import ConfigError
from llm_pg.config.schema import DataConfig
from llm_pg.prompts import Prompt, check_data, fingerprint, load_prompts, task_demonstrations
from llm_pg.prompts.hub import read_hub
from reward_fns import sort_letters
from reward_fns.text import number_match

from .conftest import config, gsm8k_rows, write_jsonl

ROWS = [{"prompt": f"{i}+{i}=", "answer": 2 * i, "parts": [i, i]} for i in range(10)]


def essence(prompts: list[Prompt]) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    return [(p.text, p.ids, p.row) for p in prompts]


def both(sets: tuple[list[Prompt], list[Prompt]]) -> list[Any]:
    return [essence(prompts) for prompts in sets]


@pytest.fixture
def expected(tokenizer: Any) -> list[Any]:
    return both(load_prompts(config(), tokenizer, train_dataset=ROWS))


def write(kind: str, folder: Path) -> str:
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        return write_jsonl(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "parquet"])
def test_a_local_file_gives_the_prompts_of_its_rows(
    kind: str, tmp_path: Path, tokenizer: Any, expected: list[Any]
) -> None:
    given = config(data_files=write(kind, tmp_path))
    assert both(load_prompts(given, tokenizer)) == expected
    assert check_data(given) == ["prompt", "answer", "parts"]


def test_json_lines_in_a_json_file_are_read_as_such(tmp_path: Path, tokenizer: Any, expected: list[Any]) -> None:
    path = write_jsonl(tmp_path / "rows.json", ROWS)
    assert both(load_prompts(config(data_files=path), tokenizer)) == expected


@pytest.mark.parametrize("kind, separator", [("csv", ","), ("tsv", "\t")])
def test_a_table_of_text_keeps_line_breaks_and_reads_numbers_that_lose_nothing(
    kind: str, separator: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": f'say "{i}",\nthen stop', "answer": i, "share": i / 4, "code": f"0{i}"} for i in range(6)]
    path = tmp_path / f"rows.{kind}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    train, held_out = load_prompts(config(data_files=str(path)), tokenizer)
    found = sorted((p.row for p in train + held_out), key=lambda row: row["answer"])
    assert found == rows
    assert [type(value) for value in found[0].values()] == [str, int, float, str]


def as_objects(kind: str) -> Any:
    dataset = datasets.Dataset.from_list(ROWS)
    return {
        "Dataset": lambda: dataset,
        "formatted Dataset": lambda: dataset.with_format("numpy"),
        "IterableDataset": lambda: dataset.to_iterable_dataset(),
        "DatasetDict": lambda: datasets.DatasetDict(train=dataset, test=dataset.select(range(3))),
        "list": lambda: ROWS,
        "generator": lambda: (dict(row) for row in ROWS),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["Dataset", "formatted Dataset", "IterableDataset", "DatasetDict", "list", "generator"]
)
def test_a_python_object_gives_the_prompts_of_its_rows(kind: str, tokenizer: Any, expected: list[Any]) -> None:
    assert both(load_prompts(config(), tokenizer, train_dataset=as_objects(kind))) == expected


def test_an_endless_generator_is_read_as_far_as_the_config_says(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield {"prompt": f"{number}?"}
            number += 1

    train, held_out = load_prompts(config(num_train_prompts=20), tokenizer, train_dataset=endless())
    assert sorted(int(p.text[:-1]) for p in train + held_out) == list(range(22))
    assert "first 22 rows are used, and it has more" in caplog.text


def test_the_eval_split_of_a_dataset_dict_is_held_out(tokenizer: Any) -> None:
    train_rows, test_rows = ROWS[:7], ROWS[7:]
    splits = datasets.DatasetDict(
        learn=datasets.Dataset.from_list(train_rows), test=datasets.Dataset.from_list(test_rows)
    )
    given = config(dataset_split="learn", dataset_eval_split="test", num_eval_prompts=3)
    train, held_out = load_prompts(given, tokenizer, train_dataset=splits)
    assert [p.row for p in train] == train_rows
    assert [p.row for p in held_out] == test_rows


def test_a_folder_laid_out_like_a_hub_dataset_loads_by_name_configuration_and_splits(
    tmp_path: Path, tokenizer: Any
) -> None:
    for split, rows in (("train", gsm8k_rows(9)), ("test", gsm8k_rows(12)[9:])):
        (tmp_path / "socratic").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "socratic" / f"{split}.jsonl", rows)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: socratic/train.jsonl}\n  - {split: test, path: socratic/test.jsonl}\n---\n"
    )
    given = config(
        dataset_name=str(tmp_path),
        dataset_config="main",
        dataset_split="train[:6]",
        dataset_eval_split="test",
        prompt_column="question",
        num_eval_prompts=10,
    )
    train, held_out = load_prompts(given, tokenizer)
    assert [p.row for p in train] == gsm8k_rows(6)
    assert [p.row for p in held_out] == gsm8k_rows(12)[9:]


def stream_folder(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A dataset in the hub's layout: of each split a file of these rows, and one after it that is no JSON."""
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}-0.jsonl", rows)
        (folder / f"{split}-1.jsonl").write_text("this is no row\n")
        card += [f"  - split: {split}", f"    path: [{split}-0.jsonl, {split}-1.jsonl]"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def test_of_a_streamed_dataset_the_first_rows_are_used_and_the_rest_is_not_fetched(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The second file of each split could not be read."""
    rows = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(30)]
    sizes = {"num_train_prompts": 20, "num_eval_prompts": 4}
    given = {"dataset_name": str(stream_folder(tmp_path, train=rows, test=rows[20:])), **sizes}
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_prompts(config(**given), tokenizer)
    streamed = config(**given, dataset_streaming=True)
    train, held_out = load_prompts(streamed, tokenizer)
    assert sorted(p.row["answer"] for p in train + held_out) == [2 * i for i in range(24)]
    assert len(held_out) == 4
    assert "[train] the first 24 rows are used, and it has more; num_train_prompts sets" in caplog.text
    assert check_data(streamed, read_hub=True) == ["prompt", "answer"]
    train, held_out = load_prompts(config(**given, dataset_streaming=True, dataset_eval_split="test"), tokenizer)
    assert [p.row for p in train] == rows[:20]
    assert [p.row for p in held_out] == rows[20:24]
    assert "[test] the first 4 rows are used, and it has more; num_eval_prompts sets" in caplog.text


def test_a_stream_that_ends_before_its_rows_are_enough_says_how_many_there_are(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:7])
    given = config(dataset_name=str(tmp_path), dataset_streaming=True, num_eval_prompts=8)
    with pytest.raises(ConfigError, match=r"\[train\] has 7 usable rows, and 8 held-out prompts"):
        load_prompts(given, tokenizer)


def test_a_streamed_row_that_cannot_be_read_is_refused_as_any_other(tmp_path: Path, tokenizer: Any) -> None:
    given = config(dataset_name=str(stream_folder(tmp_path, train=ROWS[:5])), dataset_streaming=True)
    with pytest.raises(ConfigError, match=r"\[train\] cannot be loaded: .*JSON"):
        load_prompts(given, tokenizer)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data_files": "rows.jsonl"}, "no data.dataset_name is given"),
        ({"task": "sort_letters"}, "no data.dataset_name is given"),
        ({"dataset_name": "a/b", "dataset_split": "train[:10]"}, r"dataset_split is 'train\[:10\]'.*plain name"),
        ({"dataset_name": "a/b", "dataset_eval_split": "test[10%:]"}, r"dataset_eval_split is 'test\[10%:\]'"),
        ({"dataset_name": "a/b", "dataset_split": "train+test"}, r"dataset_split is 'train\+test'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_anything_is_read(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_data(config(dataset_streaming=True, **changes))


def test_a_changed_file_of_a_folder_with_a_card_is_read_anew(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: rows.jsonl}\n---\n"
    )
    given = config(dataset_name=str(tmp_path), num_eval_prompts=0)
    for rows in (ROWS[:5], ROWS[5:]):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        assert [p.row for p in load_prompts(given, tokenizer)[0]] == rows


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path, tokenizer: Any) -> None:
    for name, rows in (("b", ROWS[3:6]), ("a", ROWS[:3]), ("z", ROWS[6:])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / "[ab].jsonl"), str(tmp_path / "z.jsonl")]
    train, held_out = load_prompts(config(data_files=files, num_eval_prompts=0), tokenizer)
    assert [p.row for p in train] == ROWS
    assert held_out == []


def test_a_task_gives_distinct_rows_that_no_set_shares(tokenizer: Any) -> None:
    given = config(task="sort_letters", num_train_prompts=50, num_eval_prompts=20, seed=3)
    train, held_out = load_prompts(given, tokenizer)
    rows = sort_letters.prompts(3, 70)
    assert [p.row for p in train] == rows[:50]
    assert [p.row for p in held_out] == rows[50:]
    assert len({p.ids for p in train + held_out}) == 70


def test_task_options_reach_the_task(tokenizer: Any) -> None:
    given = config(task="sort_letters", task_options={"max_length": 3}, num_train_prompts=30)
    assert {len(p.row["letters"]) for p in load_prompts(given, tokenizer)[0]} == {2, 3}


def test_demonstrations_answer_the_training_prompts_and_no_held_out_one(tokenizer: Any) -> None:
    given = config(
        task="sort_letters", num_train_prompts=40, num_eval_prompts=30, warm_start_options={"noise": 0.5}, seed=1
    )
    shown = task_demonstrations(given)
    for eval_dataset in (None, ROWS):
        train, _ = load_prompts(given, tokenizer, eval_dataset=eval_dataset)
        assert [row["prompt"] for row in shown] == [p.text for p in train]


def test_gsm8k_answers_are_extracted_and_score_full_marks(gsm8k: str, tokenizer: Any) -> None:
    given = config(
        data_files=gsm8k,
        prompt_template="{question}\nAnswer:",
        columns={"solution": "answer"},
        extract={"answer": r"####\s*(.+)"},
        num_eval_prompts=4,
    )
    train, held_out = load_prompts(given, tokenizer)
    assert len(train) == 8
    assert len(held_out) == 4
    for prompt in train + held_out:
        crates = int(prompt.row["question"].split()[8])
        assert prompt.text == f"{prompt.row['question']}\nAnswer:"
        assert prompt.row["answer"] == f"{617 * crates:,}"
        assert prompt.row["solution"].startswith("One crate holds")
        assert number_match(f"So it is {617 * crates}", **prompt.row) == 1.0
    assert check_data(given) == ["question", "answer", "solution"]


def test_a_pattern_for_a_new_name_leaves_the_column_it_comes_from_as_it_is(tokenizer: Any) -> None:
    rows = [{"prompt": f"{i}", "text": f"so #### {i} "} for i in range(4)]
    given = config(columns={"answer": "text"}, extract={"answer": "####(.+)"}, num_eval_prompts=0)
    train, _ = load_prompts(given, tokenizer, train_dataset=rows)
    assert train[3].row == {"prompt": "3", "text": "so #### 3 ", "answer": "3"}


def test_a_column_that_some_rows_lack_is_none_there(tokenizer: Any) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "hint": "x"}]
    train, _ = load_prompts(config(num_eval_prompts=0), tokenizer, train_dataset=rows)
    assert [p.row["hint"] for p in train] == [None, "x"]


def test_lists_stand_in_a_template_as_python_writes_them(tokenizer: Any) -> None:
    rows = [{"nums": [1, 2], "target": t, "aim": 0.5} for t in range(3)]
    given = config(prompt_template="{{{nums}}} -> {target} by {aim}", num_eval_prompts=0)
    assert load_prompts(given, tokenizer, train_dataset=rows)[0][2].text == "{[1, 2]} -> 2 by 0.5"


def test_the_fingerprint_is_of_content_and_order(tokenizer: Any) -> None:
    train, _ = load_prompts(config(num_eval_prompts=0), tokenizer, train_dataset=ROWS)
    again, _ = load_prompts(config(num_eval_prompts=0), tokenizer, train_dataset=datasets.Dataset.from_list(ROWS))
    changed = [*ROWS[:-1], {**ROWS[-1], "answer": -1}]
    other, _ = load_prompts(config(num_eval_prompts=0), tokenizer, train_dataset=changed)
    assert fingerprint(train) == fingerprint(again)
    assert len({fingerprint(train), fingerprint(train[::-1]), fingerprint(train[1:]), fingerprint(other)}) == 4


def test_the_fingerprint_of_odd_values_holds_no_memory_address() -> None:
    class Odd:
        pass

    def prints(value: Any) -> str:
        return fingerprint([Prompt(0, "a", None, (1,), {"value": value})])

    assert prints(Odd()) == prints(Odd())
    assert prints(b"a") != prints(b"b")
    assert prints({"b", "a"}) == prints({"a", "b"}) != prints({"a"})


def test_checking_local_data_imports_no_heavy_package(tmp_path: Path) -> None:
    files = [write(kind, tmp_path) for kind in ("jsonl", "parquet")]
    code = (
        "import sys, llm_pg.prompts\n"
        "from llm_pg.prompts import check_data\n"
        "from llm_pg.config import load_config\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl'}\n"
        "small = ['num_eval_prompts=2', 'prompts_per_step=2']\n"
        f"for given in (['data_files=' + str({files!r})], ['task=countdown']):\n"
        "    check_data(load_config(None, given + small))\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.faults
def test_a_split_of_a_hub_folder_is_read_although_another_has_other_columns(tmp_path: Path) -> None:
    """`datasets` prepares all splits with one schema, and said only that an error occurred."""
    rows = {
        "train": [{"prompt": f"{i}", "answer": i} for i in range(6)],
        "test": [{"problem": "1", "gold": 1, "id": 2}],
    }
    for split, each in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))

    def read(split: str) -> list[dict[str, Any]]:
        return read_hub(DataConfig(dataset_name=str(tmp_path)), split, 1, "num_train_prompts").rows

    for split, each in rows.items():
        assert read(split) == each
    assert read("train[2:4]") == rows["train"][2:4]
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*JSON"):
        read("test")
