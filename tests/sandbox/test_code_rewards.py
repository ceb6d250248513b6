"""`reward_fns.code`: finding the program, credit by tests, the stated floor, and a sandbox that is down."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from llm_pg import sandbox
from llm_pg.rewards import Scorer
from reward_fns.code import code_tests, extract_code, read_suite
from reward_fns.registry import rewards

ADD = "Here it is.\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
ASSERTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
CASES = [
    {"args": [1, 2], "expected": 3},
    {"args": [[1], [2]], "expected": [1, 2]},
    {"args": [0.1, 0.2], "expected": 0.3},
]
DOUBLE = "```python\nprint(int(input()) * 2)\n```"
PAIRS = [{"input": "1\n", "output": "2\n"}, {"input": "4", "output": "8"}, {"input": "2", "output": "4"}]


def test_each_kind_of_test_pays_a_right_answer_in_full() -> None:
    assert code_tests(ADD, ASSERTS) == 1.0
    assert code_tests(ADD, CASES, entry="add") == 1.0
    assert code_tests(DOUBLE, PAIRS) == 1.0
    assert code_tests(DOUBLE, {"inputs": ["1", "4"], "outputs": ["2", "8"]}) == 1.0
    assert code_tests(DOUBLE, json.dumps(PAIRS)) == 1.0


def test_a_humaneval_check_pays_through_its_entry_point() -> None:
    check = "def check(candidate):\n    for n in range(4):\n        assert candidate(n, n) == 2 * n\ncheck(add)"
    assert code_tests(ADD, [check], entry="add") == 1.0
    assert code_tests(ADD.replace("a + b", "a - b"), [check], entry="add") == 0.0


def test_credit_is_the_share_of_tests_above_what_a_constant_passes() -> None:
    table = ["yes", "yes", "no", "0", "1", "2"]
    tests = [f"assert f({number}) == {answer!r}" for number, answer in enumerate(table)]
    for right in (1, 2, 4, 6):
        code = f"def f(n): return {table[:right] + ['?'] * 6}[n]"
        assert code_tests(code, tests) == pytest.approx(max(Fraction(0), Fraction(right - 2, 6 - 2)))
        assert code_tests(code, tests, above_constant=False) == pytest.approx(Fraction(right, 6))
        assert code_tests(code, tests, partial=False) == float(right == 6)


@pytest.mark.faults
def test_no_constant_answer_earns_more_than_the_floor() -> None:
    floor = rewards()["code_tests"].info.floor
    for answer in ("2", "8", "4", ""):
        assert code_tests(f"print({answer!r})", PAIRS) <= floor
    for answer in ("3", "0", "'ab'", "True", "None"):
        assert code_tests(f"def add(*_): return {answer}", ASSERTS) <= floor
        assert code_tests(f"def add(*_): return {answer}", CASES, entry="add") <= floor


def test_what_a_constant_passes_is_read_from_the_tests() -> None:
    def constant(*tests: str) -> int:
        return read_suite(tests, "f", "").constant()

    assert constant("assert f(1) == 2", "assert 2 == f(3)", "assert f(4) == 5") == 2
    assert constant("assert f(1)", "assert f(2) is True", "assert not f(3)", "assert f(4) == True") == 3
    assert constant("assert abs(f(1) - 2) < 1", "for x in range(3):\n    assert f(x)") == 0
    assert constant("def check(g):\n    assert g(1) == 2\n    assert g(2) == 2\n    assert g(3) == 1") == 2


def test_tests_that_one_answer_passes_are_refused_unless_asked_for() -> None:
    pairs = [{"input": "1", "output": "yes"}, {"input": "2", "output": "yes\n"}]
    with pytest.raises(ValueError, match="same answer"):
        code_tests("print('yes')", pairs)
    assert code_tests("print('yes')", pairs, above_constant=False) == 1.0


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("``` Python3\nprint(1)\n```", "print(1)"),
        ("first\n```python\nprint(1)\n```\nthen\n```py\nprint(2)\n```\n", "print(2)"),
        ("```python\nprint(1)\n```\n```json\n{}\n```", "print(1)"),
        ("```json\n{}\n```\nprint(1)", None),
        ("cut off\n```python\nprint(1)\nprint(2", "print(1)\nprint(2"),
        ("<think>\n```python\nprint(1)\n```\n</think>\n```python\nprint(2)\n```", "print(2)"),
        ("<think>\n```python\nprint(1)\n```\n</think>\n", None),
        ("  - item\n    ```python\n    x = 1\n    ```", "    x = 1"),
        ("```python\nx = 'a\u2028b\x0cc'\n```", "x = 'a\u2028b\x0cc'"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\r"),
        ("", None),
        ("```python\n```", None),
        ("x" * 100_001, None),
    ],
)
def test_the_program_is_the_last_block_of_python_after_thinking(completion: str, code: str | None) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "list of tests"),
        ("", "is Python text"),
        ([{"input": 1, "output": "2"}], "'input' and 'output'"),
        ([{"input": "1", "output": " "}], "expects no output"),
        (["assert add(1, 2) == 3", {"input": "1", "output": "2"}], "one kind"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs do not fit 0 outputs"),
        (["assert 1 + 2 == 3"], "entry"),
        (["add(1, 2) == 3"], "asserts nothing"),
        (["assert add(1, 2) == 3", "assert (add(1, 2) == 4"], "not Python"),
        ([{"args": [{1}], "expected": 1}], "what JSON can hold"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(tests: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_tests(ADD, tests)


@pytest.mark.faults
def test_no_work_and_no_payload_earns_anything_or_touches_anything(tmp_path: Path) -> None:
    """Rows S5 and S1 for this reward: the payloads run, and reach nothing."""
    marker = tmp_path / "touched"
    tmp_path.chmod(0o777)
    payloads = [
        f"__import__('os').system('touch {marker}')",
        f"exec(\"open('{marker}', 'w')\")",
        f"(lambda: open('{marker}', 'w'))()",
        f"[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', '{marker}'])",
        f"!!python/object/apply:os.system ['touch {marker}']",
        "94**56**35",
        "(" * 200 + ")" * 200,
        "[" * 50_000,
        "",
        "lorem ~~ 0x7f qwer; asdf ...",
        "2 8 4 3 0 ab yes no",
        "print(2, 8, 4)",
        "assert add(1, 2) == 3\nassert add(-1, 1) == 0",
        "1 " * 40_000,
    ]
    for payload in payloads:
        assert code_tests(payload, PAIRS[:2], seconds=1, workers=2) == 0.0
        assert code_tests(f"```python\n{payload}\n```", ASSERTS[:2], seconds=1) == 0.0
        assert not marker.exists()


@pytest.mark.faults
def test_in_reward_workers_a_sandbox_that_is_down_leaves_completions_unscored(tmp_path: Path) -> None:
    """Row W9, through the pool: None, counted by cause, and never 0."""
    rows = [{"tests": json.dumps(PAIRS)}] * 3
    with Scorer(["code_tests"], max_unscorable=1.0) as scorer:
        healthy = scorer.grade(["?"] * 3, [DOUBLE, "print(1)", "junk"], [[0]] * 3, rows)
    assert healthy.reward == [1.0, 0.0, 0.0]
    broken = tmp_path / "broken_sandbox.py"
    broken.write_text(
        "from llm_pg.sandbox import launch\n"
        "from reward_fns.code import code_tests as inner\n"
        "launch.HERE = '/nonexistent'\n"
        "def score(completion, tests, **row):\n"
        "    return inner(completion, tests)\n"
    )
    with Scorer([f"{broken}:score"], max_unscorable=1.0) as scorer:
        down = scorer.grade(["?"] * 3, [DOUBLE, "print(1)", "junk"], [[0]] * 3, rows)
    assert down.reward == [None, None, None]
    assert sum(next(iter(down.problems.values())).values()) == 3
    assert any(cause.startswith("Sandbox") for cause in next(iter(down.problems.values())))


def test_the_reward_is_registered_with_its_facts() -> None:
    shipped = rewards()["code_tests"]
    assert (shipped.info.low, shipped.info.high, shipped.info.floor, shipped.info.checks) == (0.0, 1.0, 0.0, "answer")
    assert sandbox.level().contained or sandbox.level().reason
