"""What is held out is never trained on and is a function of the seed; long prompts are never cut in silence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.config import ConfigError
from llm_pg.prompts import load_held_out, load_prompts

from .conftest import config

ROWS = [{"prompt": f"question {i}", "number": i} for i in range(30)]


def numbers(prompts: list[Any]) -> list[int]:
    return [p.row["number"] for p in prompts]


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=2), max_size=30).map(lambda texts: [*texts, *"vwxyz"]),
    seed=st.integers(0, 1000),
    wanted=st.integers(1, 3),
)
def test_no_held_out_prompt_is_ever_trained_on(tokenizer: Any, texts: list[str], seed: int, wanted: int) -> None:
    rows = [{"prompt": text, "number": i} for i, text in enumerate(texts)]
    train, held_out = load_prompts(config(seed=seed, num_eval_prompts=wanted), tokenizer, train_dataset=rows)
    assert len(held_out) == wanted
    assert {p.text for p in train}.isdisjoint({p.text for p in held_out})
    assert set(numbers(train)) == {i for i, text in enumerate(texts) if text not in {p.text for p in held_out}}


def test_the_split_is_a_function_of_the_seed(tokenizer: Any) -> None:
    held = {
        seed: numbers(load_prompts(config(seed=seed, num_eval_prompts=8), tokenizer, train_dataset=ROWS)[1])
        for seed in (0, 0, 1, 2)
    }
    assert held[0] == numbers(load_prompts(config(num_eval_prompts=8), tokenizer, train_dataset=iter(ROWS))[1])
    assert len({tuple(chosen) for chosen in held.values()}) == 3


def test_both_sets_keep_the_order_of_the_data_and_count_from_0(tokenizer: Any) -> None:
    train, held_out = load_prompts(config(num_eval_prompts=8), tokenizer, train_dataset=ROWS)
    for prompts in (train, held_out):
        assert numbers(prompts) == sorted(numbers(prompts))
        assert [p.index for p in prompts] == list(range(len(prompts)))
    assert sorted(numbers(train) + numbers(held_out)) == list(range(30))


def test_a_given_evaluation_set_is_sampled_evenly_and_the_same_for_every_seed(tokenizer: Any) -> None:
    tests = [{"prompt": f"test {i}", "number": i} for i in range(10)]
    for seed in (0, 5):
        given = config(seed=seed, num_eval_prompts=4)
        train, held_out = load_prompts(given, tokenizer, train_dataset=ROWS, eval_dataset=tests)
        assert numbers(held_out) == [0, 2, 5, 7]
        assert len(train) == 30


def test_the_held_out_set_alone_is_that_of_the_whole(tokenizer: Any) -> None:
    tests = [{"prompt": f"test {i}", "number": i} for i in range(10)]
    given = config(num_eval_prompts=4)
    _, held_out = load_prompts(given, tokenizer, train_dataset=ROWS, eval_dataset=tests)
    assert load_held_out(given, tokenizer, eval_dataset=tests) == held_out
    task = config(task="sort_letters", num_train_prompts=20, num_eval_prompts=5)
    assert load_held_out(task, tokenizer) == load_prompts(task, tokenizer)[1]


def test_an_evaluation_set_that_overlaps_the_training_set_is_warned_of(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load_prompts(config(), tokenizer, train_dataset=ROWS, eval_dataset=ROWS[:2])
    assert "2 of 2 held-out prompts are in the training set too" in caplog.text


def test_rows_of_a_task_that_read_the_same_are_refused(tokenizer: Any) -> None:
    given = config(task="countdown", prompt_template="Reach {target}.", num_train_prompts=300, num_eval_prompts=50)
    with pytest.raises(ConfigError, match=r"held-out prompts are in the training set too.*prompt_template"):
        load_prompts(given, tokenizer)


@pytest.mark.faults
@pytest.mark.parametrize(
    "rows, wanted, words",
    [
        ([], 2, "no rows in train_dataset"),
        (ROWS[:1], 2, r"has 1 usable row, and 2 held-out prompts \(num_eval_prompts\) \+ 2 for one step = 4"),
        (ROWS[:3], 2, r"has 3 usable rows.*= 4 are needed"),
        (ROWS[:1], 0, "One step needs 2 prompts, and 1 is left"),
        ([ROWS[0]] * 9, 1, "One step needs 2 prompts, and 0 are left"),
    ],
)
def test_too_little_data_is_refused_with_what_is_needed_and_found(
    tokenizer: Any, rows: list[Any], wanted: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_prompts(config(num_eval_prompts=wanted), tokenizer, train_dataset=rows)


LONG = [{"prompt": "x" * length, "number": length} for length in (5, 80, 9, 90, 6, 7, 8)]


@pytest.mark.faults
def test_a_prompt_over_the_context_is_refused_with_row_and_arithmetic(tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as error:
        load_prompts(config(max_completion_length=36), tokenizer, train_dataset=LONG, context_length=100)
    text = str(error.value)
    assert "2 of 7 prompts are longer than 64 tokens (context 100 - max_completion_length 36)" in text
    assert "row 1 of train_dataset with 81" in text  # 80 characters and the BOS
    assert "longest has 91 (row 3 of train_dataset)" in text


@pytest.mark.faults
def test_longer_prompts_are_dropped_and_counted_where_the_config_says_so(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = config(max_prompt_length=80, long_prompts="drop", num_eval_prompts=1)
    train, held_out = load_prompts(given, tokenizer, train_dataset=LONG)
    assert sorted(numbers(train) + numbers(held_out)) == [5, 6, 7, 8, 9]
    assert "Dropped: 2 of 7 prompts are longer than 80 tokens (max_prompt_length)" in caplog.text


def test_a_prompt_of_exactly_the_limit_stays(tokenizer: Any) -> None:
    train, _ = load_prompts(config(max_prompt_length=91, num_eval_prompts=0), tokenizer, train_dataset=LONG)
    assert max(len(p.ids) for p in train) == 91


@pytest.mark.faults
def test_dropping_every_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="7 of 7 prompts are longer than 4 tokens"):
        load_prompts(config(max_prompt_length=4, long_prompts="drop"), tokenizer, train_dataset=LONG)


@pytest.mark.faults
@pytest.mark.parametrize(
    "values, words",
    [
        ({"max_completion_length": 64}, "max_completion_length 64 leaves no room for a prompt in the model's context"),
        ({"max_completion_length": 32, "max_prompt_length": 33}, "33 .* 32 = 65 tokens, and the model's context is 64"),
    ],
)
def test_lengths_that_cannot_fit_the_context_are_refused(tokenizer: Any, values: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_prompts(config(**values), tokenizer, train_dataset=ROWS, context_length=64)
