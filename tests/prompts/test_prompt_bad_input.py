"""Bad data and settings: one paragraph that names the place, before anything expensive."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm_pg.config import ConfigError
from llm_pg.prompts import check_data, load_prompts
from llm_pg.prompts.files import read_files

from .conftest import config, write_jsonl

pytestmark = pytest.mark.faults
USER = [{"role": "user", "content": "hi"}]


def complaint(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def has(text: str, *words: str) -> bool:
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    return True


GOOD = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(8)]
ROW_FAULTS: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    ({"prompt": None}, {}, ("missing (None", "'prompt'", "prompt, answer")),
    ({"answer": 4}, {}, ("missing (None", "'prompt'")),
    ({"prompt": "a \ud83d b"}, {}, ("half of a surrogate pair", "at character 2", "'a \\ud83d b'")),
    ({"prompt": ""}, {}, ("blank", "prompt")),
    ({"prompt": " \n"}, {}, ("blank",)),
    ({"prompt": 12}, {}, ("an int (12", "text or a list of messages", "prompt, answer")),
    ({"prompt": {"role": "user", "content": "a"}}, {}, ("a dict",)),
    ({"prompt": USER}, {}, ("a list of messages", "before it are plain text", "data.chat")),
    ({"prompt": []}, {}, ("empty list of messages",)),
    ({"prompt": ["hi"]}, {}, ("Message 0", "role and a content", "'hi'")),
    ({"prompt": [{"role": "user"}]}, {}, ("Message 0", "role and a content")),
    ({"prompt": [*USER, {"role": "user", "content": ["a"]}]}, {}, ("Message 1", "that are text")),
    ({"prompt": "a", "answer": None}, {"prompt_template": "{answer}?"}, ("'answer'", "None", "prompt_template")),
    ({"prompt": "a", "answer": "none"}, {"extract": {"answer": "([0-9]+)"}}, ("'answer'", "does not match", "'none'")),
    ({"prompt": "a", "answer": ["4"]}, {"extract": {"answer": "(.+)"}}, ("'answer'", "a list", "data.extract reads")),
    ({"prompt": "a", "answer": True}, {"extract": {"answer": "(.+)"}}, ("'answer'", "a bool")),
]


@pytest.mark.parametrize("bad, settings, words", ROW_FAULTS)
def test_a_bad_row_is_named_by_number_line_and_column(
    bad: Any, settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path, tokenizer: Any
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*GOOD[:5], bad, *GOOD[5:]])
    given = config(data_files=path, **settings)
    checked = complaint(check_data, given)
    assert has(checked, "row 5 of train.jsonl (line 6)", *words)
    assert complaint(load_prompts, given, tokenizer) == checked


def test_a_field_of_a_csv_file_may_be_as_long_as_a_json_text(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "long.csv").write_text(f"prompt,tests\n1+1=,{long}\n")
    assert read_files([str(tmp_path / "long.csv")], "data.data_files").rows == [{"prompt": "1+1=", "tests": long}]


def test_a_row_is_named_in_the_file_it_comes_from(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / "a.jsonl", GOOD[:4]), str(tmp_path / "b.jsonl")]
    Path(files[1]).write_text('\n{"prompt": "1"}\n\n{"prompt": ""}\n')
    assert has(complaint(check_data, config(data_files=files)), "row 1 of b.jsonl (line 4)")


COLUMN_FAULTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"prompt_column": "promt"}, ("'promt'", "data.prompt_column", "prompt, answer", "Did you mean 'prompt'?")),
    ({"prompt_column": "question"}, ("'question'", "prompt, answer", "data.prompt_template")),
    ({"prompt_template": "{question}?"}, ("'question'", "data.prompt_template", "prompt, answer")),
    ({"columns": {"target": "anwser"}}, ("'anwser'", "data.columns.target", "Did you mean 'answer'?")),
    ({"extract": {"result": "(.)"}}, ("'result'", "data.extract", "prompt, answer")),
]


@pytest.mark.parametrize("settings, words", COLUMN_FAULTS)
def test_a_missing_column_is_named_with_those_present(
    settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", GOOD)
    assert has(complaint(check_data, config(data_files=path, **settings)), "train.jsonl", *words)


SETTING_FAULTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"chat": False, "system_prompt": "be brief"}, ("data.chat is false", "system")),
    ({"extract": {"answer": "(["}}, ("data.extract.answer", "no regular expression")),
    ({"extract": {"answer": "#### .+"}}, ("data.extract.answer", "no group")),
    ({"prompt_template": "a {prompt"}, ("data.prompt_template cannot be read",)),
    ({"prompt_template": "no field"}, ("names no column",)),
    ({"prompt_template": "{prompt.__class__}"}, ("plain name of a column",)),
    ({"prompt_template": "{prompt[0]}"}, ("plain name of a column",)),
    ({"prompt_template": "{prompt:>9}"}, ("plain name of a column", ":>9")),
    ({"prompt_template": "{}"}, ("plain name of a column",)),
]


@pytest.mark.parametrize("settings, words", SETTING_FAULTS)
def test_settings_that_cannot_work_are_refused_before_any_file_is_read(
    settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert has(complaint(check_data, config(data_files="nowhere.jsonl", **settings)), *words)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    text = complaint(check_data, config(data_files=str(tmp_path / "trian.jsonl")))
    assert has(text, "no file", "trian.jsonl", "data.data_files", "Did you mean 'train.jsonl'?")
    assert has(complaint(check_data, config(data_files=str(tmp_path / "no" / "a.csv"))), "nor a folder")
    assert has(complaint(check_data, config(data_files=str(tmp_path))), "is a folder", "train.jsonl")
    assert has(complaint(check_data, config(data_files=str(tmp_path / "*.csv"))), "matches no file")
    assert has(complaint(check_data, config(data_files=[])), "No prompts are given")


FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("a.jsonl", b"", ("no rows in a.jsonl",)),
    ("a.json", b"", ("no rows in a.json",)),
    ("a.json", b"[]", ("no rows in a.json",)),
    ("a.csv", b"prompt,answer\n", ("no rows in a.csv",)),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ("Line 2", "(row 1)", "not JSON")),
    ("a.jsonl", b'{"prompt": "a"}\n["a"]\n', ("row 1 of a.jsonl (line 2)", "a list", "maps columns")),
    ("a.json", b'{"data": [1]}', ("holds a dict", "list of objects")),
    ("a.json", b'[{"prompt": "a"}', ("is not JSON",)),
    ("a.csv", b"prompt,answer\na,1\nb,2,3\n", ("Row 1", "(line 3)", "3 fields", "2: prompt, answer")),
    ("a.csv", b'prompt,answer\n"a\n"\n', ("Row 0", "(line 2)", "1 fields")),
    ("a.csv", b'prompt,answer\n"a\n",1\n\nb\n', ("Row 1", "(line 5)", "1 fields")),
    ("a.csv", b"prompt,prompt\na,1\n", ("'prompt'", "more than once")),
    ("a.csv", b'prompt,answer\n"a"b,1\n', ("Line 2", "not CSV")),
    ("a.jsonl", b'{"prompt": "\xff"}\n', ("not UTF-8",)),
    ("a.parquet", b"PAR1 no", ("cannot be read as Parquet",)),
    ("a.txt", b"a", ("'.txt'", ".jsonl", ".parquet")),
]


@pytest.mark.parametrize("name, content, words", FILES)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(
    name: str, content: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert has(complaint(check_data, config(data_files=str(tmp_path / name))), name, *words)


def test_too_few_rows_are_found_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", GOOD[:3])
    assert has(complaint(check_data, config(data_files=path)), "3 usable rows", "2 for one step = 4")
    given = config(data_files=path, eval_data_files=path, prompts_per_step=4)
    assert has(complaint(check_data, given), "One step needs 4 prompts, and 3 are left")


def test_the_held_out_file_is_checked_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", GOOD)
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    assert has(complaint(check_data, config(data_files=path, eval_data_files=test)), "row 1 of test.jsonl (line 2)")
    hub = config(dataset_name="openai/gsm8k", eval_data_files=test)
    assert has(complaint(check_data, hub), "row 1 of test.jsonl (line 2)")


def test_an_unknown_task_or_option_is_refused_with_the_nearest() -> None:
    text = complaint(check_data, config(task="sort_leters"))
    assert has(text, "'sort_leters'", "arithmetic, countdown, number_guessing,", "Did you mean 'sort_letters'?")
    text = complaint(check_data, config(task="sort_letters", task_options={"max_lenght": 3}))
    assert has(text, "'max_lenght'", "data.task_options", "Did you mean 'max_length'?")
    text = complaint(check_data, config(task="sort_letters", task_options={"max_length": 2}, num_train_prompts=500))
    assert has(text, "cannot make 502 rows", "unsorted ones of 2 to 2 letters")


def test_messages_that_begin_with_a_system_message_and_a_system_prompt_are_refused(tokenizer: Any) -> None:
    rows = [{"prompt": [{"role": "system", "content": "a"}, *USER]}] * 8
    text = complaint(load_prompts, config(system_prompt="b"), tokenizer, train_dataset=rows)
    assert has(text, "row 0 of train_dataset", "system message", "Drop one")
    text = complaint(load_prompts, config(chat=False), tokenizer, train_dataset=[{"prompt": USER}] * 8)
    assert has(text, "data.chat is false", "row 0", "list of messages")


OBJECTS: list[tuple[Any, tuple[str, ...]]] = [
    (7, ("train_dataset is an int", "a list of dicts")),
    ("openai/gsm8k", ("train_dataset is a str", "data.dataset_name")),
    ({"prompt": ["a"]}, ("train_dataset is a dict",)),
    (["a", "b"], ("row 0 of train_dataset is a str", '{"prompt"')),
    ([{1: "a"}], ("named 1", "text")),
    (iter([]), ("no rows in train_dataset",)),
]


@pytest.mark.parametrize("value, words", OBJECTS)
def test_an_object_that_holds_no_rows_is_refused_with_what_would(
    value: Any, words: tuple[str, ...], tokenizer: Any
) -> None:
    assert has(complaint(load_prompts, config(), tokenizer, train_dataset=value), *words)


def test_an_unknown_split_is_refused_with_those_present(tokenizer: Any) -> None:
    splits = datasets.DatasetDict(training=datasets.Dataset.from_list(GOOD))
    text = complaint(load_prompts, config(dataset_split="trainig"), tokenizer, train_dataset=splits)
    assert has(text, "no split 'trainig'", "training", "Did you mean 'training'?")


def test_no_source_and_two_sources_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    assert has(complaint(check_data, config()), "No prompts are given", "data.task", "train_dataset")
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    text = complaint(load_prompts, config(data_files=path), tokenizer, train_dataset=GOOD)
    assert has(text, "train_dataset and data.data_files are both given")
    given = config(data_files=path, eval_data_files=path)
    assert has(complaint(load_prompts, given, tokenizer, eval_dataset=GOOD), "eval_dataset and data.eval_data_files")


def test_a_hub_name_without_a_network_is_refused_within_seconds(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))
    before = datasets.config.HF_HUB_OFFLINE
    start = time.monotonic()
    text = complaint(load_prompts, config(dataset_name="no-one/nothing"), tokenizer)
    assert has(text, "hub cannot be reached", "no-one/nothing [train]", "local cache", "data.data_files")
    assert time.monotonic() - start < 5
    assert before == datasets.config.HF_HUB_OFFLINE


def test_offline_mode_is_respected(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from llm_pg.prompts import hub

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a request was made in offline mode")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.urllib.request, "urlopen", never)
    assert has(complaint(load_prompts, config(dataset_name="no-one/nothing"), tokenizer), "hub cannot be reached")


def test_a_wrong_split_of_a_dataset_by_name_is_refused_with_those_present(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    given = config(dataset_name=str(tmp_path), dataset_split="trian")
    assert has(complaint(load_prompts, given, tokenizer), "cannot be loaded", "trian", "'train'")
    given = config(dataset_name=str(tmp_path / "train.jsonl"))
    assert has(complaint(load_prompts, given, tokenizer), "is a file", "data.data_files")
