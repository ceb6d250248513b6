"""Row S2: what earns a pass. The attacks answer no test and must pass none; honest answers of many forms pass all."""

import pytest

from llm_pg import sandbox
from llm_pg.sandbox.judging import CallCase, IOTest, Terms, judge_calls, judge_output, names_called

TERMS = Terms(seconds=20)
ASSERTS = ["assert f(2) == 3", "assert f(10) == 11", "assert isinstance(f(0), int) and abs(f(4) - 5) < 1e-9"]
CASES = [CallCase([2], 3, {}), CallCase([10], 11, {}), CallCase([], 8, {"x": 7})]
PAIRS = [IOTest("2", "3"), IOTest("10", "11\n")]


def passed(code: str, tests: list, names: tuple[str, ...] = ("f",), **options) -> list[bool]:
    return [verdict.passed for verdict in judge_calls(code, names, tests, terms=options.pop("terms", TERMS), **options)]


FALSE_PASSES = {
    "exits with code 0": "import os\nos._exit(0)",
    "exits with code 0 when called": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit(0)": "raise SystemExit(0)",
    "raises SystemExit(0) when called": "def f(x): raise SystemExit(0)",
    "is cut off by a signal": "import os\ndef f(x): os.kill(0, 9)",
    "equals everything": (
        "class E:\n"
        "    def __eq__(self, other): return True\n"
        "    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__\n"
        "    def __sub__(self, other): return self\n"
        "    def __abs__(self): return self\n"
        "    def __bool__(self): return True\n"
        "    def __hash__(self): return 0\n"
        "def f(x=0): return E()"
    ),
    "an int that equals everything": (
        "class E(int):\n"
        "    def __eq__(self, other): return True\n"
        "    def __sub__(self, other): return self\n"
        "    def __abs__(self): return 0\n"
        "    __hash__ = int.__hash__\n"
        "def f(x=0): return E(-99)"
    ),
    "a list whose items equal everything": (
        "class E(list):\n    def __eq__(self, other): return True\ndef f(x=0): return E([1])"
    ),
    "patches the builtins": (
        "import builtins\n"
        "builtins.isinstance = lambda *_: True\n"
        "builtins.abs = builtins.all = lambda *_: 0\n"
        "builtins.AssertionError = Exception\n"
        "def isinstance(*_): return True\n"
        "def abs(x): return 0\n"
        "def f(x=0): return -99"
    ),
    "patches the harness and the interpreter": (
        "import sys, json, wire\n"
        "wire.encode = lambda value, opaque: True\n"
        "wire.Channel.send = lambda *_: None\n"
        "sys.settrace(lambda *_: None)\n"
        "main = sys.modules['__main__']\n"
        "main.serve = lambda *_: {'value': True}\n"
        "def f(x=0): return -99"
    ),
    "reads the tests from the disk": (
        "import glob, os\n"
        "def f(x=0):\n"
        "    for path in glob.glob('/tmp/**', recursive=True) + glob.glob('../**') + ['tests.json', '../tests.json']:\n"
        "        try: text = open(path).read()\n"
        "        except OSError: continue\n"
        "        if 'nonce' in text: return __import__('json').loads(text)['tests'][0]\n"
        "    return -99"
    ),
    "prints verdicts with guessed nonces": (
        "import os\n"
        "for fd in (1, 2, 3):\n"
        "    for nonce in ('0' * 32, '', 'nonce', 'pass', '{nonce}'):\n"
        "        try: os.write(fd, f'\\n{nonce} pass \\'\\'\\n'.encode() * 9)\n"
        "        except OSError: pass\n"
        "def f(x=0): return -99"
    ),
    "answers the socket itself": (
        "import os, json\n"
        "while True:\n"
        "    os.read(3, 1 << 16)\n"
        "    reply = json.dumps({'value': True, 'passed': True, 'verdict': 'pass', 'arguments': [True]}).encode()\n"
        "    os.write(3, len(reply).to_bytes(4, 'big') + reply)"
    ),
    "sends nonsense": "import os\nos.write(3, b'\\x00\\x00\\x00\\x05[[[[[')\ndef f(x=0): return -99",
    "sends a message of four gigabytes": "import os\nos.write(3, b'\\xff\\xff\\xff\\xff')\ndef f(x=0): return -99",
    "sends brackets without end": (
        "import os\nm = b'[' * 500000\nos.write(3, len(m).to_bytes(4, 'big'))\nos.write(3, m)\ndef f(x=0): return -99"
    ),
    "claims an exception that ends loops": "def f(x=0): raise StopIteration",
    "claims a failed assert": "def f(x=0): raise AssertionError",
    "hangs": "def f(x=0):\n    while True: pass",
    "defines nothing": "x = 1",
    "is no program": "def f(x) return",
    "is empty": "",
    "recurses in what it returns": "def f(x=0):\n    a = []\n    a.append(a)\n    return a",
}


@pytest.mark.faults
@pytest.mark.parametrize("name", FALSE_PASSES)
def test_an_answer_that_solves_nothing_passes_nothing(name: str) -> None:
    code = FALSE_PASSES[name]
    terms = Terms(seconds=1.5) if name in ("hangs", "patches the harness and the interpreter") else TERMS
    assert not any(passed(code, [*ASSERTS, *CASES], terms=terms))
    assert not judge_output(code, PAIRS[:1], terms)[0].passed


# Returns the first number of seven digits that it finds anywhere in its process but in its own source.
SPY = """
import gc, re, sys
def f(x):
    seen, frame = [], sys._getframe()
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    seen += [thing for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
    for thing in seen:
        try:
            found = re.search(r"(?<!\\d)7[0-9]{6}(?!\\d)", repr(thing))
        except Exception:
            continue
        if found:
            return int(found[0])
    return -99
"""


@pytest.mark.faults
def test_expected_values_are_nowhere_in_the_answers_process() -> None:
    test = "assert f(2) == 7351964"
    together = SPY + f"\nnamespace = {{'f': f}}\nexec(compile({test!r}, 'test', 'exec'), namespace)\nprint('passed')"
    assert sandbox.run(together).stdout == "passed\n"  # in one process the spy does find them
    assert passed(SPY, [test, CallCase([2], 7351964, {})]) == [False, False]


FORMS = [
    "assert all(map(lambda case: f(case[0]) == case[1], [(1, 2), (2, 3)]))",
    "for x in range(3):\n    assert f(x) == x + 1",
    "assert [f(x) for x in range(3)] == [1, 2, 3]",
    "assert f(1)",
    "assert not f(1)",
    "assert f(1) in {2}",
    "assert {f(1)} == {2}",
    "assert max(f(1), 0) == 2",
    "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["equals everything", "claims an exception that ends loops", "exits with code 0"])
def test_no_form_of_test_is_fooled(name: str) -> None:
    assert passed(FALSE_PASSES[name], FORMS) == [False] * len(FORMS)


@pytest.mark.faults
def test_an_answer_that_died_does_not_take_the_verdicts_before_with_it() -> None:
    code = "import os\ndef f(x):\n    if x == 10: os._exit(0)\n    return x + 1"
    assert passed(code, ["assert f(2) == 3", "assert f(10) == 11", "assert f(3) == 4"]) == [True, False, False]


@pytest.mark.faults
def test_a_function_that_returns_a_value_cannot_change_what_it_is_compared_with() -> None:
    test = "data = [3, 1, 2]\nassert f(data) == sorted(data)"
    assert passed("def f(x):\n    x.clear()\n    return []", [test]) == [False]
    assert passed("def f(x):\n    return sorted(x)", [test]) == [True]


@pytest.mark.faults
def test_what_a_test_did_not_name_cannot_be_defined_for_it() -> None:
    """HumanEval 32 checks with a helper from the prompt: the answer must not bring its own."""
    code = "def poly(xs, x): return 0\ndef find_zero(xs): return 99"
    test = "assert abs(poly([1, 2], find_zero([1, 2]))) < 1e-4"
    setup = "def poly(xs, x): return sum(c * x ** i for i, c in enumerate(xs))"
    with pytest.raises(ValueError, match="'poly' is not defined"):
        passed(code, [test], names=("find_zero",))
    assert passed(code, [test], names=("find_zero",), setup=setup) == [False]
    assert passed("def find_zero(xs): return -xs[0] / xs[1]", [test], names=("find_zero",), setup=setup) == [True]


HONEST = {
    "a function": ("def f(x): return x + 1", [*ASSERTS, *CASES]),
    "in place": ("def f(x): x.sort()", ["a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"]),
    "a generator": ("def f(n): yield from range(n)", ["assert list(f(3)) == [0, 1, 2]", CallCase([2], [0, 1], {})]),
    "an exception": ("def f(x): raise KeyError(x)", ["try:\n    f(1)\n    assert False\nexcept KeyError: pass"]),
    "big and exact numbers": ("def f(x): return x ** 3", ["assert f(10 ** 40) == 10 ** 120", "assert f(-2) == -8"]),
    "floats": ("def f(x): return x / 3", ["assert f(1) == 1 / 3", CallCase([1], 0.3333333333, {})]),
    "not a number": ("def f(x): return float('nan')", ["import math\nassert math.isnan(f(0))"]),
    "tuples, sets and dicts": (
        "def f(x): return {(1, 'a'): {2, 3}, None: frozenset([x])}",
        ["assert f(4) == {(1, 'a'): {2, 3}, None: frozenset([4])}", "assert type(list(f(4))[0]) is tuple"],
    ),
    "bytes, complex, fractions": (
        "from fractions import Fraction\ndef f(x): return [b'\\x00' + x, 1j, Fraction(1, 3)]",
        ["from fractions import Fraction\nassert f(b'a') == [b'\\x00a', 1j, Fraction(1, 3)]"],
    ),
    "counters": (
        "from collections import Counter, OrderedDict\ndef f(x): return Counter(x)",
        ["assert f('aab') == {'a': 2, 'b': 1}"],
    ),
    "text": ("def f(x): return x[::-1]", ["assert f('ü☃\\ud800') == '\\ud800☃ü'"]),
    "modules of the answer's": ("import math\ndef f(x): return x", ["assert math.isclose(f(1), 1)"]),
    "a class": (
        "from dataclasses import dataclass\n@dataclass\nclass f:\n    v: int = 0\n"
        "    def add(self, x):\n        self.v += x\n        return self\n    def __len__(self): return self.v\n"
        "    def __getitem__(self, i): return i * 2\n",
        ["a = f()\na.add(3).add(4)\nassert a.v == 7 and len(a) == 7 and a[5] == 10", "assert str(f(2)) == 'f(v=2)'"],
    ),
    "its own objects as arguments": (
        "class N:\n    def __init__(self, v): self.v = v\ndef f(x): return N(x) if isinstance(x, int) else x.v",
        ["assert f(f(5)) == 5"],
    ),
    "printing a lot, and to the wrong places": (
        "import sys\ndef f(x):\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)\n    return x + 1",
        ASSERTS,
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_answer_passes(name: str) -> None:
    code, tests = HONEST[name]
    verdicts = judge_calls(code, ["f"], tests, terms=TERMS)
    assert all(verdict.passed for verdict in verdicts), verdicts


def test_a_wrong_value_fails_its_own_test_only() -> None:
    code = "def f(x=0): return 3"
    assert passed(code, [*ASSERTS, *CASES]) == [True, False, False, True, False, False]
    assert [verdict.passed for verdict in judge_output("print(3)", PAIRS, TERMS)] == [True, False]


def test_output_is_compared_but_for_white_space_at_ends() -> None:
    pair = [IOTest("", "1 2\n3\n")]
    printed = {
        "1 2\n3": True,
        "1 2  \n3 \n\n": True,
        "1 2\n\n3": False,
        "1  2\n3": False,
        " 1 2\n3": False,
        "1 2": False,
    }
    for text, expected in printed.items():
        assert judge_output(f"print({text!r})", pair, TERMS)[0].passed is expected


def test_output_of_a_run_that_failed_or_was_ended_does_not_count() -> None:
    pair = [IOTest("", "3")]
    for end in ("1/0", "raise SystemExit(1)", "while True: pass", "import os; os.abort()"):
        code = f"print(3, flush=True)\n{end}"
        assert not judge_output(code, pair, Terms(seconds=1.0))[0].passed


def test_all_tests_together_keep_to_their_seconds() -> None:
    pairs = [IOTest(str(n), str(n + 1)) for n in range(30)]
    code = "x = int(input())\nwhile x > 1: pass\nprint(x + 1)"
    verdicts = judge_output(code, pairs, Terms(seconds=1.5, workers=2))
    assert [verdict.passed for verdict in verdicts[:2]] == [True, True]
    assert not any(verdict.passed for verdict in verdicts[2:])
    assert verdicts[-1].reason == "not run: no time left"


@pytest.mark.faults
def test_too_little_time_for_an_innocent_program_is_no_verdict() -> None:
    pairs = [IOTest(str(n), str(n + 1)) for n in range(200)]
    with pytest.raises(sandbox.SandboxError, match="not enough"):
        judge_output("print(int(input()) + 1)", pairs, Terms(seconds=0.5, workers=1))


@pytest.mark.parametrize("stdout", ["", " \n\t\n"])
def test_a_test_that_expects_nothing_is_refused(stdout: str) -> None:
    with pytest.raises(ValueError, match="does nothing"):
        IOTest("1", stdout)


def test_tests_that_cannot_be_judged_are_refused_and_not_failed() -> None:
    with pytest.raises(ValueError, match="passes a function"):
        judge_calls("def f(g): return g(1)", ["f"], ["assert f(lambda x: x) == 1"], terms=TERMS)
    with pytest.raises(ValueError, match="not Python"):
        judge_calls("def f(x): return x", ["f"], ["assert f(1 =="], terms=TERMS)
    with pytest.raises(ValueError, match="at least one function"):
        judge_calls("def f(x): return x", [], ["assert True"], terms=TERMS)


def test_the_names_that_tests_call_are_found() -> None:
    source = (
        "import math as m\nfrom os import path\nfor i in range(3):\n    assert m.isclose(f(i), [g(j) for j in [i]][0])"
    )
    assert names_called([source, "def h(): return k(path)"], setup="def g(x): return x") == ["f", "k"]


def test_a_failing_sandbox_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    level = sandbox.level()
    monkeypatch.setattr("llm_pg.sandbox.launch.interpreter", lambda: "/nonexistent/python")
    for judge in (lambda t: judge_output("print(3)", PAIRS, t), lambda t: judge_calls("", ["f"], ASSERTS, terms=t)):
        with pytest.raises(sandbox.SandboxError):
            judge(Terms(level=level))
