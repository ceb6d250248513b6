"""The tools: a calculator that runs nothing, Python that cannot get out, and the episodes they are called in."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg import sandbox
from llm_pg.environments.tools import MOST_CHARACTERS, ToolEnvironment, ToolError, calculator, python

needs_sandbox = pytest.mark.skipif(not sandbox.level().contained, reason="this machine cannot contain code")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=6), st.data())
def test_the_calculator_agrees_with_exact_arithmetic(numbers: list[int], data: st.DataObject) -> None:
    text, exact = str(numbers[0]), Fraction(numbers[0])
    for number in numbers[1:]:
        sign = data.draw(st.sampled_from("+-*"))
        text = f"({text}){sign}{number}"
        exact = {"+": exact + number, "-": exact - number, "*": exact * number}[sign]
    assert calculator(text) == str(exact)


@pytest.mark.parametrize(
    "text, value",
    [
        ("7/2", "3.5"),
        ("7//2", "3"),
        ("-7 % 4", "1"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        (" (1) ", "1"),
        ("1/3", "0.333333333333"),
        ("0**(10**30)", "0"),
        ("-" * 150 + "1", "1"),
    ],
)
def test_the_calculator_reads_arithmetic(text: str, value: str) -> None:
    assert calculator(text) == value


@pytest.mark.faults
@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "x",
        "lambda: 1",
        "[1][0]",
        "'a'*3",
        "True",
        "1 if 1 else 2",
        "1; 2",
        "",
        "\0",
        "1j",
        "9**9**9**9",
        "10**41",
        "1e400",
        "1e39*1e39",
        "1.0000001**(10**30)",
        "2**(2**200)",
        "(-8)**0.5",
        "1/0",
        "0**-1",
        "(" * 150,
        "1<<99",
        "9" * 41,
        "1+" * MOST_CHARACTERS + "1",
        "f'{1}'",
        "(1:=2)",
        "...",
    ],
)
def test_a_hostile_expression_is_refused_at_once(text: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ToolError):
        calculator(text)
    assert time.perf_counter() - begin < 0.5


@needs_sandbox
def test_python_prints_fails_and_forgets() -> None:
    assert python("x = 6\nprint(x * 7)") == "42"
    with pytest.raises(ToolError, match="NameError: name 'x' is not defined"):
        python("print(x)")


@needs_sandbox
@pytest.mark.faults
@pytest.mark.parametrize(
    "code, words",
    [
        ("open('/etc/llm-pg-was-here', 'w')", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "Error"),
        ("import os; os.fork()", "Error"),
        ("print('x' * 10**7)", "output"),
        ("x = 'x' * 10**10", "MemoryError|memory"),
    ],
)
def test_a_hostile_program_gets_nowhere_and_the_model_reads_why(code: str, words: str) -> None:
    with pytest.raises(ToolError, match=words):
        python(code)


def test_the_last_call_of_a_turn_is_answered_and_a_turn_without_one_is_judged() -> None:
    game = ToolEnvironment(reward="number_match", tools=["calculator", "python"])
    game.reset({"answer": "42", "prompt": "6 times 7?"}, 0)
    first = game.step("<calculator>1+1</calculator> no: <calculator>6*7</calculator>")
    assert (first.text, first.reward, first.done) == ("\n<result>42</result>\n", 0.0, False)
    assert game.step("<calculator>1/0</calculator>").text == "\n<result>error: division by zero</result>\n"
    last = game.step("It is 42.")
    assert (last.reward, last.done) == (1.0, True)
    game.reset({"answer": "42"}, 0)
    assert game.step("It is 41.").reward == 0.0


def test_what_a_tool_said_earns_nothing_by_itself() -> None:
    """The judge sees the last turn of the model, never the words of the environment."""
    game = ToolEnvironment(reward="number_match")
    game.reset({"answer": "42"}, 0)
    assert "42" in game.step("<calculator>6*7</calculator>").text
    assert game.step("I do not know.").reward == 0.0


@pytest.mark.parametrize(
    "text", ["<calculator>6*7", "6*7</calculator>", "<python>print(1)</python>", "<calculator></python>"]
)
def test_half_a_call_and_the_call_of_a_tool_that_is_not_there_are_answers(text: str) -> None:
    game = ToolEnvironment(reward="exact_match")
    game.reset({"answer": "42"}, 0)
    assert game.step(text).done


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reward": "number_match", "tools": ["browser"]}, "one or several of calculator, python"),
        ({"reward": "number_match", "tools": []}, "one or several of"),
        ({"reward": "nomber_match"}, "no shipped reward function"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ToolEnvironment(**options)
