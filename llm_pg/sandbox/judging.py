"""Judge a program by tests, so that only its answers count.

What a test expects never enters the process that runs the model's code: standard output is compared out here, and
functions are called by a referee in a sandbox of its own (`inside/`). An exit code, a patched `assert` or an object
that equals everything therefore decides nothing. What remains possible is what a test set cannot tell from an answer:
values known from the prompt, or guessed.
"""

import ast
import builtins
import json
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from llm_pg.sandbox.inside import wire
from llm_pg.sandbox.launch import Running
from llm_pg.sandbox.runs import choose, num_processors
from llm_pg.sandbox.spec import Job, Level, Limits, Result, SandboxError

_LEAST_WALL_S = 0.05
_SLOW_SHARE = 0.1  # of the seconds: a run that takes longer is to blame when they are not enough


@dataclass(frozen=True)
class IOTest:
    """Standard input, and the standard output it must give; white space at line ends and at the end is ignored."""

    stdin: str
    stdout: str

    def __post_init__(self) -> None:
        if not self.stdout.strip():
            raise ValueError("A test that expects no output is passed by a program that does nothing. Leave it out.")


@dataclass(frozen=True)
class Case:
    """A call of the function under test, and the value it must return: plain data, lists and tuples alike."""

    arguments: Sequence[Any]
    expected: Any
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether one test was passed, and if not, why."""

    passed: bool
    reason: str = ""


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
        return Running(Job(code, test.stdin), limits, level, packages=terms.packages).finish()

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
    tests: Sequence[str | Case],
    *,
    setup: str = "",
    tolerance: float = 1e-6,
    terms: Terms | None = None,
) -> list[Verdict]:
    """Judge functions (or classes) of the program by statements that must not raise, or by cases.

    names: what the tests may use of the program, and nothing else of it; the first is what cases call.
    tests: Python source with assert statements, or a `Case`. setup: trusted source that every statement test needs.
    tolerance: relative and absolute, where a case's value is a float.

    Plain data crosses in both directions: numbers, text, bytes, lists, tuples, dicts, sets, iterators (taken as
    lists), arrays. Other objects stay with the program; a test can call them and read their attributes but not compare
    them. A function that returns None changes the lists, dicts and sets that it was given, as in-place functions do.
    The tests run in order in `seconds`; those after one that hangs or ends the program are failed.

    Raises ValueError for a test that is no Python or passes a function, SandboxError when the sandbox failed.
    """
    terms = terms or Terms()
    free = _free_names([test for test in tests if isinstance(test, str)], setup)
    imports = [f"import {name}" for name in free if name in sys.stdlib_module_names and name not in names]
    if not names:
        raise ValueError("Name at least one function of the program that the tests call.")
    nonce = secrets.token_hex(16)
    spec = {
        "nonce": nonce,
        "names": list(names),
        "setup": "\n".join([setup, *imports]),  # tests rely on modules that the answer would have imported
        "tolerance": tolerance,
        "tests": [test if isinstance(test, str) else _encode_case(test) for test in tests],
    }
    wire_source = _inside("wire")
    solution = Job(_inside("solution"), files={"wire.py": wire_source, "answer.py": code})
    referee = Job(_inside("referee"), files={"wire.py": wire_source, "tests.json": json.dumps(spec)})
    result = _meet(solution, referee, terms)
    return _read_verdicts(result, nonce, len(tests))


def names_called(tests: Sequence[str], setup: str = "") -> list[str]:
    """What tests want of the program: names that they neither define, import nor find in Python, in order."""
    return [name for name in _free_names(tests, setup) if name not in sys.stdlib_module_names]


def _free_names(tests: Sequence[str], setup: str) -> list[str]:
    used: dict[str, None] = {}
    bound = set(dir(builtins))
    for node in (node for source in (setup, *tests) for node in ast.walk(_check_source(source))):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return [name for name in used if name not in bound]


def _meet(solution: Job, referee: Job, terms: Terms) -> Result:
    """Run both, joined by a socket pair. What the referee prints counts; of the other, only that its sandbox held."""
    level = terms.choose()
    limits = replace(terms.limits, wall_s=terms.seconds)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answering = Running(solution, limits, level, packages=terms.packages, link=theirs.fileno())
        try:
            asking = Running(referee, replace(limits, fork=False), level, packages=terms.packages, link=ours.fileno())
            ours.close()
            theirs.close()
            result = asking.finish()
        finally:
            answering.stop()
            answering.finish()
    return result


def _read_verdicts(result: Result, nonce: str, num_tests: int) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for line in result.stdout.splitlines():
        if line.startswith(nonce):
            _, word, reason = line.split(" ", 2)
            if word == "cannot":
                raise ValueError(f"Test {len(verdicts)} cannot be judged: {reason}.")
            verdicts.append(Verdict(word == "pass", reason if word != "pass" else ""))
    if len(verdicts) < num_tests and result.status in ("ok", "error", "signal"):
        raise SandboxError(f"The referee ended early ({result.status}): {result.stderr[-500:]!r}")
    return verdicts + [Verdict(False, f"not reached: {result.status}")] * (num_tests - len(verdicts))


def _compare(test: IOTest, result: Result | None) -> Verdict:
    if result is None:
        return Verdict(False, "not run: no time left")
    if result.status != "ok":
        return Verdict(False, f"ended by {result.status}: {result.stderr[-200:]}")
    if _lines(result.stdout) != _lines(test.stdout):
        return Verdict(False, f"printed {result.stdout[:100]!r}")
    return Verdict(True)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _encode_case(case: Case) -> list[Any]:
    def refuse(value: Any) -> Any:
        raise ValueError(f"A case holds plain data only; got a {type(value).__name__}.")

    keywords = {str(name): value for name, value in case.keywords.items()}
    return [wire.encode(part, refuse) for part in (list(case.arguments), keywords, case.expected)]


def _check_source(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"A test is not Python: {error}. It begins {source[:80]!r}.") from error


@cache
def _inside(name: str) -> str:
    return (Path(__file__).parent / "inside" / f"{name}.py").read_text(encoding="utf-8")
