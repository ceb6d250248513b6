"""`reward_fns.code_sets`: rows as HumanEval, MBPP and APPS hold them, and HumanEval with right and wrong code."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import Config, ConfigError
from llm_pg.rewards import Scorer
from llm_pg.rewards.specs import resolve
from llm_pg.run.before.preflight import check_inputs
from recipes.benchmarks.humaneval_judge import LOOP, Judged, is_right, judge, judge_all, programs, read_problems
from reward_fns.code_sets import apps_tests, complete, humaneval_tests, mbpp_tests

DATA = Path(os.environ.get("LLM_PG_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HUMANEVAL = DATA / "HumanEval.jsonl.gz"
needs_data = pytest.mark.skipif(not HUMANEVAL.exists(), reason=f"{HUMANEVAL} is not there (LLM_PG_REAL_DATA)")

PROMPT = (
    "import math\n\ndef double(x):\n    return 2 * x\n\ndef area(r: float) -> float:\n"
    '    """Twice the area of a circle.\n    >>> round(area(1), 2)\n    6.28\n    """\n'
)
TEST = (
    "\n\nMETADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert True, 'prints'\n"
    "    assert abs(candidate(1) - double(math.pi)) < 1e-6\n    assert abs(candidate(2) - double(4 * math.pi)) < 1e-6\n"
)
BODY = "    return double(math.pi * r * r)\n"
ROW = {"prompt": PROMPT, "test": TEST, "entry_point": "area"}


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        BODY + "\n\ndef other():\n    return (\n\nprint(area(1))",  # it runs on
        f"```python\n{PROMPT}{BODY}```",
        f"```python\ndef area(r):\n{BODY}```",  # the head of the prompt comes before it
        "<think>def area(r): return 0</think>Here:\n```python\n"
        f"from __future__ import annotations\ndef area(r: X):\n{BODY}```",
        f"```python\n{BODY}```",
        "return double(math.pi * r * r)",
        "area = lambda r: 2 * math.pi * r ** 2",
    ],
)
def test_a_completion_of_any_form_is_completed_by_its_prompt(completion: str) -> None:
    assert humaneval_tests(completion, **ROW) == 1.0
    asked = {**ROW, "prompt": [{"role": "user", "content": f"Complete this:\n\n{PROMPT}\nAnswer with one block."}]}
    assert humaneval_tests(completion, **asked) == 1.0
    assert humaneval_tests(completion, **{**ROW, "prompt": f"Do it.\n```python\n{PROMPT}```\nOnly code."}) == 1.0


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I cannot.",
        "    return 0",
        "    pass",
        "def area(r): return 0\ndef double(x): return 0",
        "import os\nos._exit(0)",
    ],
)
def test_a_helper_of_the_answers_own_does_not_decide(completion: str) -> None:
    assert humaneval_tests(completion, **ROW) == 0.0


def test_a_prompt_that_ends_within_a_line_is_gone_on_with() -> None:
    code = complete("return x\n    # more", "def f(x):\n    ", "f")
    assert code == "def f(x):\n    return x\n    # more"


MBPP = {
    "test_list": [
        "assert total(Node(1, Node(2, None))) == sum(3)",
        "assert total(Node(5, None)) == 5",
        "assert total(None) == 0",
    ],
    "test_setup_code": "def sum(x):\n    return x",
}


def test_mbpp_rows_are_judged_with_their_setup() -> None:
    node = "class Node:\n    def __init__(self, v, n): self.v, self.n = v, n\n"
    assert mbpp_tests(node + "def total(n): return n.v + total(n.n) if n else 0", **MBPP) == 1.0
    assert mbpp_tests(node + "def total(n): return n.v if n else 0", **MBPP) == pytest.approx(0.5)
    assert mbpp_tests("def total(n): return 0", **MBPP) == 0.0
    sanitized = {
        "test_list": ["assert math.isclose(half(1), 0.5)", "assert half(4) == 2"],
        "test_imports": ["import math"],
    }
    assert mbpp_tests("def half(x): return x / 2", **sanitized) == 1.0
    assert mbpp_tests("def half(x): return 0.5", **sanitized) == 0.0
    assert mbpp_tests("def half(x): return 0.5", **sanitized, partial=False) == 0.0


def test_apps_rows_are_judged_by_output_and_by_calls() -> None:
    pairs = json.dumps({"inputs": ["1\n2\n", ["3", "4"]], "outputs": ["3\n1.50\n", ["7", "3.50"]]})
    code = "a, b = int(input()), int(input())\nprint(a + b)\nprint((a + b) / 2)"
    assert apps_tests(code, pairs) == 1.0
    assert apps_tests(code.replace("/ 2", "// 2"), pairs) == 0.0
    for wrapped in (False, True):
        outputs = [[[2, 3]], [[4]]] if wrapped else [[2, 3], [4]]
        calls = {"fn_name": "inc", "inputs": [[[1, 2]], [[3]]], "outputs": outputs}
        assert apps_tests("def inc(xs): return [x + 1 for x in xs]", calls) == 1.0
        assert apps_tests("class Solution:\n    def inc(self, xs):\n        return [x + 1 for x in xs]", calls) == 1.0
        assert apps_tests("def inc(xs): return xs", calls) == 0.0
        assert apps_tests("def other(xs): return xs", calls) == 0.0


@pytest.mark.faults
def test_rows_that_cannot_be_judged_are_named_before_the_run(tmp_path: Path) -> None:
    rows = [
        {"prompt": PROMPT, "test": TEST, "entry_point": "area"},
        {"prompt": PROMPT, "test": "def check(c):\n    c(1) == 2", "entry_point": "area"},
        {"prompt": PROMPT, "test": "", "entry_point": "area"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    config = Config()
    config.model.make, config.data.num_eval_prompts = {"model_type": "llama"}, 8
    config.data.data_files, config.reward.reward_funcs = [str(path)], ["humaneval_tests"]
    config.rollout.rollout_batch_size = config.train.per_device_train_batch_size = 8
    with pytest.raises(ConfigError, match=r"cannot grade 16 of 24 rows\. The first is row 1 of rows.jsonl.*compares"):
        check_inputs(config)
    path.write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(24)))
    check_inputs(config)
    with pytest.raises(ValueError, match=r"1 of 1 rows\..*1 inputs do not fit 0 outputs"):
        resolve("apps_tests").check_rows([{"input_output": '{"inputs": ["1"], "outputs": []}'}])
    for bad in ("no json", '{"a": 1}', '{"inputs": ["1"], "outputs": [" "]}', '{"inputs": [], "outputs": []}'):
        with pytest.raises(ValueError, match="apps_tests cannot grade 1 of 1 rows"):
            resolve("apps_tests").check_rows([{"input_output": bad}])
    for bad_list in ([], None, [1], ["assert 1 == 1"], ["f(1) == 2"], ["assert f(1)", "f("]):
        with pytest.raises(ValueError, match="mbpp_tests cannot grade"):
            resolve("mbpp_tests").check_rows([{"test_list": bad_list}])


def test_a_worker_scores_the_rows_of_each_set() -> None:
    with Scorer(["humaneval_tests"], workers=1, strict=True) as scorer:
        row = {"test": TEST, "entry_point": "area"}
        assert scorer.grade([PROMPT] * 2, [BODY, "    return 1"], [[0]] * 2, [row] * 2).reward == [1.0, 0.0]
    with Scorer(["mbpp_tests"], workers=1, strict=True) as scorer:
        assert scorer.grade(["?"], ["def total(n): return 0"], [[0]], [MBPP]).reward == [0.0]


def check_results(results: list[Judged]) -> None:
    assert [r for r in results if is_right(r.kind) and (r.reward != 1 or r.truth != 1)] == []
    assert [r for r in results if r.reward > r.truth + 1e-9] == []
    assert [r for r in results if not is_right(r.kind) and r.reward == 1] == []


@needs_data
@pytest.mark.faults
def test_humaneval_pays_its_solutions_and_no_wrong_program_above_its_truth() -> None:
    """Cases A1 and A3 on some problems, those with helpers among them; the whole is in the slow test below."""
    problems = read_problems(HUMANEVAL)
    results = []
    for place in (12, 32, 38, 50):
        completions: dict[str, Any] = programs(problems[place], problems[place + 1])
        results += [judge(problems[place], kind, text) for kind, text in completions.items() if kind != LOOP]
    check_results(results)


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_of_humaneval_is_judged_as_it_should_be() -> None:
    results = list(judge_all(read_problems(HUMANEVAL), every=1))
    assert len(results) == 164 * 8
    check_results(results)
