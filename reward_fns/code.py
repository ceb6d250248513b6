"""Programs, judged by tests in the sandbox: standard input and output, Python tests, or calls with expected values.

The expected values never enter the process that runs the answer, and an exit code alone earns nothing (see
`llm_pg.sandbox.judging`). Where the sandbox fails, SandboxError is raised: the completion has no score, which is
counted and shown, and is not a 0. The formats of HumanEval, MBPP and APPS are in `reward_fns.code_sets`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llm_pg.sandbox import Limits
from llm_pg.sandbox.judging import CallCase, IOTest, Terms, judge_calls, judge_output, names_called
from llm_pg.sandbox.reading import read_test
from reward_fns.registry import Gold, reward

MAX_CHARACTERS = 100_000  # of a program; nothing longer is run
FENCE = "```"
_LANGUAGES = ("", "python", "python3", "py")

Test = str | IOTest | CallCase


@dataclass(frozen=True)
class Suite:
    """The tests of one row, and what they need.

    tests: all outputs, or texts and calls. entry: what of the program is under test; None where the texts say it
    themselves. names: all that they use of it. setup: trusted source for texts. method_of: a class whose methods the
    names may be. packages: whether installed packages may be imported.
    """

    tests: tuple[Test, ...]
    entry: str | None = None
    names: tuple[str, ...] = ()
    setup: str = ""
    method_of: str = ""
    packages: bool = False

    def answers(self) -> list[str | None]:
        """The answer that each part of the tests expects, as text that is equal for equal answers; None where unknown.

        Raises ValueError for a text that asserts nothing or cannot be run: it would pay every program, or none.
        """
        return [answer for test in self.tests for answer in self._answers(test)]

    def _answers(self, test: Test) -> list[str | None]:
        if isinstance(test, IOTest):
            return ["\n".join(line.rstrip() for line in test.stdout.rstrip().split("\n"))]
        if isinstance(test, CallCase):
            return [json.dumps(test.expected, sort_keys=True)]
        return [unit.answer for unit in read_test(test, self.entry, self.packages).units]

    def constant(self) -> int:
        """How many parts of the tests the best constant answer passes, as far as their form shows it."""
        return max(Counter(answer for answer in self.answers() if answer is not None).values(), default=0)


def check_tests(
    tests: Any = None,
    entry: str | Sequence[str] | None = None,
    setup: str = "",
    above_constant: bool = True,
    packages: bool = False,
    **row: Any,
) -> None:
    """ValueError for a row of `code_tests` that cannot be judged, before anything is run."""
    suite = read_suite(tests, entry, setup, packages)
    if above_constant and suite.constant() == (size := len(suite.answers())):
        raise ValueError(
            f"All tests ({size}) expect the same answer, so a program that always gives it would earn everything. Add "
            f"a test with another answer, or pass above_constant=False."
        )


SOLUTIONS = ("canonical_solution", "solution", "code", "reference", "solutions")  # columns with a right program


def program_of(row: Mapping[str, Any]) -> str:
    """The right program that a row holds in a column of such a name, the first of several; "" without one."""
    found = next((row[name] for name in SOLUTIONS if row.get(name)), "")
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except json.JSONDecodeError:
            return found
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, str) else ""


def program_gold(tests: Any, entry: str | Sequence[str] | None = None, setup: str = "", **row: Any) -> Gold:
    """The row's own solution, and what of it is under test."""
    suite = read_suite(tests, entry, setup, bool(row.get("packages", False)))
    return Gold(program_of(row), "program", entry=suite.entry or next(iter(suite.names), ""))


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_tests, gold=program_gold)
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
    - Python text: assert statements, `check(candidate)`, `unittest` classes, `test_` functions, a doctest. Each
      statement that asserts, and each test function, method or example, is a test; all of them are run.
    - {"args": [...], "kwargs": {...}, "expected": value}: a call of the function `entry`, floats within 1e-6.

    entry: the functions or classes of the program that the tests use, the one under test first (HumanEval's
    entry_point); for Python text it may be left out where the text itself says what it calls. Other names that the
    text uses and does not define are taken from the program too; what is trusted belongs in `setup`.
    setup: trusted source that Python texts need. seconds: for all tests together; keep it under the reward's deadline.
    cpu_s, memory_mb: for each run. packages: installed packages may be imported. workers: tests side by side.

    Range [0, 1]. Floor 0: let n be the tests and c those that the best constant answer passes (the same output whatever
    the input; found for outputs, expected values and asserts of the form f(...) == value). The score is (passed - c) /
    (n - c), at least 0. With `above_constant` false it is passed / n, and a program that always prints the commonest
    answer earns c / n. Asserts of another form count as none that a constant passes. What no test set tells from an
    answer is a table of values that the prompt shows.

    A test that asserts nothing is refused before the run: a comparison without assert, a tuple, an assertion that an
    `except` takes, a function that nothing calls. One in which a program reaches no assertion is failed.
    Raises ValueError for tests that cannot be judged, or whose c is n; SandboxError when the sandbox failed.
    """
    check_tests(tests, entry, setup, above_constant, packages)
    terms = Terms(seconds, Limits(wall_s=seconds, cpu_s=cpu_s, memory_mb=memory_mb), packages=packages, workers=workers)
    suite = read_suite(tests, entry, setup, packages)
    return score(extract_code(completion), suite, terms, partial=partial, above_constant=above_constant)


def score(code: str | None, suite: Suite, terms: Terms, *, partial: bool = True, above_constant: bool = True) -> float:
    """What a program earns: the share of parts of the tests that it passes, as `code_tests` says.

    Where all parts expect one answer, nothing is taken off for it.
    """
    if code is None:
        return 0.0
    if any(isinstance(test, IOTest) for test in suite.tests):
        verdicts = judge_output(code, [test for test in suite.tests if isinstance(test, IOTest)], terms)
    else:
        calls = [test for test in suite.tests if not isinstance(test, IOTest)]
        verdicts = judge_calls(code, suite.names, calls, setup=suite.setup, method_of=suite.method_of, terms=terms)
    parts = [passed for verdict in verdicts for passed in verdict.counts]
    if not partial:
        return float(all(parts))
    base = suite.constant() if above_constant else 0
    base = base if base < len(parts) else 0
    return max(0.0, (sum(parts) - base) / (len(parts) - base))


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


def read_suite(tests: Any, entry: str | Sequence[str] | None, setup: str, packages: bool = False) -> Suite:
    """The suite that `code_tests` takes from a row. Raises ValueError for what is no test."""
    text = tests if isinstance(tests, str) else json.dumps(tests, default=_refuse)
    return _read_suite(text, (entry,) if isinstance(entry, str) else tuple(entry or ()), setup, packages)


@lru_cache(maxsize=256)
def _read_suite(text: str, entries: tuple[str, ...], setup: str, packages: bool) -> Suite:
    tests = _parse(text)
    if any(isinstance(test, IOTest) for test in tests):
        return Suite(tests, setup=setup)
    wanted = names_called([test for test in tests if isinstance(test, str)], setup)
    names = tuple(dict.fromkeys((*entries, *wanted)))
    if not names:
        raise ValueError("Say in `entry` which functions of the program the tests call; they name none of it.")
    return Suite(tests, entries[0] if entries else None, names, setup, packages=packages)


def _parse(text: str) -> tuple[Test, ...]:
    """Tests from JSON, or from the text of a single Python test."""
    try:
        tests = json.loads(text)
    except json.JSONDecodeError:
        tests = [text]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        tests = [{"input": given, "output": wanted} for given, wanted in pairs(tests["inputs"], tests["outputs"])]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"code_tests needs a list of tests in the column 'tests'; got {text[:80]!r}.")
    parsed = tuple(_parse_one(test) for test in tests)
    if len({isinstance(test, IOTest) for test in parsed}) > 1:
        raise ValueError("The tests of one row are all of one kind: outputs, or texts and calls.")
    return parsed


def pairs(inputs: Any, outputs: Any) -> Iterable[tuple[Any, Any]]:
    """Inputs with their outputs; ValueError where they do not fit."""
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        counts = [len(side) if isinstance(side, list) else "no list of" for side in (inputs, outputs)]
        raise ValueError(f"{counts[0]} inputs do not fit {counts[1]} outputs.")
    return zip(inputs, outputs, strict=True)


def _parse_one(test: Any) -> Test:
    if isinstance(test, str) and test.strip():
        return test
    if isinstance(test, Mapping):
        if isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
            return IOTest(test["input"], test["output"])
        if isinstance(test.get("args"), list) and "expected" in test:
            return CallCase(test["args"], test["expected"], dict(test.get("kwargs") or {}))
    raise ValueError(
        f"A test is Python text, or has 'input' and 'output' (texts), or 'args' (a list) and 'expected'; got "
        f"{str(test)[:120]}."
    )


def _refuse(value: Any) -> Any:
    raise ValueError(f"Tests hold what JSON can hold; got a {type(value).__name__}.")
