"""Does the judge of programs pay a wrong one, or lose a right one? HumanEval's solutions and six wrong programs each.

    python recipes/benchmarks/humaneval_judge.py HumanEval.jsonl.gz             # 164 problems, about 4 minutes
    python recipes/benchmarks/humaneval_judge.py HumanEval.jsonl.gz --every 8

The truth beside each reward comes by another way: a process of its own, without the sandbox, runs the program and the
problem's `check` once for each statement with an assertion, all other such statements taken out. A wrong program may
pass some of them; no reward may be above that share. The programs here are ours and the problems', so they may run.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_pg.rewards.audit.programs import LOOP, wrong_bodies
from reward_fns.code_sets import humaneval_tests

SECONDS = 1.0  # for the tests of a program, here and in the truth

_PASSED = "passed-2f1d"
# The timer kills the process: a program may catch whatever is raised, and may not get past a test that it hangs in.
_TRUTH = f"""
import json, os, signal, sys
for text in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
    try:
        exec(compile(text, "truth.py", "exec"), {{"__name__": "truth"}})
    except BaseException:
        continue
    os.write(1, b"{_PASSED}\\n")
"""


@dataclass(frozen=True)
class Judged:
    """One program: its kind, the reward, the share of tests that it truly passes, and what the judgement took.

    seconds: by the clock. cpu_seconds: of processor time, whatever else the machine did.
    """

    problem: str
    kind: str
    reward: float
    truth: float
    seconds: float
    cpu_seconds: float


def read_problems(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def programs(problem: dict[str, Any], following: dict[str, Any]) -> dict[str, str]:
    """Completions of a problem's prompt by kind, the right ones first."""
    function = _function(problem["prompt"], problem["entry_point"])
    whole = problem["prompt"] + problem["canonical_solution"]
    wrong = wrong_bodies(function.args.args[0].arg)
    return {
        "solution, as a continuation": problem["canonical_solution"],
        "solution, in a fenced block": f"Here it is.\n```python\n{whole}\n```\nIt works.",
        **{kind: textwrap.indent(body, "    ") + "\n" for kind, body in wrong.items()},
        "body of the next problem": following["canonical_solution"],
    }


def is_right(kind: str) -> bool:
    return kind.startswith("solution")


def judge(problem: dict[str, Any], kind: str, completion: str) -> Judged:
    """The reward of a completion, and the truth about it."""
    row = {name: problem[name] for name in ("prompt", "test", "entry_point")}
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    reward = humaneval_tests(completion, **row, seconds=SECONDS if kind == LOOP else 6.0)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu_start
    code = problem["prompt"] + (problem["canonical_solution"] if is_right(kind) else completion)
    truth = true_share(code, problem["test"], problem["entry_point"])
    return Judged(problem["task_id"], kind, reward, truth, seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def true_share(code: str, test: str, entry: str) -> float:
    """The share of the statements of `check` with an assertion that the program passes, each run alone."""
    texts = [f"{code}\n{text}\ncheck({entry})\n" for text in _one_by_one(test)]
    command = [sys.executable, "-I", "-c", _TRUTH, str(SECONDS)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    return done.stdout.count(_PASSED) / len(texts)


def _one_by_one(test: str) -> Iterator[str]:
    """The test with one only of the statements of `check` that assert something, for each of them."""
    place, count = 0, 1
    while place < count:
        tree = ast.parse(test)
        check = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check")
        asserting = [node for node in check.body if _asserts(node)]
        count = len(asserting)
        others = [node for node in asserting if node is not asserting[place]]
        check.body = [node for node in check.body if node not in others]
        yield ast.unparse(tree)
        place += 1


def _asserts(statement: ast.stmt) -> bool:
    found = [node for node in ast.walk(statement) if isinstance(node, ast.Assert)]
    return any(not (isinstance(node.test, ast.Constant) and node.test.value) for node in found)


def _function(prompt: str, name: str) -> ast.FunctionDef:
    return next(n for n in ast.parse(prompt).body if isinstance(n, ast.FunctionDef) and n.name == name)


def judge_all(problems: list[dict[str, Any]], every: int) -> Iterator[Judged]:
    for place in range(0, len(problems), every):
        following = problems[(place + 1) % len(problems)]
        for kind, completion in programs(problems[place], following).items():
            yield judge(problems[place], kind, completion)


def table(results: list[Judged]) -> str:
    lines = [
        "| program | n | earn 1 | earn over 0 | mean reward | mean truth | above the truth |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(result.kind for result in results):
        of = [result for result in results if result.kind == kind]
        full, some = sum(r.reward == 1 for r in of), sum(r.reward > 0 for r in of)
        above = sum(r.reward > r.truth + 1e-9 for r in of)
        mean, truth = statistics.mean(r.reward for r in of), statistics.mean(r.truth for r in of)
        lines.append(f"| {kind} | {len(of)} | {full} | {some} | {mean:.3f} | {truth:.3f} | {above} |")
    return "\n".join([*lines, "", _cost([result for result in results if result.kind != LOOP])])


def _cost(results: list[Judged]) -> str:
    wall, cpu = (
        [1000 * seconds for seconds in column]
        for column in zip(*((r.seconds, r.cpu_seconds) for r in results), strict=True)
    )
    most = statistics.quantiles(wall, n=20)[-1]
    return (
        f"A judgement took {statistics.median(wall):.0f} ms at the median, {most:.0f} ms at the 95th percentile; of "
        f"processor time {statistics.median(cpu):.0f} ms at the median."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=Path, help="HumanEval.jsonl.gz")
    parser.add_argument("--every", type=int, default=1, help="only every n-th problem")
    arguments = parser.parse_args()
    results = list(judge_all(read_problems(arguments.problems), arguments.every))
    print(table(results))
    for result in results:
        if result.reward > result.truth + 1e-9 or (is_right(result.kind) and result.reward < 1):
            print(result)


if __name__ == "__main__":
    main()
