"""The letter-sorting task of the quickstart."""

from collections import Counter
from itertools import product

import pytest

from reward_fns.sort_letters import ALPHABET, count_unsorted, demonstrations, prompts, sort_letters


def test_rows_are_distinct_unsorted_and_answered_by_their_sorted_letters():
    rows = prompts(0, 2000)
    assert len({row["prompt"] for row in rows}) == 2000
    for row in rows:
        assert row["prompt"] == f"sort: {row['letters']}="
        assert row["answer"] == "".join(sorted(row["letters"])) != row["letters"]
        assert 2 <= len(row["letters"]) <= 5


def test_rows_are_a_function_of_the_seed():
    assert prompts(1, 100) == prompts(1, 100) != prompts(2, 100)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_count_of_unsorted_words_is_that_of_an_enumeration(length):
    words = product("abcde", repeat=length)
    assert count_unsorted(length, 5) == sum(list(word) != sorted(word) for word in words)


def test_every_word_there_is_can_be_asked_for_and_not_one_more():
    count = count_unsorted(2, 4) + count_unsorted(3, 4)
    assert len({row["letters"] for row in prompts(0, count, max_length=3, alphabet="abcd")}) == count
    with pytest.raises(ValueError, match=f"asked for {count + 1} distinct words, and only {count} unsorted ones"):
        prompts(0, count + 1, max_length=3, alphabet="abcd")


def test_any_cut_of_the_rows_has_the_same_mix_of_lengths():
    rows = prompts(0, 4000)
    first, last = (Counter(len(row["letters"]) for row in part) for part in (rows[:2000], rows[2000:]))
    for length in (3, 4, 5):
        assert abs(first[length] - last[length]) < 5 * (first[length] + last[length]) ** 0.5


def test_demonstration_i_answers_prompt_i_and_a_share_noise_of_them_wrongly():
    rows, shown = prompts(3, 1000), demonstrations(3, 1000, noise=0.3)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in shown]
    right = sum(sort_letters(d["completion"], r["letters"]) for r, d in zip(rows, shown, strict=True))
    assert abs(right - 700) < 4 * (1000 * 0.3 * 0.7) ** 0.5
    assert all(Counter(d["completion"]) == Counter(r["letters"]) for r, d in zip(rows, shown, strict=True))
    clean = demonstrations(3, 1000)
    assert {sort_letters(d["completion"], r["letters"]) for r, d in zip(rows, clean, strict=True)} == {1.0}


def test_few_characters_are_enough_for_the_task():
    characters = {c for row in prompts(0, 500) for c in row["prompt"] + row["answer"]}
    assert characters == set("sort: =") | set(ALPHABET)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"min_length": 1}, "2 <= min_length"),
        ({"min_length": 4, "max_length": 3}, "2 <= min_length"),
        ({"alphabet": ""}, "only 0"),
    ],
)
def test_settings_without_words_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        prompts(0, 1, **options)


@pytest.mark.parametrize("noise", [-0.1, 1.1])
def test_noise_is_a_probability(noise):
    with pytest.raises(ValueError, match="noise is a probability"):
        demonstrations(0, 1, noise=noise)


def test_only_the_sorted_letters_and_nothing_else_are_paid():
    assert sort_letters(" abc\n", letters="cab") == 1.0
    for completion in ("cab", "abc abc", "abcabc", "abc.", "ab", ""):
        assert sort_letters(completion, letters="cab") == 0.0


@pytest.mark.parametrize("letters", ["", None, 3])
def test_a_row_without_letters_is_refused(letters):
    with pytest.raises(ValueError, match="needs a word"):
        sort_letters("", letters=letters)
