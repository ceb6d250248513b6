"""Every recipe runs whole at a small size, and does what its first lines promise."""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_pg import shipped
from llm_pg.config import load_config
from llm_pg.metrics import read_metrics

FOLDER = shipped.folder("recipes")
MOST_LINES = 150
SMALL = [
    "max_steps=2",
    "prompts_per_step=2",
    "per_device_train_batch_size=4",
    "num_generations=4",
    "max_completion_length=6",
    "num_eval_prompts=4",
    "eval_num_samples=0",
    "use_cpu=true",
    "dtype=float32",
    "bf16=false",
    "gradient_checkpointing=false",
    "reward_workers=1",
    "noise_steps=0",
]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A recipe as a module, from a copy as `llm-pg cp` makes it: outside the package, without its neighbours but
    those that it imports."""
    names = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str) -> Any:
        copied = shipped.copy(name, str(tmp_path))
        spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), copied)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as an import would: workers and dataclasses look it up
        names.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in names:
        del sys.modules[name]


@pytest.fixture
def small(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> list[str]:
    """Settings that put a tiny local model in the place of a hub model."""
    make_model("qwen2", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return [*SMALL, f"model_name_or_path={tmp_path}/model", f"output_dir={tmp_path}/runs"]


@pytest.mark.parametrize(
    "name", ["grpo_gsm8k.py", "json_extraction.py", "conversational_reward.py", "hacked_reward.py"]
)
def test_workers_that_load_a_recipes_reward_functions_load_no_torch(name: str) -> None:
    code = (
        "import sys; from pathlib import Path; from llm_pg.files import load_file; "
        f"load_file(Path({str(FOLDER / name)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent).returncode == 0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["dataset_name=null", f"data_files={path}"]


def sums(n: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} and {i}?", "answer": f"{i}+{i}=<<{2 * i}>>\n#### {2 * i}"} for i in range(n)]


def trained(folder: Path, steps: int = 2) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(line["unscorable"] == 0 for line in lines)
    return lines


def test_no_recipe_is_longer_than_a_person_reads_at_once() -> None:
    found = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert len(found) >= 16
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES} == {}


def test_grpo_on_gsm8k_reads_files_of_its_format_and_scores_by_the_last_number(
    recipe: Any, small: list[str], tmp_path: Path
) -> None:
    made = recipe("grpo_gsm8k.py")
    made.main([*small, *write_rows(tmp_path / "train.jsonl", sums(12))])
    lines = trained(tmp_path / "runs" / "grpo-gsm8k")
    assert {"reward/correct", "reward/form"} <= set(lines[0])
    assert made.correct("2 and 2 are 4.\n#### $1,004", "1004") == 1.0
    assert made.correct("#### 4 or #### 5", "4") == made.correct("4", "4") == made.form("#### 1 #### 2") == 0.0


def test_rloo_on_countdown_trains_a_made_model(recipe: Any, tmp_path: Path) -> None:
    few = ["num_train_prompts=24", "warm_start_steps=2", "max_completion_length=10"]
    recipe("rloo_countdown.py").main([*SMALL, *few, f"output_dir={tmp_path}"])
    assert all(line["kl"] >= 0 for line in trained(tmp_path / "rloo-countdown"))


def test_the_critic_recipe_learns_values_with_one_completion_a_prompt(recipe: Any, tmp_path: Path) -> None:
    few = ["num_train_prompts=24", "warm_start_steps=2", "num_generations=1", "critic_warmup_steps=1"]
    recipe("ppo_critic.py").main([*SMALL, *few, "prompts_per_step=8", f"output_dir={tmp_path}"])
    lines = trained(tmp_path / "ppo-critic")
    assert all({"value_loss", "critic_grad_norm", "seconds/value"} <= set(line) for line in lines)
    assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"]


def test_the_lora_recipe_merges_into_the_model_that_the_adapter_made(
    recipe: Any, small: list[str], tmp_path: Path
) -> None:
    task = ["dataset_name=null", "task=sort_letters", "prompt_template=null", "chat=null", "reward_funcs=[]"]
    merged = recipe("lora.py").main([*small, *task, "num_train_prompts=24", "entropy_coef=0.1", "learning_rate=0.01"])
    trained(merged.parent)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = AutoModelForCausalLM.from_pretrained(merged.parent / "model")  # by peft
    whole = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.arange(5, 15).unsqueeze(0)
    torch.testing.assert_close(whole(ids).logits, adapted(ids).logits)
    assert not torch.allclose(whole(ids).logits, base(ids).logits)


def test_the_conversation_is_seen_by_the_template_and_the_reward_reads_messages(
    recipe: Any, small: list[str], tmp_path: Path
) -> None:
    made = recipe("conversational_reward.py")
    made.main(small)
    trained(tmp_path / "runs" / "conversational-reward")
    texts = ["You have a cat.", "A dog!", "cat or dog", "cat " * 13]
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    assert made.remembers([[]] * 4, replies, ["cat"] * 4, ["dog"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_the_json_recipe_pays_nothing_for_shape_or_for_a_constant(
    recipe: Any, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe("json_extraction.py")
    made.main(small)
    trained(tmp_path / "runs" / "json-extraction")
    assert "paid: none" in capsys.readouterr().out
    rows = made.bills(200)
    constant = json.dumps({"customer": "", "amount": 0, "items": [], "paid": True})
    assert {made.extracted(constant, row["truth"])["reward"] for row in rows} == {0.0}
    assert {made.extracted(row["truth"], row["truth"])["reward"] for row in rows} == {1.0}
    half = json.dumps({**json.loads(rows[0]["truth"]), "amount": -1})
    assert made.extracted(half, rows[0]["truth"])["reward"] == pytest.approx(2 / 3)
    assert made.extracted("[" * 100_000, rows[0]["truth"])["reward"] == 0.0


def test_reinforce_from_scratch_learns_most_of_its_task(recipe: Any) -> None:
    curve = recipe("reinforce_from_scratch.py").main(["--steps", "150", "--prompts", "16"])
    assert curve[0] < 0.15
    assert sum(curve[-10:]) / 10 > 0.4


@pytest.mark.parametrize("words", [["--baseline", "running_mean", "--total-return"], ["--baseline", "none"]])
def test_reinforce_from_scratch_has_its_other_roads(recipe: Any, words: list[str]) -> None:
    assert len(recipe("reinforce_from_scratch.py").main([*words, "--steps", "3", "--prompts", "4"])) == 3


def test_the_variance_picture_shows_what_is_exact_and_what_is_turned(recipe: Any, tmp_path: Path) -> None:
    table = recipe("estimator_variance.py").main(["--groups", "2", "3", "--out", str(tmp_path)])
    for place, size in enumerate((2, 3)):
        assert table["REINFORCE"][place].bias == pytest.approx(0, abs=1e-12)
        assert table["RLOO"][place].bias == pytest.approx(0, abs=1e-12)
        assert table["group mean"][place].scale == pytest.approx((size - 1) / size, rel=1e-12)
        assert table["group mean"][place].off_direction == pytest.approx(0, abs=1e-12)
        assert table["z-score, mean over tokens (GRPO)"][place].off_direction > 0.05
    assert (tmp_path / "estimators.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "estimators.png").read_bytes()[:4] == b"\x89PNG"


def test_the_probe_finds_the_flawed_reward_and_clears_the_honest_one(recipe: Any, tmp_path: Path) -> None:
    found = recipe("hacked_reward.py").main(["max_steps=2", "num_eval_prompts=4", f"output_dir={tmp_path}"])
    paid = {(finding.function, finding.probe) for finding in found["findings"] if finding.highest}
    assert ("flawed", "all answers, in a line") in paid
    assert not {probe for function, probe in paid if function == "honest"}
    assert all({"reward/flawed", "reward/honest"} <= set(line) for line in found["lines"])


@pytest.mark.slow
def test_the_flawed_reward_is_hacked(recipe: Any, tmp_path: Path) -> None:
    """Paid for at any place, the digit is written everywhere; read at the first place alone, it stays a guess."""
    lines = recipe("hacked_reward.py").main(["num_eval_prompts=4", f"output_dir={tmp_path}"])["lines"][-10:]
    assert sum(line["reward/flawed"] for line in lines) / 10 > 0.5
    assert sum(line["reward/honest"] for line in lines) / 10 < 0.25


def test_pairs_hold_a_right_and_a_wrong_completion_of_one_prompt(recipe: Any) -> None:
    made = recipe("dpo_pairs.py")
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    pairs = made.make_pairs(rows, ["a0", "a1", "b0", "b1", "c0", "c1"], [1.0, 0.0, 1.0, 1.0, None, 1.0], 2)
    assert pairs == [{"prompt": "a", "chosen": "a0", "rejected": "a1"}]


def test_dpo_moves_the_odds_of_a_pair_towards_the_chosen_one(
    recipe: Any, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    made, model = recipe("dpo_pairs.py"), make_model("llama")
    pair = {"prompt": "sort: cab=", "chosen": "abc", "rejected": "cba"}

    def odds() -> float:
        asked, right, wrong = (tokenizer(pair[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*asked, *right], [*asked, *wrong]])).logits.log_softmax(-1)
        first = logits[:, len(asked) - 1]
        return float(first[0, right[0]] - first[1, wrong[0]])

    before = odds()
    made.train_on([pair] * 64, model, tokenizer, argparse.Namespace(beta=0.1, learning_rate=1e-3))
    assert odds() > before


@pytest.mark.slow
def test_dpo_on_pairs_made_by_the_reward_sorts_most_words(recipe: Any) -> None:
    before, after = recipe("dpo_pairs.py").main([])
    assert before < 0.3
    assert after > 0.5


PROBLEMS = [
    {
        "text": "Write a function add(a, b) that returns the sum.",
        "code": "def add(a, b):\n    return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 5) == 5", "assert add(-1, 1) == 0"],
    },
    {
        "text": "Write a function double(x) that returns twice x.",
        "code": "def double(x):\n    return x + 2",
        "test_list": ["assert double(2) == 4", "assert double(3) == 6", "assert double(0) == 0"],
    },
]


def test_the_code_recipe_names_the_row_whose_own_solution_fails(recipe: Any, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "problems.jsonl", PROBLEMS)
    problems = recipe("code_unit_tests.py").main(["--check", *files])["problems"]
    assert len(problems) == 1
    assert "double" in problems[0]
    assert "reference solution earns" in problems[0]


def test_the_code_recipe_trains_on_rewards_from_the_sandbox(recipe: Any, small: list[str], tmp_path: Path) -> None:
    files = write_rows(tmp_path / "problems.jsonl", [{**PROBLEMS[0], "text": f"Add, number {i}."} for i in range(8)])
    found = recipe("code_unit_tests.py").main([*small, *files, "max_steps=1"])
    assert found["problems"] == []
    trained(tmp_path / "runs" / "code-unit-tests", steps=1)


@pytest.mark.parametrize("kind", [pytest.param("function", marks=pytest.mark.slow), "environment", "mcp"])
def test_the_recipe_of_tools_calls_each_kind_from_one_warm_start(
    kind: str, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe("tool_calls.py")
    row = module.make_rows(1, random.Random(0), secret=True)[0]
    boxes = module.Boxes()
    boxes.reset(**row)
    said = [{"role": "assistant", "content": row["answer"]}]
    assert module.opened_once([boxes], [said], [row["answer"]]) == [0.0]  # a guess without a call
    assert [boxes.look(x) for x in range(module.BOXES)] == row["digits"]
    assert module.answered([said, [{}, {}, *said]], [row["answer"]] * 2) == [0.0, 1.0]
    monkeypatch.chdir(tmp_path)
    few = ["max_steps=1", "num_train_prompts=40", "num_eval_prompts=4", "prompts_per_step=4", "num_generations=2"]
    module.main([kind, *few, "warm_start_steps=2", "use_cpu=true", "reward_workers=1"])
    assert f"{kind}: right answers" in capsys.readouterr().out
    folder = tmp_path / "runs" / f"tool_calls_{kind}"
    config = load_config(folder / "config.yaml")
    assert config.data.chat_template_kwargs["tools"][0]["function"]["name"] == "look"
    assert config.model.model_name_or_path == "runs/tool_calls_start"
    assert "log/tools/call_frequency" in trained(folder, steps=1)[0]


def test_the_game_of_several_turns_is_played_by_the_recipes_own_environment(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe("number_guessing.py")
    game = module.Game(bonus=0.25)
    game.reset({"secret": 6, "high": 7, "max_guesses": 3}, 0)
    replies = [game.step(text) for text in ("4\n", "2\n", "6\n")]
    assert [(r.text, r.reward, r.done) for r in replies] == [
        ("higher\n", 0.25, False),
        ("higher\n", 0.0, False),
        ("", 1.0, True),
    ]
    few = ["max_steps=2", "warm_start_steps=4", "num_train_prompts=40", "num_eval_prompts=7", "prompts_per_step=4"]
    module.main([*few, f"output_dir={tmp_path}/runs", "use_cpu=true", "reward_workers=1"])
    assert "First guesses in step 2" in capsys.readouterr().out
    told = trained(tmp_path / "runs" / "number_guessing")
    assert all(1 <= line["log/turns"] <= 3 for line in told)
