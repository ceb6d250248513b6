"""What config, data, tokenizer or reward functions alone can refuse is refused before weights are loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import PolicyGradientTrainer
from llm_pg.commands.evaluate import evaluate_model
from llm_pg.config import ConfigError, GRPOConfig, load_config
from llm_pg.run import inputs
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def scores(completions: list[str], answer: list[str]) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def needs_gold(completions: list[str], gold: list[str]) -> list[float]:
    return [0.0] * len(completions)


def look_up(name: str) -> str:
    """Looks a name up.

    Args:
        name: of a thing.
    """
    return name


@pytest.fixture
def folder(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> str:
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights were loaded."""
    from llm_pg.model import loading

    found: list[str] = []
    whole = loading.AutoModelForCausalLM.from_pretrained

    def counted(name: str, *given: Any, **named: Any) -> Any:
        found.append(str(name))
        return whole(name, *given, **named)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", counted)
    return found


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tools without a template for them": ("chat template", {}, {"tools": [look_up]}),
    "no column for the prompt": ("no column 'question'", {"prompt_column": "question"}, {}),
    "no column for a reward function": ("needs the column 'gold'", {}, {"reward_funcs": [needs_gold]}),
    "a prompt that leaves no room": ("leaves no room", {"max_completion_length": 10_000}, {}),
    "a pass by a function that is none": ("eval.pass_reward", {"pass_reward": "other"}, {}),
    "a baseline of no column": ("baseline_column", {"algorithm": "rae", "baseline_column": "level"}, {}),
    "a teacher's server that is not there": (
        "no vLLM server",
        {"algorithm": "opd", "teacher_model_server_url": "http://127.0.0.1:9"},
        {},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_trainer_refuses_before_it_loads_weights(case: str, folder: str, loads: list[str], tmp_path: Path) -> None:
    words, settings, given = REFUSED[case]
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1, "num_eval_prompts": 0}
    args = GRPOConfig(
        str(tmp_path / "run"), use_cpu=True, report_to="none", **{**sizes, "max_completion_length": 4, **settings}
    )
    arguments = {"reward_funcs": [scores], **given}
    with pytest.raises(ValueError, match=words):
        PolicyGradientTrainer(model=folder, args=args, train_dataset=ROWS, **arguments)
    assert loads == []


def test_a_run_that_is_not_refused_loads_its_weights_once(folder: str, loads: list[str], tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1, "num_eval_prompts": 0}
    args = GRPOConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", max_completion_length=4, **sizes)
    PolicyGradientTrainer(model=folder, args=args, reward_funcs=[scores], train_dataset=ROWS)
    assert loads == [folder]


def test_an_evaluation_refuses_before_it_loads_weights(folder: str, loads: list[str], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = [f"model_name_or_path={folder}", f"eval_data_files={data}", "num_eval_prompts=8", "max_completion_length=4"]
    with pytest.raises(ConfigError, match="no column 'question'"):
        evaluate_model(load_config(None, [*given, "prompt_column=question"]), Terminal(quiet=True))
    functions = json.dumps([f"{__file__}:needs_gold"])
    with pytest.raises(ValueError, match="needs the column 'gold'"):
        evaluate_model(load_config(None, [*given, f"reward_funcs={functions}"]), Terminal(quiet=True))
    assert loads == []
    evaluate_model(load_config(None, [*given, 'reward_funcs=["exact_match"]']), Terminal(quiet=True))
    assert loads == [folder]


def test_an_adapters_folder_whose_context_is_not_known_is_loaded_first(folder: str) -> None:
    config = load_config(None, [f"model_name_or_path={folder}"])
    assert inputs.is_foreseen(config, None)
    (Path(folder) / "config.json").unlink()
    assert not inputs.is_foreseen(config, None)
