"""Judge a program by tests, so that only its answers count.

What a test expects never enters the process that runs the model's code: standard output is compared out here, and
functions are called by a referee in a sandbox of its own (`inside/`). An exit code, a patched `assert` or an object
that equals everything therefore decides nothing. What remains possible is what a test set cannot tell from an answer:
values known from the prompt, or guessed.
"""

import json
import marshal
import math
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from llm_pg.sandbox.inside import wire
from llm_pg.sandbox.launch import RunningSandbox
from llm_pg.sandbox.reading import ReadTest, free_names, read_test
from llm_pg.sandbox.runs import choose, num_processors
from llm_pg.sandbox.spec import Job, Level, Limits, Result, SandboxError

_LEAST_WALL_S = 0.05
_DECIMAL_OR_WHOLE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d{1,3})?")
_SLOW_SHARE = 0.1  # of the seconds: a run that takes longer is to blame when they are not enough


@dataclass(frozen=True)
class IOTest:
    """Standard input, and the standard output it must give; white space at line ends and at the end is ignored.

    tolerance: relative and absolute, for words of a line that are numbers with a decimal point; None: text for text.
    """

    stdin: str
    stdout: str
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not self.stdout.strip():
            raise ValueError("A test that expects no output is passed by a program that does nothing. Leave it out.")


@dataclass(frozen=True)
class CallCase:
    """A call of the function under test, and the value it must return: plain data, lists and tuples alike.

    or_expected: another value that is right as well, in a tuple of one; empty for none.
    """

    arguments: Sequence[Any]
    expected: Any
    keywords: dict[str, Any]
    or_expected: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether one test was passed, and if not, why (of the first part that was not).

    parts: for a test of several parts, whether each was passed (see `reading.read_test`); parts that are the same for
    every program are left out.
    """

    passed: bool
    reason: str = ""
    parts: tuple[bool, ...] = ()

    @property
    def counts(self) -> tuple[bool, ...]:
        """What each part of the test is worth: one for a test without parts."""
        return self.parts or (self.passed,)


@dataclass(frozen=True)
class Terms:
    """How to judge. seconds: for all tests of one answer together. limits: for each run; its wall_s is cut to what is
    left of `seconds`. level, packages, allow_uncontained: as in `sandbox.run`."""

    seconds: float = 8.0
    limits: Limits = field(default_factory=Limits)
    level: Level | None = None
    packages: bool = False
    allow_uncontained: bool = False
    workers: int | None = None

    def choose(self) -> Level:
        return choose(self.level, packages=self.packages, allow_uncontained=self.allow_uncontained)


def judge_output(code: str, tests: Sequence[IOTest], terms: Terms | None = None) -> list[Verdict]:
    """Run the program once for each test, some side by side, and compare what it prints.

    A run passes that ends by itself with exit code 0 and prints what is expected. Tests that the seconds are not enough
    for count as failed if a run was slow (over a tenth of them). If every run was quick, nothing is known of the rest:
    that raises SandboxError, as does any failure of the sandbox.
    """
    terms = terms or Terms()
    level = terms.choose()
    deadline = time.monotonic() + terms.seconds

    def attempt(test: IOTest) -> Result | None:
        left = deadline - time.monotonic()
        if left < _LEAST_WALL_S:
            return None
        limits = replace(terms.limits, wall_s=min(terms.limits.wall_s, left))
        return RunningSandbox(Job(code, test.stdin), limits, level, packages=terms.packages).finish()

    with ThreadPoolExecutor(terms.workers or num_processors()) as pool:
        results = list(pool.map(attempt, tests))
    slow = any(result is not None and result.wall_s > _SLOW_SHARE * terms.seconds for result in results)
    if not slow and any(result is None or result.status == "wall" for result in results):
        raise SandboxError(
            f"{terms.seconds:g} s were not enough to run {len(tests)} tests ({results.count(None)} were not begun), "
            f"and no run was slow. Raise the seconds, or use fewer tests."
        )
    return [_compare(test, result) for test, result in zip(tests, results, strict=True)]


def judge_calls(
    code: str,
    names: Sequence[str],
    tests: Sequence[str | CallCase],
    *,
    setup: str = "",
    method_of: str = "",
    tolerance: float = 1e-6,
    terms: Terms | None = None,
) -> list[Verdict]:
    """Judge functions (or classes) of the program by statements that must not raise, or by cases.

    names: what the tests may use of the program, and nothing else of it; the first is what cases and `check` call.
    tests: Python text (see `reading.read_test`: assertions, `check(candidate)`, `unittest` classes, `test_` functions,
    doctests), or a `CallCase`. setup: trusted source that every text needs; it may use the names too. method_of: a
    class of the program whose methods the names are where it does not define them itself. tolerance: relative and
    absolute, where a case's value is a float.

    Plain data crosses in both directions: numbers, text, bytes, lists, tuples, dicts, sets, iterators (taken as
    lists), arrays. Other objects stay with the program; a test can call them and read their attributes but not compare
    them. A function that returns None changes the lists, dicts and sets that it was given, as in-place functions do.
    A program that raises while it is loaded defines nothing. The tests run in order in `seconds`; those after one that
    hangs or ends the program are failed, and so is one in which no assertion was reached.

    Raises ValueError for a test that asserts nothing or passes a function, or whose outcome is the same for every
    program; SandboxError when the sandbox failed.
    """
    terms = terms or Terms()
    if not names:
        raise ValueError("Name at least one function of the program that the tests call.")
    texts = [test for test in tests if isinstance(test, str)]
    read = [read_test(test, names[0], terms.packages) if isinstance(test, str) else test for test in tests]
    imports = [name for name in free_names([setup, *texts]) if name in sys.stdlib_module_names and name not in names]
    nonce = secrets.token_hex(16)
    spec = {
        "nonce": nonce,
        "names": list(names),
        "method_of": method_of,
        "setup": "\n".join([setup, *(f"import {name}" for name in imports)]),  # the answer would have imported them
        "tolerance": tolerance,
        "tests": [_encode_text(test) if isinstance(test, ReadTest) else _encode_case(test) for test in read],
    }
    wire_source = _inside("wire")
    solution = Job(_inside("solution"), files={"wire.py": wire_source, "answer.py": code})
    referee = Job(_inside("referee"), files={"wire.py": wire_source, "tests.json": json.dumps(spec)})
    result = _meet(solution, referee, terms)
    return _read_verdicts(result, nonce, [len(test.units) if isinstance(test, ReadTest) else 1 for test in read])


def names_called(tests: Sequence[str], setup: str = "") -> list[str]:
    """What tests want of the program: names that they neither define, import nor find in Python, in order."""
    return [name for name in free_names([setup, *tests]) if name not in sys.stdlib_module_names]


def _meet(solution: Job, referee: Job, terms: Terms) -> Result:
    """Run both, joined by a socket pair. What the referee prints counts; of the other, only that its sandbox held."""
    level = terms.choose()
    limits = replace(terms.limits, wall_s=terms.seconds)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answering = RunningSandbox(solution, limits, level, packages=terms.packages, link=theirs.fileno())
        try:
            asking = RunningSandbox(
                referee, replace(limits, fork=False), level, packages=terms.packages, link=ours.fileno()
            )
            ours.close()
            theirs.close()
            result = asking.finish()
        finally:
            answering.stop()
            answering.finish()
    return result


def _read_verdicts(result: Result, nonce: str, sizes: Sequence[int]) -> list[Verdict]:
    """sizes: the number of units of each test."""
    found: list[dict[int, tuple[str, str]]] = [{} for _ in sizes]
    last = -1
    for line in result.stdout.splitlines():
        if line.startswith(nonce):
            _, place, unit, word, reason = line.split(" ", 4)
            last = int(place)
            if word == "cannot":
                raise ValueError(f"Test {last} cannot be judged: {reason}.")
            if word != "over":
                found[last].setdefault(int(unit), (word, reason))
    if last < len(sizes) - 1 and result.status in ("ok", "error", "signal"):
        raise SandboxError(f"The referee ended early ({result.status}): {result.stderr[-500:]!r}")
    return [
        _verdict(place, size, reported, result.status)
        for place, (size, reported) in enumerate(zip(sizes, found, strict=True))
    ]


def _verdict(place: int, size: int, reported: Mapping[int, tuple[str, str]], status: str) -> Verdict:
    """One test from the results of its units; a unit without a result was not reached. -1 is the test as a whole."""
    whole = reported.get(-1, ("fail", f"not reached: {status}"))
    units = [reported.get(unit, whole) for unit in range(size)]
    counted = [(word, reason) for word, reason in units if word != "idle"]
    if not counted:
        raise ValueError(f"Test {place} has the same outcome for every program: it asks nothing of the program.")
    reasons = [reason for word, reason in counted if word != "pass"]
    return Verdict(not reasons, reasons[0] if reasons else "", tuple(word == "pass" for word, _ in counted))


def _compare(test: IOTest, result: Result | None) -> Verdict:
    if result is None:
        return Verdict(False, "not run: no time left")
    if result.status != "ok":
        return Verdict(False, f"ended by {result.status}: {result.stderr[-200:]}")
    if not _same_output(_lines(result.stdout), _lines(test.stdout), test.tolerance):
        return Verdict(False, f"printed {result.stdout[:100]!r}")
    return Verdict(True)


def _same_output(printed: list[str], expected: list[str], tolerance: float | None) -> bool:
    if tolerance is None or len(printed) != len(expected):
        return printed == expected
    pairs = [(a.split(), b.split()) for a, b in zip(printed, expected, strict=True)]
    return all(len(a) == len(b) and all(map(_same_word, a, b, [tolerance] * len(a))) for a, b in pairs)


def _same_word(printed: str, expected: str, tolerance: float) -> bool:
    if printed == expected or not (_DECIMAL.fullmatch(expected) and _DECIMAL_OR_WHOLE.fullmatch(printed)):
        return printed == expected
    return math.isclose(float(printed), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _encode_case(case: CallCase) -> list[Any]:
    def refuse(value: Any) -> Any:
        raise ValueError(f"A case holds plain data only; got a {type(value).__name__}.")

    keywords = {str(name): value for name, value in case.keywords.items()}
    accepted = [case.expected, *case.or_expected]
    return [wire.encode(part, refuse) for part in (list(case.arguments), keywords, accepted)]


def _encode_text(test: ReadTest) -> dict[str, Any]:
    return {"code": test.code.hex(), "steps": test.steps}


@cache
def _inside(name: str) -> str:
    """A program of `inside/`, compiled once here and not in each of its runs: the interpreter is the same."""
    path = Path(__file__).parent / "inside" / f"{name}.py"
    code = compile(path.read_text(encoding="utf-8"), path.name, "exec", dont_inherit=True)
    return f"exec(__import__('marshal').loads(bytes.fromhex({marshal.dumps(code).hex()!r})))"
