"""Programs judged by the tests of HumanEval, MBPP and APPS, read as their datasets hold them: one name each.

    reward_funcs: [humaneval_tests]        # columns prompt, test, entry_point
    reward_funcs: [mbpp_tests]             # columns test_list, test_setup_code or test_imports
    reward_funcs: [apps_tests]             # column input_output

The judge, the score and the options are those of `code_tests`; where all tests of a row expect one answer, nothing is
taken off for a constant. `reward_fns.code.extract_code` says which part of a completion is the program.
"""

import ast
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llm_pg.sandbox import Limits
from llm_pg.sandbox.judging import CallCase, IOTest, Terms, names_called
from reward_fns.code import FENCE, Suite, extract_code, pairs, program_of, score
from reward_fns.registry import Gold, reward

# Where a continuation of a function ends that runs on (Chen et al., 2021, arXiv:2107.03374, section 3.1).
_RUNS_ON = re.compile(r"\n(?=class|def|#|if|print|@|```)")
_START = re.compile(r"(from|import|def|class|async def|@|[A-Za-z_]\w* *=)")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)


def check_humaneval(test: str, entry_point: str, prompt: Any = "", packages: bool = False, **row: Any) -> None:
    """ValueError for a row of `humaneval_tests` that cannot be judged."""
    humaneval_suite(_text_of(prompt), test, entry_point, packages).answers()


def humaneval_gold(entry_point: str, prompt: Any = "", canonical_solution: str = "", **row: Any) -> Gold:
    """The canonical solution, whole and as a continuation of the prompt."""
    if not canonical_solution:
        return Gold("", "program", entry=entry_point)
    whole = complete(canonical_solution, _text_of(prompt), entry_point) or ""
    return Gold(whole, "program", entry=entry_point, more=(("as a continuation", canonical_solution),))


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_humaneval, gold=humaneval_gold)
def humaneval_tests(
    completion: str,
    prompt: Any,
    test: str,
    entry_point: str,
    partial: bool = True,
    seconds: float = 6.0,
    cpu_s: float = 3.0,
    memory_mb: int = 512,
    packages: bool = False,
    **row: Any,
) -> float:
    """The share of a HumanEval problem's own assertions that the completion passes; all or none with `partial` false.

    prompt: the head of a function, alone or anywhere in an instruction or conversation. The completion is either its
    continuation (cut where it runs on into another definition), or a text whose last block of Python defines
    `entry_point`; the imports and helpers of the prompt come before it. test: a text that defines `check(candidate)`;
    helpers that it uses are the prompt's, not the completion's.

    Range [0, 1]. Floor 0, as `code_tests` counts it, but on rows whose tests all expect one answer.
    """
    source = _text_of(prompt)
    program = complete(extract_code(completion), source, entry_point)
    terms = Terms(seconds, Limits(wall_s=seconds, cpu_s=cpu_s, memory_mb=memory_mb), packages=packages)
    return score(program, humaneval_suite(source, test, entry_point, packages), terms, partial=partial)


@lru_cache(maxsize=256)
def humaneval_suite(prompt: str, test: str, entry_point: str, packages: bool = False) -> Suite:
    """The suite of a row in HumanEval's format."""
    head = _head(prompt, entry_point)
    setup = _without(head, entry_point) if head else ""
    names = dict.fromkeys((entry_point, *names_called([test], setup)))
    return Suite((test,), entry_point, tuple(names), setup, packages=packages)


def complete(code: str | None, prompt: str, entry_point: str) -> str | None:
    """A whole program from a completion and the text of the prompt that it completes."""
    if code is None:
        return None
    head = _head(prompt, entry_point)
    if head is None:
        return code
    if re.search(
        rf"^(async +def|def|class) +{re.escape(entry_point)}\b|^{re.escape(entry_point)} *=", code, re.MULTILINE
    ):
        return "".join(_FUTURE.findall(code)) + _without(head, entry_point) + "\n\n" + _FUTURE.sub("", code)
    first = next(line for line in code.split("\n") if line.strip())
    indent = head[len(head.rstrip(" \t")) :]  # the prompt ends within the line that the completion goes on with
    if indent:
        code = indent + code.lstrip(" \t") if code.startswith(first) else code
    elif first == first.lstrip():
        code = textwrap.indent(code, "    ")
    return head.rstrip() + "\n" + _RUNS_ON.split(code, maxsplit=1)[0]


def _text_of(prompt: Any) -> str:
    """The prompt as text; of a conversation, what the user said last."""
    if isinstance(prompt, str):
        return prompt
    content = next(message["content"] for message in reversed(prompt) if message.get("role") == "user")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@lru_cache(maxsize=256)
def _head(prompt: str, name: str) -> str | None:
    """The Python in a prompt that begins the function or class `name`; None where there is none.

    The text itself, a fenced block of it, or the longest run of its lines that is Python and defines the name.
    """
    blocks = re.findall(rf"^[ \t]*{FENCE}\w*\n(.*?)^[ \t]*{FENCE}", prompt, re.MULTILINE | re.DOTALL)
    lines = prompt.splitlines(keepends=True)
    starts = [place for place, line in enumerate(lines) if _START.match(line)]
    runs = ("".join(lines[start:end]) for start in starts for end in range(len(lines), start, -1))
    return next((text for text in (*blocks, prompt, *_limited(runs)) if _defines(text, name)), None)


def _limited(runs: Any, most: int = 2000) -> Any:
    return (run for run, _ in zip(runs, range(most), strict=False))


def _defines(text: str, name: str) -> bool:
    return any(getattr(node, "name", None) == name for node in _statements(text))


def _statements(head: str) -> list[ast.stmt]:
    """The statements of a head, whose last function may still be without a body; none where it is no Python."""
    for text in (head, f"{head.rstrip()}\n    pass"):
        try:
            return ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return []


def _without(head: str, name: str) -> str:
    """The imports and helpers of the head, without the function itself."""
    return "\n".join(ast.unparse(node) for node in _statements(head) if getattr(node, "name", None) != name)


def check_mbpp(
    test_list: Any, test_setup_code: str = "", test_imports: Any = (), packages: bool = False, **row: Any
) -> None:
    """ValueError for a row of `mbpp_tests` that cannot be judged."""
    mbpp_suite(test_list, test_setup_code, test_imports, packages).answers()


def mbpp_gold(test_list: Any, test_setup_code: str = "", test_imports: Any = (), **row: Any) -> Gold:
    """The row's code, and the function that its tests call."""
    names = mbpp_suite(test_list, test_setup_code, test_imports, bool(row.get("packages", False))).names
    return Gold(program_of(row), "program", entry=names[0])


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_mbpp, gold=mbpp_gold)
def mbpp_tests(
    completion: str,
    test_list: Any,
    test_setup_code: str = "",
    test_imports: Any = (),
    partial: bool = True,
    seconds: float = 6.0,
    cpu_s: float = 3.0,
    memory_mb: int = 512,
    packages: bool = False,
    **row: Any,
) -> float:
    """The share of an MBPP problem's assertions that the program passes; all or none with `partial` false.

    test_list: texts with assert statements, which say themselves what they call. test_setup_code, test_imports: what
    they need, of the full and of the sanitized set.

    Range [0, 1]. Floor 0, as `code_tests` counts it, but on rows whose tests all expect one answer.
    """
    terms = Terms(seconds, Limits(wall_s=seconds, cpu_s=cpu_s, memory_mb=memory_mb), packages=packages)
    suite = mbpp_suite(test_list, test_setup_code, test_imports, packages)
    return score(extract_code(completion), suite, terms, partial=partial)


def mbpp_suite(test_list: Any, test_setup_code: str = "", test_imports: Any = (), packages: bool = False) -> Suite:
    """The suite of a row in MBPP's format."""
    tests = json.loads(test_list) if isinstance(test_list, str) else test_list
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"mbpp_tests needs a list of texts in the column 'test_list'; got {str(test_list)[:80]!r}.")
    setup = "\n".join([*(test_imports or ()), test_setup_code or ""])
    names = names_called(tests, setup)
    if not names:
        raise ValueError(f"The tests call nothing of the program: {str(test_list)[:120]!r}.")
    return Suite(tuple(tests), None, tuple(names), setup, packages=packages)


def check_apps(input_output: Any, max_tests: int = 20, **row: Any) -> None:
    """ValueError for a row of `apps_tests` that cannot be judged."""
    apps_suite(input_output, max_tests)


def apps_gold(input_output: Any, max_tests: int = 20, **row: Any) -> Gold:
    """The first of the row's solutions, and the function that is called, if one is."""
    return Gold(program_of(row), "program", entry=apps_suite(input_output, max_tests).entry or "")


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", check_row=check_apps, gold=apps_gold)
def apps_tests(
    completion: str,
    input_output: Any,
    max_tests: int = 20,
    partial: bool = True,
    seconds: float = 8.0,
    cpu_s: float = 3.0,
    memory_mb: int = 512,
    packages: bool = False,
    workers: int = 1,
    **row: Any,
) -> float:
    """The share of an APPS problem's tests that the program passes; all or none with `partial` false.

    input_output: JSON text or a mapping with "inputs" and "outputs", each a text or a list of lines that the program
    reads and must print; numbers with a decimal point agree within 1e-6. With "fn_name" (call-based problems) inputs
    are lists of arguments of that function, or of that method of the program's class Solution, and outputs are values,
    which the set also wraps in a list of one. max_tests: that many are used, spread evenly over the row's.

    Range [0, 1]. Floor 0, as `code_tests` counts it, but on rows whose tests all expect one answer.
    """
    limits = Limits(wall_s=seconds, cpu_s=cpu_s, memory_mb=memory_mb)
    terms = Terms(seconds, limits, packages=packages, workers=workers)
    return score(extract_code(completion), apps_suite(input_output, max_tests), terms, partial=partial)


def apps_suite(input_output: Any, max_tests: int = 20) -> Suite:
    """The suite of a row in the format of APPS (and TACO, CodeContests as converted to it)."""
    text = input_output if isinstance(input_output, str) else json.dumps(input_output)
    return _apps_suite(text, max_tests)


@lru_cache(maxsize=64)
def _apps_suite(text: str, max_tests: int) -> Suite:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The column 'input_output' is no JSON ({error}); it begins {text[:80]!r}.") from None
    if not isinstance(content, Mapping) or not {"inputs", "outputs"} <= content.keys():
        raise ValueError(f"apps_tests needs 'inputs' and 'outputs' in the column 'input_output'; got {text[:80]!r}.")
    found = list(pairs(content["inputs"], content["outputs"]))
    count = min(max_tests, len(found))
    chosen = [found[place * len(found) // count] for place in range(count)]
    name = content.get("fn_name")
    if name is None:
        return Suite(tuple(IOTest(_lines(given), _lines(wanted), 1e-6) for given, wanted in chosen))
    return Suite(tuple(_case(given, wanted) for given, wanted in chosen), name, (name,), method_of="Solution")


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _case(given: Any, wanted: Any) -> CallCase:
    if isinstance(given, str):
        given = [json.loads(line) for line in given.splitlines()]
    if not isinstance(given, list):
        raise ValueError(f"The inputs of a call are a list of its arguments; got {str(given)[:80]!r}.")
    return CallCase(given, wanted, {}, tuple(wanted) if isinstance(wanted, list) and len(wanted) == 1 else ())
