"""What is tested is run, and a test that asserts nothing is no test: cases A1 to A4, each with its neighbours."""

import pytest

from llm_pg.sandbox.judging import Terms, judge_calls
from llm_pg.sandbox.reading import free_names, read_test
from reward_fns.code import check_tests, code_tests

RIGHT, WRONG = "def f(x): return x + 1", "def f(x): return None"
TERMS = Terms(seconds=20)

RUN = {
    "a check with an entry": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3",
    "a check that the text calls": "def check(g):\n    assert g(1) == 2\n    assert g(2) == 3\ncheck(f)",
    "a check by another name": "def examine(candidate):\n    assert candidate(1) == 2",
    "test functions": "def test_one():\n    assert f(1) == 2\ndef test_two():\n    y = f(2)\n    assert y == 3",
    "test functions that the main part calls": (
        "def test_one():\n    assert f(1) == 2\nif __name__ == '__main__':\n    test_one()\n    print('all passed')"
    ),
    "assertions in the main part": "if __name__ == '__main__':\n    assert f(1) == 2\n    assert f(2) == 3",
    "a helper that asserts": (
        "def same(a, b):\n    assert a == b, (a, b)\ndef every(cases):\n    for a, b in cases:\n        same(f(a), b)\n"
        "every([(1, 2), (2, 3)])"
    ),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n"
        "    def test_a(self):\n        self.assertEqual(f(self.x), 2)\n    def test_b(self):\n"
        "        assert f(2) == 3\nif __name__ == '__main__':\n    unittest.main()"
    ),
    "unittest with bases and set up of the class": (
        "from unittest import TestCase, main\nclass Base(TestCase):\n    @classmethod\n    def setUpClass(cls):\n"
        "        cls.x = 1\n    def compare(self, a, b):\n        self.assertTrue(a == b)\n"
        "class T(Base):\n    def test_a(self):\n        self.compare(f(self.x), 2)\n"
    ),
    "a plain class of tests": "class TestF:\n    def test_a(self):\n        assert f(1) == 2",
    "a doctest": ">>> f(1)\n2\n>>> y = f(2)\n>>> y\n3\n",
    "a doctest in a docstring": (
        'def about():\n    """It adds.\n\n    >>> f(1)\n    2\n    """\nimport doctest\ndoctest.testmod()'
    ),
    "an expected exception": (
        "try:\n    f('a')\n    assert False, 'no error'\nexcept TypeError:\n    pass\nassert f(1) == 2"
    ),
    "an exception by unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
        "        with self.assertRaises(TypeError):\n            f('a')\n        self.assertEqual(f(1), 2)"
    ),
    "an if that raises": "if f(1) != 2:\n    raise AssertionError('wrong')",
    "an if that exits": "import sys\nif f(1) != 2:\n    sys.exit(1)",
    "a handler that asserts": "try:\n    assert f(1) == 2\nexcept AssertionError:\n    assert f(1) == 'two'",
    "a count of failures": (
        "failed = 0\nfor x in range(3):\n    try:\n        assert f(x) == x + 1\n    except AssertionError:\n"
        "        failed += 1\nassert failed == 0"
    ),
    "names imported from the solution": (
        "from solution import f\nimport solution\nassert f(1) == 2\nassert solution.f(2) == 3"
    ),
    "assert True beside a real one": "def check(candidate):\n    assert True, 'prints'\n    assert candidate(1) == 2",
    "an async part": "import asyncio\nasync def go():\n    return f(1)\nassert asyncio.run(go()) == 2",
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", RUN)
def test_every_kind_of_test_pays_the_right_program_and_no_wrong_one(kind: str) -> None:
    assert judge_calls(RIGHT, ["f"], [RUN[kind]], terms=TERMS)[0].passed
    for wrong in (
        WRONG,
        "def f(x): raise SystemExit(0)",
        "import os\ndef f(x): os._exit(0)",
        "x = 1",
        "def f(x): return f",
    ):
        verdict = judge_calls(wrong, ["f"], [RUN[kind]], terms=TERMS)[0]
        assert not any(verdict.counts), wrong
        assert not verdict.passed


NOTHING = {
    "comments only": ("# assert f(1) == 2", "comments"),
    "a comparison": ("f(1) == 2", "write 'assert' before"),
    "a tuple": ("assert (f(1) == 2, 'text')", "a tuple is"),
    "a list": ("assert [f(1) == 2]", "container"),
    "a generator": ("assert (f(x) == x + 1 for x in range(3))", "all"),
    "an or that is always true": ("assert f(1) == 2 or True", "'or'"),
    "an asserted lambda": ("assert lambda: f(1) == 2", "lambda"),
    "a lambda": ("lambda: f(1) == 2", "lambda"),
    "a loop over nothing": ("for x in []:\n    assert f(x) == 1", "loop over nothing"),
    "a condition that is never true": ("if False:\n    assert f(1) == 2", "loop over nothing"),
    "what follows a return": ("def test_a():\n    return\n    assert f(1) == 2", "never called"),
    "an except that takes it": ("try:\n    assert f(1) == 2\nexcept Exception:\n    pass", "line 3"),
    "a bare except that prints": ("try:\n    assert f(1) == 2\nexcept:\n    print('wrong')", "'except' in line 3"),
    "an error asked for, of any kind": (
        "try:\n    f(1)\n    assert False\nexcept Exception:\n    pass",
        "takes the failure",
    ),
    "suppress": ("from contextlib import suppress\nwith suppress(AssertionError):\n    assert f(1) == 2", "suppress"),
    "a constant": ("assert True", "constant"),
    "printing": ("print(f(1) == 2)", "no assertion"),
    "a test that returns": ("def test_a():\n    return f(1) == 2", "no assertion"),
    "a function that nothing calls": ("def verify():\n    assert f(1) == 2", "nothing calls 'verify'"),
    "a class without tests": (
        "import unittest\nclass T(unittest.TestCase):\n    def other(self):\n        f(1)",
        "no assertion",
    ),
    "a doctest without outputs": (">>> y = f(1)\n", "examples"),
}
CANNOT = {
    "a fixture of pytest": ("def test_a(tmp_path):\n    assert f(1) == 2", "tmp_path"),
    "an async test": ("async def test_a():\n    assert f(1) == 2", "async"),
    "a package": ("import numpy as np\nassert np.isclose(f(1), 2)", "'numpy'"),
    "the result of a runner": ("import doctest\nr = doctest.testmod()\nassert f(1) == 2", "testmod"),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", [*NOTHING, *CANNOT])
def test_what_asserts_nothing_or_cannot_run_is_refused_before_the_run(kind: str) -> None:
    text, reason = {**NOTHING, **CANNOT}[kind]
    with pytest.raises(ValueError, match=reason):
        read_test(text, "f")
    with pytest.raises(ValueError, match=reason):
        check_tests([text, "assert f(1) == 3"], entry="f")
    with pytest.raises(ValueError, match=reason):
        code_tests(f"```python\n{RIGHT}\n```", [text], entry="f")


def test_a_check_that_nothing_calls_needs_to_know_with_what() -> None:
    text = "def check(candidate):\n    assert candidate(1) == helper(2)"
    with pytest.raises(ValueError, match=r"Nothing calls check\(candidate\)"):
        check_tests([text])
    check_tests([text], entry="f", above_constant=False)


@pytest.mark.faults
def test_a_program_in_which_no_assertion_was_reached_has_not_passed() -> None:
    """It was asked, and its answer kept the test from asserting: that is the program's 0, not the test's fault."""
    text = "for x in f(3):\n    assert x > 0"
    verdicts = [
        judge_calls(f"def f(n): return {value}", ["f"], [text], terms=TERMS)[0] for value in ("[1]", "[]", "[-1]")
    ]
    assert [verdict.passed for verdict in verdicts] == [True, False, False]
    assert "no assertion" in verdicts[1].reason


@pytest.mark.faults
def test_what_has_the_same_outcome_for_every_program_is_no_test_of_it() -> None:
    for text in ("assert callable(f)", "y = [1]\nfor x in y[1:]:\n    assert f(x) == 1", "assert len([1]) == 1"):
        with pytest.raises(ValueError, match="same outcome for every program"):
            judge_calls(RIGHT, ["f"], [text], terms=TERMS)
    with pytest.raises(ValueError, match="cannot be judged"):
        judge_calls(RIGHT, ["f"], ["assert 1 == 2\nassert f(1) == 2"], terms=TERMS)
    verdict = judge_calls(RIGHT, ["f"], ["assert callable(f)\nassert f(1) == 2\nassert f(2) == 0"], terms=TERMS)[0]
    assert verdict.parts == (True, False)


@pytest.mark.faults
def test_a_program_cannot_make_its_tests_look_like_no_tests() -> None:
    """A score of None costs less than a 0: what the program sends never leads to one."""
    nonsense = (
        "import os, json\nm = json.dumps(%s).encode()\n"
        "while os.read(3, 1 << 16):\n    os.write(3, len(m).to_bytes(4, 'big') + m)"
    )
    for reply in (
        "{'value': {'handle': 'x'}}",
        "{'value': {}}",
        "{}",
        "{'fault': ''}",
        "{'value': {'handle': 0}}",
        "[]",
        "{'value': 5}",
    ):
        verdict = judge_calls(nonsense % reply, ["f"], ["assert f(1) == 2"], terms=TERMS)[0]
        assert not verdict.passed, reply
    for value in ("lambda: 0", "type(None)", "iter(())", "float('nan')", "f", "Exception"):
        verdict = judge_calls(f"def f(x): return {value}", ["f"], ["assert f(f(1)) == 2"], terms=TERMS)[0]
        assert not verdict.passed, value


def test_each_assertion_is_a_part_and_one_that_fails_is_one_that_fails() -> None:
    text = (
        "def check(candidate):\n    y = candidate(1)\n    assert y == 2\n"
        "    assert candidate(0) == 5\n    assert candidate(2) == 3"
    )
    assert judge_calls(RIGHT, ["f"], [text], terms=TERMS)[0].parts == (True, False, True)
    hangs = "def f(x):\n    while x == 0: pass\n    return x + 1"
    assert judge_calls(hangs, ["f"], [text], terms=Terms(seconds=1))[0].parts == (True, False, False)
    dies = "import os\ndef f(x):\n    if x == 0: os._exit(0)\n    return x + 1"
    assert judge_calls(dies, ["f"], [text], terms=TERMS)[0].parts == (True, False, False)
    assert code_tests(f"```python\n{RIGHT}\n```", [text], entry="f", above_constant=False) == pytest.approx(2 / 3)


@pytest.mark.faults
def test_a_loop_that_failed_takes_what_comes_after_it_along() -> None:
    text = "failed = 0\nfor x in range(3):\n    assert f(x) == x\n    failed = 1\nassert failed == 0"
    assert judge_calls(RIGHT, ["f"], [text], terms=TERMS)[0].parts == (False, False)


@pytest.mark.faults
def test_an_end_of_the_program_is_no_expected_exception() -> None:
    text = "try:\n    f(1)\nexcept:\n    pass\nelse:\n    assert False"
    assert judge_calls("def f(x): raise ValueError", ["f"], [text], terms=TERMS)[0].passed
    assert not judge_calls("import os\ndef f(x): os._exit(0)", ["f"], [text], terms=TERMS)[0].passed


@pytest.mark.faults
def test_several_names_may_be_the_programs() -> None:
    """Case A3: the tests use what the prompt defines, and the answer repeats."""
    tests = ["assert g(f(3)) == 3", "assert g(f(4)) == 4"]
    assert code_tests("def g(x): return x - 1\ndef f(x): return x + 1", tests, above_constant=False) == 1.0
    assert code_tests("def g(x): return x - 1\ndef f(x): return x", tests, above_constant=False) == 0.0
    assert code_tests("def g(x): return x - 1\ndef f(x): return x + 1", tests, entry="f", above_constant=False) == 1.0
    linked = ["root = Node(1)\nroot.next = Node(2)\nassert total(root) == 3"]
    nodes = "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
    right = nodes + "def total(n): return n.v + total(n.next) if n else 0"
    assert code_tests(right, linked, above_constant=False) == 1.0
    assert code_tests(nodes + "def total(n): return n.v", linked, above_constant=False) == 0.0
    assert (
        code_tests("LIMIT = 3\ndef f(x): return x", ["assert f(LIMIT) == 3 and LIMIT == 3"], above_constant=False)
        == 1.0
    )


@pytest.mark.faults
def test_a_program_is_compiled_as_its_own_file_would_be() -> None:
    """Case A4: `List` without its import fails where it is defined, as it does by standard input."""
    for head, right in (("", 0.0), ("from typing import List\n", 1.0), ("from __future__ import annotations\n", 1.0)):
        code = f"{head}def inc(x: List[int]):\n    return [v + 1 for v in x]"
        assert code_tests(code, ["assert inc([1]) == [2]", "assert inc([]) == []"]) == right
    plain = "def inc(x):\n    return [v + 1 for v in x]\n"
    for end in ("1 / 0", "raise SystemExit(0)", "input()"):  # what does not load defines nothing
        assert code_tests(plain + end, ["assert inc([1]) == [2]", "assert inc([]) == []"]) == 0.0


def test_free_names_are_those_of_the_program() -> None:
    source = "from solution import a, b as c\nimport solution as s\nimport math\nassert a(c) == solution.d(math.pi, e)"
    assert set(free_names([source])) == {"a", "b", "d", "e"}
    assert free_names([">>> p(1)\n2\n>>> q = 3\n"]) == ["p"]
