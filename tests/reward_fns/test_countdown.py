"""Countdown: puzzles that can be solved, arithmetic that cannot be abused."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns.countdown import countdown, demonstrations, evaluate, prompts


def reachable(numbers):
    """All values of expressions over all the numbers, by taking any two and putting each result in their place."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
                for c in [a + b, a - b, a * b] + ([a / b] if b else []):
                    values |= reachable([*rest, c])
    return values


@pytest.mark.parametrize("options", [{}, {"num_numbers": 2}, {"num_numbers": 4, "high": 20}, {"operators": "+-"}])
def test_every_puzzle_has_a_solution_by_enumeration(options):
    for row in prompts(3, 12, **options):
        assert row["target"] in reachable([Fraction(number) for number in row["numbers"]])
        assert row["target"] not in row["numbers"]
        assert row["prompt"] == f"{' '.join(map(str, row['numbers']))} -> {row['target']}:"


def test_puzzles_are_distinct_whatever_the_order_of_their_numbers():
    rows = prompts(0, 1500)
    assert len({(tuple(sorted(row["numbers"])), row["target"]) for row in rows}) == 1500


def test_puzzles_and_demonstrations_are_functions_of_the_seed():
    assert prompts(1, 50) == prompts(1, 50) != prompts(2, 50)
    assert demonstrations(1, 50, noise=0.5) == demonstrations(1, 50, noise=0.5)


def test_demonstration_i_solves_puzzle_i():
    rows, shown = prompts(5, 300), demonstrations(5, 300)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in shown]
    assert {countdown(d["completion"], **r) for r, d in zip(rows, shown, strict=True)} == {1.0}


@pytest.mark.parametrize("operators", ["+-*/", "+"])
def test_a_share_noise_of_the_demonstrations_is_wrong(operators):
    rows, shown = (
        prompts(5, 200, num_numbers=4, operators=operators),
        demonstrations(5, 200, noise=0.4, num_numbers=4, operators=operators),
    )
    right = sum(countdown(d["completion"], **r) for r, d in zip(rows, shown, strict=True))
    assert abs(right - 120) < 4 * (200 * 0.4 * 0.6) ** 0.5


def test_more_puzzles_than_there_are_is_refused_with_the_count():
    with pytest.raises(ValueError, match=r"asked for 100 distinct puzzles and found \d+ for 2 numbers from 1 to 3"):
        prompts(0, 100, num_numbers=2, high=3)


@pytest.mark.parametrize("options", [{"num_numbers": 1}, {"low": 0}, {"low": 5, "high": 4}, {"operators": "^"}])
def test_settings_without_puzzles_are_refused(options):
    with pytest.raises(ValueError, match="countdown needs"):
        prompts(0, 1, **options)


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion",
    [
        "3×5+7",
        "3·5+7",
        "3∗5+7",
        "3⋅5 + 7",
        "3 x 5 + 7",
        "$3*5+7$",
        "`3*5+7`",
        "**3*5+7**",
        "3*5+7.",
        "22 = 3*5+7",
        "3*5+7 = 15+7 = 22",
        "$3 \\times 5 + 7 = 22$",
        "\\boxed{3 \\cdot 5 + 7}",
        "\\[\\left(3 \\times 5\\right) + 7\\]",
        "[3*5]+7",
        "The answer is 3*5+7.",
        "#### 3*5+7",
        "<think>3+5+7 = 15, no.</think>\n3*5+7",
        "```\n<answer>3*5+7</answer>\n```",
    ],
)
def test_an_expression_is_read_as_people_and_latex_write_it(completion):
    assert countdown(completion, [3, 5, 7], 22) == 1.0
    assert countdown(completion, [3, 5, 7], 23) == 0.0
    assert countdown(completion, [3, 5, 8], 22) == 0.0


@pytest.mark.faults
@pytest.mark.parametrize("completion", ["8÷2−1", "8/2-1", "\\frac{8}{2} - 1", "8 ⁄ 2 – 1", "3 = 8 \\div 2 - 1"])
def test_division_and_minus_are_read_in_unicode_and_latex(completion):
    assert countdown(completion, [1, 2, 8], 3) == 1.0


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion",
    ["22 = 22", "22", "3*5+7 = 22 = 23", "3*5+7 or 3+5+7", "3*5+7 = 22 apples", "x = 3*5+7", "3*5+7\n3+5+7"],
)
def test_an_equation_counts_where_every_side_is_the_target(completion):
    assert countdown(completion, [3, 5, 7], 22) == 0.0


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("3*5+7", 1.0),
        ("7 + (5 * 3)", 1.0),
        ("3*5+7=22", 1.0),
        ("3*5+7=23", 0.0),
        ("Let me see.\n3*5+7", 1.0),
        ("<think>3+5</think><answer>3*5+7</answer>", 1.0),
        ("<answer>3*5+7</answer><answer>3+5</answer>", 0.0),
        ("22", 0.0),
        ("3*5", 0.0),
        ("3*5+7+0", 0.0),
        ("3*5+7*1", 0.0),
        ("35-7-3-3", 0.0),
        ("3**5", 0.0),
        ("3//5", 0.0),
        ("-3*5+7", 0.0),
        ("3*5+7)", 0.0),
        ("3 5 7", 0.0),
        ("(3*5+7).real", 0.0),
        ("3*5+7#", 0.0),
        ("٣*5+7", 0.0),
        ("7/(5-5)+3", 0.0),
        ("", 0.0),
    ],
)
def test_the_expression_must_use_each_number_once_and_reach_the_target(completion, reward):
    assert countdown(completion, numbers=[3, 5, 7], target=22) == reward


def test_a_part_of_the_numbers_is_enough_on_request():
    assert countdown("3*5", numbers=[3, 5, 7], target=15) == 0.0
    assert countdown("3*5", numbers=[3, 5, 7], target=15, use_all=False) == 1.0
    assert countdown("3*3+6", numbers=[3, 5, 7], target=15, use_all=False) == 0.0


def test_columns_of_the_wrong_type_are_refused():
    with pytest.raises(ValueError, match="whole numbers and a target"):
        countdown("3+5", numbers="3 5", target=8)
    with pytest.raises(ValueError, match="whole numbers and a target"):
        countdown("3+5", numbers=[3, 5], target="8")


@st.composite
def expressions(draw, depth=4):
    """An expression with its value, computed while it is built."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number)
    (a, x), (b, y) = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    sign = draw(st.sampled_from("+-*/" if y else "+-*"))
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[sign]
    return f"({a}{sign}{b})", value


@settings(deadline=None)
@given(expressions())
def test_the_walker_agrees_with_the_value_known_from_building(expression):
    text, value = expression
    if len(text) <= 200 and text.count("(") <= 20:
        assert evaluate(text)[0] == value


@pytest.mark.faults
@pytest.mark.parametrize(
    "text",
    [
        "94**56**35",
        "(" * 200 + "1" + ")" * 200,
        "(" * 21 + "1" + ")" * 21,
        "9999999",
        "1" * 201,
        "__import__('os')",
        "1+" * 90,
        "1 if 1 else 2",
        "1\n+2",
        "1_0",
        "1e5",
        "0x1",
        "1.5",
        "1j",
    ],
)
def test_what_is_out_of_bounds_is_refused_unread(text):
    with pytest.raises(ValueError):
        evaluate(text)
