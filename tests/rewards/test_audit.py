"""What reward functions pay for right answers in honest dresses, and for wrong ones that look like them."""

import gzip
import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from audited_functions import compiles

from llm_pg.cli import main
from llm_pg.rewards import Audit, RewardError, Scorer, audit_rewards
from llm_pg.rewards.audit.programs import LOOP
from llm_pg.rewards.audit.tries import spread
from reward_fns import arithmetic, countdown, number_guessing, registry, sort_letters

DATA = Path(os.environ.get("LLM_PG_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (LLM_PG_REAL_DATA)")
MINE = Path(__file__).with_name("audited_functions.py")

SUMS = [{"prompt": f"Add {a} and {b}.", "answer": str(a + b)} for a, b in ((30, 42), (1000, 890), (4, 5), (60, 1))]
WORDS = [
    {"prompt": "The capital of France?", "answer": "Paris"},
    {"prompt": "And of Peru?", "answer": "Lima"},
]
FORMULAS = [
    {"prompt": "Half of it?", "answer": r"\frac{1}{2}"},
    {"prompt": "The root?", "answer": r"2\sqrt{3}"},
    {"prompt": "Expand.", "answer": "x^2+2x+1"},
    {"prompt": "Which?", "answer": "(1, 2)"},
    {"prompt": "How many?", "answer": "1,024"},
]
PROGRAMS = [
    {
        "prompt": "Double it.",
        "tests": ["assert f(1) == 2", "assert f(4) == 8", "assert f(0) == 0"],
        "solution": "def f(x):\n    return 2 * x",
    },
    {
        "prompt": "Is it odd?",
        "tests": ["assert odd(1) is True", "assert odd(4) is False", "assert odd(7) is True"],
        "solution": "def odd(x):\n    return x % 2 == 1",
    },
]
SUMS_PRINTED = [
    {
        "prompt": "Add.",
        "tests": [{"input": "1 2", "output": "3"}, {"input": "5 6", "output": "11"}],
        "solution": "print(sum(map(int, input().split())))",
    },
    {
        "prompt": "Turn round.",
        "tests": [{"input": "ab", "output": "ba"}, {"input": "xyz", "output": "zyx"}],
        "solution": "print(input()[::-1])",
    },
]
HUMANEVAL = [
    {
        "prompt": f'def {name}(x: int) -> int:\n    """{name} it."""\n',
        "test": f"def check(candidate):\n    assert candidate(1) == {one}\n    assert candidate(5) == {five}\n",
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
    }
    for name, body, one, five in (("triple", "3 * x", 3, 15), ("square", "x * x", 1, 25))
]
MBPP = [
    {
        "prompt": row["prompt"],
        "test_list": row["tests"],
        "test_setup_code": "",
        "code": row["solution"],
    }
    for row in PROGRAMS
]
APPS = [
    {
        "prompt": row["prompt"],
        "input_output": json.dumps(
            {"inputs": [t["input"] for t in row["tests"]], "outputs": [t["output"] for t in row["tests"]]}
        ),
        "solutions": json.dumps([row["solution"]]),
    }
    for row in SUMS_PRINTED
]
QUICK = {"seconds": 1.0}  # for the tests of a program that does not end
SUBJECTS: dict[str, list[tuple[Any, list[dict[str, Any]]]]] = {
    "apps_tests": [({"function": "apps_tests", **QUICK}, APPS)],
    "code_tests": [({"function": "code_tests", **QUICK}, rows) for rows in (PROGRAMS, SUMS_PRINTED)],
    "countdown": [("countdown", countdown.prompts(0, 8))],
    "exact_match": [("exact_match", WORDS), ("exact_match", SUMS)],
    "humaneval_tests": [({"function": "humaneval_tests", **QUICK}, HUMANEVAL)],
    "math_equivalence": [("math_equivalence", SUMS), ("math_equivalence", FORMULAS), ("math_equivalence", WORDS)],
    "mbpp_tests": [({"function": "mbpp_tests", **QUICK}, MBPP)],
    "number_guessing": [("number_guessing", number_guessing.prompts(0, 8))],
    "number_match": [
        ("number_match", arithmetic.prompts(0, 16)),
        *(({"function": "number_match", "form": form}, SUMS) for form in ("hashes", "box", "tag", "marked")),
        ({"function": "number_match", "tolerance": 1.5}, SUMS),
    ],
    "reasoning_gym": [],
    "sort_letters": [("sort_letters", sort_letters.prompts(0, 8))],
}
PAIRS = [(name, place) for name, subjects in SUBJECTS.items() for place in range(len(subjects))]


def audit(spec: Any, rows: list[dict[str, Any]], prompt: str = "prompt", **options: Any) -> Audit:
    with Scorer([spec], deadline=20.0) as scorer:
        return audit_rewards(scorer, [row[prompt] for row in rows], rows, **options)[0]


def test_every_shipped_function_that_checks_answers_declares_them_and_is_audited() -> None:
    checking = {name: one.info for name, one in registry.rewards().items() if one.info.checks == "answer"}
    assert set(checking) == set(SUBJECTS)
    assert [name for name, info in checking.items() if info.gold is None] == []


def test_the_function_of_every_shipped_task_is_audited() -> None:
    assert {import_module(module).REWARD for module in registry.tasks().values()} <= set(SUBJECTS)


@pytest.mark.faults
@pytest.mark.parametrize("name, place", PAIRS)
def test_no_shipped_function_pays_a_wrong_answer_or_loses_a_right_one(name: str, place: int) -> None:
    found = audit(*SUBJECTS[name][place])
    assert found.rows == len(SUBJECTS[name][place][1])
    assert found.right >= found.rows
    assert found.wrong > found.right or name == "countdown"
    assert (found.paid, found.lost) == ([], []), str(found)


@needs_data
def test_the_functions_of_the_recipes_pay_no_wrong_answer_to_their_own_rows() -> None:
    from recipes import grpo_gsm8k, json_extraction

    rows = [{**row, "answer": row["answer"].split("#### ")[1]} for row in spread(gsm8k("gsm8k_train"), 24)]
    for function, of in ((grpo_gsm8k.correct, rows), (json_extraction.extracted, json_extraction.bills(8))):
        found = audit(function, of)
        assert (found.paid, found.lost) == ([], []), str(found)
        assert len(found.unread) > 10  # one wants ####, the other JSON


@pytest.mark.slow
def test_reasoning_gym_pays_its_own_answers_and_no_others() -> None:
    gym = pytest.importorskip("reasoning_gym") and __import__("reward_fns.reasoning_gym", fromlist=["prompts"])
    found = audit("reasoning_gym", gym.prompts(0, 16))
    assert (found.paid, found.lost) == ([], []), str(found)


def test_a_form_that_a_function_does_not_read_is_no_loss() -> None:
    hashes = audit({"function": "number_match", "form": "hashes"}, SUMS)
    anything = audit("number_match", SUMS)
    assert hashes.right == 2 * len(SUMS)
    assert anything.right > 12 * len(SUMS)
    assert 0 < hashes.wrong < anything.wrong


@pytest.mark.faults
@pytest.mark.parametrize(
    "name, kinds",
    [
        ("last_digits", {"a minus before it", "as decimals of another", "as a denominator", "in a difference"}),
        ("anywhere", {"a digit before it", "the right answer in the thinking alone", "one answer or the other"}),
        ("first_number", {"another answer after thinking of the right one", "the other or the one"}),
        ("constant", {"nothing", "another row's answer", "all answers at once"}),
    ],
)
def test_the_holes_of_a_users_function_are_found_on_the_users_rows(name: str, kinds: set[str]) -> None:
    found = audit(f"{MINE}:{name}", SUMS)
    assert kinds <= {mistake.kind for mistake in found.paid}
    assert found.paid_rows == len(SUMS)


def test_an_honest_function_of_a_user_is_cleared_and_what_it_cannot_read_is_said() -> None:
    found = audit(f"{MINE}:whole_text", SUMS)
    assert (found.paid, found.lost) == ([], [])
    assert "in a box" in found.unread
    assert "alone" not in found.unread


def test_a_right_answer_that_is_lost_on_some_rows_is_shown_by_its_shortest_example() -> None:
    found = audit(f"{MINE}:whole_text_up_to_three_characters", SUMS)
    alone = next(mistake for mistake in found.lost if mistake.kind == "alone")
    assert (alone.rows, alone.of, alone.example, alone.score) == (1, 4, "1890", 0.0)
    assert found.lost_rows == 1


@pytest.mark.faults
def test_a_judge_of_programs_that_pays_whatever_compiles_is_found() -> None:
    found = audit(compiles, HUMANEVAL)
    assert {"returns None", "returns its first argument", "raises", LOOP, "exits with code 0"} <= {
        mistake.kind for mistake in found.paid
    }


@pytest.mark.parametrize("name, why", [("brief", "whatever the row's answer is"), ("length", "no column")])
def test_a_function_that_does_not_look_at_the_answer_is_not_accused(name: str, why: str) -> None:
    found = audit(f"{MINE}:{name}", SUMS)
    assert (found.paid, found.lost) == ([], [])
    assert why in found.note


def test_what_happens_to_be_right_is_not_tried_as_wrong() -> None:
    """0 times a root is 0, a prompt may name the answer in another writing, and a decoy must not be the answer."""
    rows = [
        {"prompt": "Of $18,000 and 5, which?", "answer": "that is it\n#### 18000"},
        {"prompt": "What is left?", "answer": "nothing\n#### 0"},
        {"prompt": "Sixty minutes are how many of them?", "answer": "#### 5"},
    ]
    for function in ("number_match", "math_equivalence"):
        found = audit(function, rows)
        assert (found.paid, found.lost) == ([], []), str(found)


def test_shape_functions_are_left_out() -> None:
    with Scorer(["number_match", {"function": "format_tags"}]) as scorer:
        first, second = audit_rewards(scorer, [row["prompt"] for row in SUMS], SUMS)
    assert first.rows == 4
    assert "form alone" in str(second)


@pytest.mark.faults
def test_an_audit_before_a_run_keeps_to_its_time_whatever_a_function_costs() -> None:
    rows = SUMS * 8
    with Scorer([f"{MINE}:slow"]) as scorer:
        scorer.grade(["p"], ["1"], [[0]], rows[:1])
        begin = time.perf_counter()
        found = audit_rewards(scorer, [row["prompt"] for row in rows], rows, seconds=1.0)[0]
    assert time.perf_counter() - begin < 2.0
    assert "rows were reached" in found.note
    assert found.rows < len(rows)


def test_what_may_cost_the_user_much_is_not_tried_in_a_hurry() -> None:
    def closure(completion: str, answer: str) -> float:
        return float(completion == answer)

    with Scorer([f"{MINE}:over_the_network", closure]) as scorer:
        hurried = audit_rewards(scorer, ["p"] * 4, SUMS, seconds=1.0)
        patient = audit_rewards(scorer, ["p"] * 4, SUMS)
    assert ["async" in hurried[0].note, "in this process" in hurried[1].note] == [True, True]
    assert [one.rows for one in patient] == [4, 4]


def test_an_audit_leaves_the_run_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Limits, warnings and paces of the scorer are those of the run, which the audit's failures do not touch."""
    with Scorer([f"{MINE}:raises_often"], max_unscorable=0.0) as scorer:
        found = audit_rewards(scorer, ["p"] * 4, SUMS)[0]
        assert "in bold" in found.unread
        assert scorer.grade(["p"], ["72"], [[0]], SUMS[:1]).reward == [1.0]
        caplog.clear()
        with pytest.raises(RewardError):
            scorer.grade(["p"], ["no number"], [[0]], SUMS[:1])
    assert "invalid literal for int()" in caplog.text  # the run's first failure is shown, though the audit met the same


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in SUMS * 4))
    settings = {
        "model": {"make": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "data": {"data_files": str(tmp_path / "rows.jsonl"), "num_eval_prompts": 0},
        "rollout": {"max_completion_length": 4, "num_generations": 2},
        "train": {"max_steps": 1, "prompts_per_step": 2, "use_cpu": True},
        "run": {"output_dir": str(tmp_path), "run_name": "r", "save_at_end": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name, code", [("last_digits", 1), ("whole_text", 0)])
def test_the_command_ends_with_1_where_a_wrong_answer_is_paid(
    name: str, code: int, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config), "--audit-rewards", f"reward_funcs=['{MINE}:{name}']"]) == code
    told = capsys.readouterr().out
    assert main(["check", str(config), "--audit-rewards", "--audit-rows=3", f"reward_funcs=['{MINE}:{name}']"]) == code
    assert f"{name}: 3 rows" in capsys.readouterr().out
    assert f"{name}: 16 rows" in told
    assert ("PAID 16 of 16 rows, a minus before it: '-9'" in told) == bool(code)
    assert ("95 % interval" in told) == bool(code)


@pytest.mark.parametrize("asked, code, said", [("warn", 0, True), ("stop", 1, True), ("none", 0, False)])
def test_a_run_warns_stops_or_says_nothing_before_its_first_step(
    asked: str, code: int, said: bool, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(config), f"reward_funcs=['{MINE}:last_digits']", f"audit_rewards={asked}"]
    assert main(words) == code
    told = "".join(capfd.readouterr())
    assert ("PAID" in told) is said
    metrics = config.parent / "r" / "metrics.jsonl"
    assert bool(metrics.exists() and metrics.read_text()) == (code == 0)


def test_a_function_that_breaks_its_contract_on_an_odd_text_is_told_and_does_not_end_the_run(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    infinite = f"reward_funcs=['{MINE}:infinite']"
    assert main(["train", str(config), infinite, "max_completion_length=1"]) == 0
    assert "The audit of the reward functions ended early" in "".join(capfd.readouterr())
    assert main(["check", str(config), infinite, "--audit-rewards"]) == 1
    assert "Audit: Reward function infinite must return" in capfd.readouterr().out


def gsm8k(name: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    return [{**json.loads(line), "prompt": json.loads(line)["question"]} for line in lines]


@needs_data
@pytest.mark.parametrize("function", ["number_match", "math_equivalence"])
def test_gsm8k_is_graded_without_a_mistake(function: str) -> None:
    found = audit(function, spread(gsm8k("gsm8k_train"), 64))
    assert (found.paid, found.lost) == ([], []), str(found)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("function", ["number_match", "math_equivalence"])
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_all_of_gsm8k_is_graded_without_a_mistake(function: str, name: str) -> None:
    found = audit(function, gsm8k(name))
    assert found.rows == len(gsm8k(name))
    assert (found.paid, found.lost) == ([], []), str(found)


@needs_data
@pytest.mark.slow
def test_all_of_humaneval_is_judged_without_a_mistake() -> None:
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    found = audit({"function": "humaneval_tests", "seconds": 2.0}, rows)
    assert (found.rows, found.right) == (164, 5 * 164)
    assert (found.paid, found.lost) == ([], []), str(found)
