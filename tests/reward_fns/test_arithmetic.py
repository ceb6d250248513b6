"""Sums and differences asked for in words."""

import pytest

from reward_fns.arithmetic import prompts


def test_each_row_asks_for_one_sum_or_difference_and_holds_its_value():
    rows = prompts(0, 2000, low=1, high=60)
    assert len({row["prompt"] for row in rows}) == 2000
    for row in rows:
        a, sign, b = row["expression"].split()
        value = {"+": int(a) + int(b), "-": int(a) - int(b)}[sign]
        assert row["prompt"] == f"Compute {a} {sign} {b}. Give the final answer after ####."
        assert row["answer"] == str(value)
        assert value >= 0
        assert 1 <= min(int(a), int(b)) <= max(int(a), int(b)) <= 60


def test_every_expression_there_is_can_be_asked_for_and_not_one_more():
    count = 5 * 5 + 5 * 6 // 2  # ordered pairs for sums; for differences those with a >= b
    assert len({row["expression"] for row in prompts(0, count, low=3, high=7)}) == count
    with pytest.raises(ValueError, match=f"asked for {count + 1} distinct expressions, and only {count} exist"):
        prompts(0, count + 1, low=3, high=7)


def test_rows_are_a_function_of_the_seed_and_another_seed_gives_others():
    assert prompts(1, 100) == prompts(1, 100) != prompts(2, 100)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"low": 9, "high": 3}, "got 9 and 3"),
        ({"low": -1}, "got -1 and 99"),
        ({"operators": "*"}, r"operators is .* got '\*'"),
        ({"operators": ""}, "got ''"),
        ({"template": "Compute."}, r"the field \{expression\}"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        prompts(0, 10, **options)
