"""Programs, judged by tests in the sandbox: standard input and output, asserts, or calls with expected values.

The expected values never enter the process that runs the answer, and an exit code alone earns nothing (see
`llm_pg.sandbox.judging`). Where the sandbox fails, SandboxError is raised: the completion has no score, which is
counted and shown, and is not a 0.
"""

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llm_pg.sandbox import Limits
from llm_pg.sandbox.judging import Case, IOTest, Terms, judge_calls, judge_output, names_called
from reward_fns.registry import reward

MAX_CHARACTERS = 100_000  # of a program; nothing longer is run
FENCE = "```"
_LANGUAGES = ("", "python", "python3", "py")

Test = str | IOTest | Case


@reward(low=0.0, high=1.0, floor=0.0, checks="answer")
def code_tests(
    completion: str,
    tests: Any,
    entry: str | Sequence[str] | None = None,
    setup: str = "",
    partial: bool = True,
    above_constant: bool = True,
    seconds: float = 6.0,
    cpu_s: float = 3.0,
    memory_mb: int = 512,
    packages: bool = False,
    workers: int = 1,
    **row: Any,
) -> float:
    """The share of tests that the program in the completion passes; all or nothing with `partial` false.

    The program is the last fenced block of Python after any </think>, or without a fence the whole text. `tests` (a
    column) is a list, or its JSON text, all of one kind:

    - {"input": text, "output": text}: the program reads the one and must print the other, white space at line ends and
      at the end aside, and end with exit code 0. {"inputs": [...], "outputs": [...]} is the same.
    - Python text with assert statements, as in MBPP, or one that defines and calls a check, as in HumanEval.
    - {"args": [...], "kwargs": {...}, "expected": value}: a call of the function `entry`, floats within 1e-6.

    entry: the functions or classes of the program that asserts and calls may use (HumanEval's entry_point); for asserts
    it may be left out when they call just one unknown name. setup: trusted source that asserts need. seconds: for all
    tests together; keep it under the reward's deadline. cpu_s, memory_mb: for each run. packages: installed packages
    may be imported. workers: tests side by side.

    Range [0, 1]. Floor 0: let n be the tests and c those that the best constant answer passes (the same output whatever
    the input; found for outputs, expected values and asserts of the form f(...) == value). The score is (passed - c) /
    (n - c), at least 0. With `above_constant` false it is passed / n, and a program that always prints the commonest
    answer earns c / n. Asserts of another form count as none that a constant passes. What no test set tells from an
    answer is a table of values that the prompt shows.

    Raises ValueError for tests that cannot be judged, or whose c is n; SandboxError when the sandbox failed.
    """
    parsed = _parse(json.dumps(tests, default=_refuse)) if not isinstance(tests, str) else _parse(tests)
    constant = constant_passes(parsed)
    if above_constant and constant == len(parsed):
        raise ValueError(
            f"All tests ({constant}) expect the same answer, so a program that always gives it would earn everything. "
            f"Add a test with another answer, or pass above_constant=False."
        )
    code = extract_code(completion)
    if code is None:
        return 0.0
    terms = Terms(seconds, Limits(wall_s=seconds, cpu_s=cpu_s, memory_mb=memory_mb), packages=packages, workers=workers)
    passed = sum(verdict.passed for verdict in _judge(code, parsed, entry, setup, terms))
    if not partial:
        return float(passed == len(parsed))
    base = constant if above_constant else 0
    return max(0.0, (passed - base) / (len(parsed) - base))


def extract_code(completion: str) -> str | None:
    """The program in a completion: the last fenced block of Python after any </think>; the whole without a fence.

    A block that is not closed ends with the text. None when there is nothing to run or it is over 100,000 characters.
    """
    text = completion.rpartition("</think>")[2]
    blocks: list[list[str]] = []
    inside = fenced = False
    for line in text.split("\n"):  # a form feed or U+2028 inside a literal is no end of a line
        if line.lstrip().startswith(FENCE):
            fenced, is_python = True, line.strip().strip("`").strip().lower() in _LANGUAGES
            inside = not inside
            if inside:
                blocks.append([])
                skip = not is_python
            elif skip:
                blocks.pop()
        elif inside:
            blocks[-1].append(line)
    if inside and skip:
        blocks.pop()
    code = "\n".join(blocks[-1]) if blocks else "" if fenced else text
    return code if code.strip() and len(code) <= MAX_CHARACTERS else None


def constant_passes(tests: Sequence[Test]) -> int:
    """How many of the tests the best constant answer passes, as far as their form shows it."""
    known = Counter(answer for answer in map(_expected, tests) if answer is not None)
    return max(known.values(), default=0)


def _judge(
    code: str, tests: Sequence[Test], entry: str | Sequence[str] | None, setup: str, terms: Terms
) -> Sequence[Any]:
    outputs = [test for test in tests if isinstance(test, IOTest)]
    if outputs:
        return judge_output(code, outputs, terms)
    calls = [test for test in tests if not isinstance(test, IOTest)]
    names = [entry] if isinstance(entry, str) else list(entry or ())
    if not names:
        names = names_called([test for test in calls if isinstance(test, str)], setup)
        if len(names) != 1:
            raise ValueError(
                f"Say in `entry` which functions of the program the tests call; they use {names or 'no name'} without "
                f"defining it."
            )
    return judge_calls(code, names, calls, setup=setup, terms=terms)


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[Test, ...]:
    """Tests from JSON, or from the text of a single assert test."""
    try:
        tests = json.loads(text)
    except json.JSONDecodeError:
        tests = [text]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        if len(tests["inputs"]) != len(tests["outputs"]):
            raise ValueError(f"{len(tests['inputs'])} inputs do not fit {len(tests['outputs'])} outputs.")
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        tests = [{"input": given, "output": wanted} for given, wanted in pairs]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"code_tests needs a list of tests in the column 'tests'; got {text[:80]!r}.")
    parsed = tuple(_parse_one(test) for test in tests)
    if len({isinstance(test, IOTest) for test in parsed}) > 1:
        raise ValueError("The tests of one row are all of one kind: outputs, or asserts and calls.")
    return parsed


def _parse_one(test: Any) -> Test:
    if isinstance(test, str) and test.strip():
        return test
    if isinstance(test, Mapping):
        if isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
            return IOTest(test["input"], test["output"])
        if isinstance(test.get("args"), list) and "expected" in test:
            return Case(test["args"], test["expected"], dict(test.get("kwargs") or {}))
    raise ValueError(
        f"A test is Python text, or has 'input' and 'output' (texts), or 'args' (a list) and 'expected'; got "
        f"{str(test)[:120]}."
    )


def _refuse(value: Any) -> Any:
    raise ValueError(f"Tests hold what JSON can hold; got a {type(value).__name__}.")


def _expected(test: Test) -> str | None:
    """The answer a test expects, as text that is equal for equal answers; None when its form does not show it."""
    if isinstance(test, IOTest):
        return "\n".join(line.rstrip() for line in test.stdout.rstrip().split("\n"))
    if isinstance(test, Case):
        return json.dumps(test.expected, sort_keys=True)
    try:
        statements = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the judge says what is wrong with it
    match statements:
        case [ast.Assert(test=ast.Compare(left=ast.Call(), ops=[ast.Eq() | ast.Is()], comparators=[value]))]:
            return ast.dump(value)
        case [ast.Assert(test=ast.Compare(left=value, ops=[ast.Eq() | ast.Is()], comparators=[ast.Call()]))]:
            return ast.dump(value)
        case [ast.Assert(test=ast.Call())]:
            return ast.dump(ast.Constant(True))
        case [ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call()))]:
            return ast.dump(ast.Constant(False))
    return None
