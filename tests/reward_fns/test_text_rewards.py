"""Exact match and number match."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns.text import exact_match, last_number, number_match


@pytest.mark.parametrize(
    "text, number",
    [
        ("72", "72"),
        ("it costs $1,234.50 in all.", "1234.50"),
        ("12,345,678", "12345678"),
        ("x = -5", "-5"),
        ("10-7=3", "3"),
        ("5-3", "3"),
        ("−7", "-7"),
        ("(-3)", "-3"),
        ("1e5", "1E+5"),
        (".5", "0.5"),
        ("72%", "72"),
        ("3 then 4.", "4"),
        ("1,2,3", "3"),
        ("#### 18", "18"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", ".", "-", "9" * 61, "NaN", "inf", "∞", "٣"])
def test_what_is_no_number_is_none(text):
    assert last_number(text) is None


@settings(deadline=None, max_examples=50)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12), st.text())
def test_any_decimal_after_any_text_is_found(number, text):
    assert last_number(f"{text} = {number:,}") == number


@settings(deadline=None, max_examples=50)
@given(st.integers(-(10**40), 10**40))
def test_whole_numbers_are_compared_exactly(number):
    assert number_match(str(number), answer=number) == 1.0
    assert number_match(str(number + 1), answer=number) == 0.0
    assert number_match(str(number), answer=str(number)) == 1.0


def test_tolerance_is_absolute_or_relative_whichever_is_wider():
    assert number_match("3.14", answer=3.14159) == 0.0
    assert number_match("3.14", answer=3.14159, tolerance=0.01) == 1.0
    assert number_match("1010", answer=1000, relative=0.01) == 1.0
    assert number_match("1010.1", answer=1000, relative=0.01) == 0.0


def test_a_gsm8k_answer_is_read_after_its_explanation():
    assert number_match("so 18 in total", answer="She has 16 - 3 - 4 = 9.\n#### 18") == 1.0


def test_a_list_of_numbers_is_one_guess_at_its_end():
    assert number_match("1 2 3 4 5", answer=3) == 0.0
    assert number_match("1 2 3 4 5", answer=5) == 1.0


@pytest.mark.parametrize("answer", ["", None, "none", float("nan"), float("inf"), True])
def test_an_answer_without_a_number_is_refused(answer):
    with pytest.raises(ValueError, match="answer"):
        number_match("5", answer=answer)


def test_exact_match_ignores_white_space_around_and_case_on_request():
    assert exact_match(" Paris\n", answer="Paris") == 1.0
    assert exact_match("paris", answer="Paris") == 0.0
    assert exact_match("paris", answer="Paris", ignore_case=True) == 1.0
    assert exact_match("Paris.", answer="Paris") == 0.0
    assert exact_match("5", answer=5) == 1.0


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_an_empty_answer_is_refused_because_nothing_would_earn_it(answer):
    with pytest.raises(ValueError, match="must not be empty"):
        exact_match("", answer=answer)
