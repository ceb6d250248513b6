"""Exact match and number match, and the reader of the final answer they share."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns.reading.final_answer import final_answer
from reward_fns.text import exact_match, given_number, number_match

REAL = Path(os.environ.get("LLM_PG_REAL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL} (LLM_PG_REAL_DATA)")


@pytest.mark.parametrize(
    "text, number",
    [
        ("72", "72"),
        ("it costs $1,234.50 in all.", "1234.50"),
        ("12,345,678", "12345678"),
        ("x = -5", "-5"),
        ("10-7=3", "3"),
        ("−7", "-7"),
        ("(-3)", "-3"),
        ("1e5", "100000"),
        (".5", "0.5"),
        ("72%", "72"),
        ("3 then 4.", "4"),
        ("#### 18", "18"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text, number):
    quantity = given_number(text)
    assert quantity is not None
    assert quantity.value == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", ".", "-", "9" * 61, "NaN", "inf", "∞", "1,2,3", "5-3", "3 4"])
def test_what_is_no_number_is_none(text):
    assert given_number(text) is None


@settings(deadline=None, max_examples=50)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12), st.text())
def test_any_decimal_after_any_text_is_found(number, text):
    quantity = given_number(f"{text.replace('<', '')}\n= {number:,}")
    assert quantity is not None
    assert quantity.value == Fraction(number)


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


def test_a_list_of_numbers_is_no_answer():
    assert number_match("1 2 3 4 5", answer=3) == 0.0
    assert number_match("1 2 3 4 5", answer=5) == 0.0
    assert number_match("3 boxes of 24 make 72", answer=72) == 1.0


@real_data
@pytest.mark.faults
def test_all_labels_of_gsm8k_model_solutions_are_agreed_with():
    """5,276 solutions by four models, each with the verdict of the data set's authors."""
    rows = [json.loads(line) for line in (REAL / "gsm8k_model_solutions.jsonl").open()]
    solutions = [(row["ground_truth"], value) for row in rows for value in row.values() if isinstance(value, dict)]
    assert len(solutions) == 5_276
    wrong = [s for gold, s in solutions if number_match(s["solution"], gold) != float(s["is_correct"])]
    assert wrong == []


@real_data
@pytest.mark.parametrize("name, count", [("gsm8k_test", 1_319), ("gsm8k_train", 7_473)])
def test_every_gold_solution_of_gsm8k_earns_its_own_answer(name, count):
    answers = [json.loads(line)["answer"] for line in (REAL / f"{name}.jsonl").open()]
    assert len(answers) == count
    assert all(number_match(text, text.partition("####")[2]) == 1.0 == number_match(text, text) for text in answers)


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion, text, form",
    [
        ("<think>The answer is 5?</think>\nIt is 7.", "It is 7.", "text"),
        ("<think>5</think><answer>7</answer>", "7", "tag"),
        ("5</think>\n\n**Answer:** 7", "7", "said"),
        ("<reasoning>\\boxed{5}</reasoning> \\boxed{7}", "7", "box"),
        ("[THINK]5[/THINK]7", "7", "text"),
        ("<think>It is 5, or", "", "none"),
        ("<think>a</think>7<think>still", "", "none"),
        ("<answer>5</answer> no, <answer>7</answer>", "7", "tag"),
        ("<ANSWER> 7", "7", "tag"),
        ("<answer>\\boxed{7}</answer>", "7", "tag"),
        ("<answer>$7$</answer>", "7", "tag"),
        ("\\boxed{5} <answer>7</answer>", "7", "tag"),
        ("<answer>5</answer> \\boxed{7}", "7", "box"),
        ("\\boxed 7", "7", "box"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}", "box"),
        ("#### 7\n\nI hope this helps with your 3 questions!", "7", "hashes"),
        ("#### Step 2\nSo 3 + 4 = 7\n**The answer is 7**", "7", "said"),
        ("#### Paris", "Paris", "hashes"),
        ("The answer is **73**.", "73.", "said"),
        ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}", "said"),
        ("The answer is 5. Wait, it is 7.", "The answer is 5. Wait, it is 7.", "text"),
        ("The answer is 7. Check: 3 + 4 = 7, of 10.", "7.", "said"),
        ("## Answer:\n\n7", "7", "said"),
        ("A: 7", "7", "said"),
        ("", "", "text"),
        ("<answer></answer>", "", "tag"),
    ],
)
def test_the_final_answer_is_read_after_the_thinking_in_the_last_form(completion, text, form):
    found = final_answer(completion)
    assert (found.text, found.form) == (text, form)


@pytest.mark.parametrize("form, value", [("any", 1.0), ("marked", 1.0), ("box", 1.0), ("tag", 0.0), ("hashes", 0.0)])
def test_a_form_that_is_asked_for_is_the_only_one_read(form, value):
    assert number_match("It is \\boxed{7}.", 7, form=form) == value
    assert number_match("It is 7.", 7, form=form) == float(form == "any")


def test_a_form_that_is_none_is_refused():
    with pytest.raises(ValueError, match="form is one of any, marked, tag, box, hashes; got 'boxed'"):
        number_match("7", 7, form="boxed")


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion", ["The answer is **73**.", "**73**", "__73__", "`73`", "$73$", "\\(73\\)", "### 73", "*73*", "> 73"]
)
def test_markdown_around_a_number_is_no_part_of_it(completion):
    assert number_match(completion, 73) == 1.0


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
    assert exact_match("<think>Rome?</think>\n**Paris**", answer="Paris") == 1.0
    assert exact_match("<think>Paris</think>\nRome", answer="Paris") == 0.0
    assert exact_match("<answer>Paris</answer>", answer="Paris") == 1.0
    assert exact_match("The answer is Paris", answer="Paris") == 0.0


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_an_empty_answer_is_refused_because_nothing_would_earn_it(answer):
    with pytest.raises(ValueError, match="must not be empty"):
        exact_match("", answer=answer)
