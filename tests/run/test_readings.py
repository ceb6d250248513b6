"""Evaluations that read answers strictly and leniently, pass@k curves, and what summary and page say of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import Config, ConfigError
from llm_pg.doctor.evidence import read_run
from llm_pg.doctor.live import examine_run
from llm_pg.evaluate import Evaluation, curve, evaluate, pass_at_k, summarise
from llm_pg.metrics import read_metrics
from llm_pg.prompts import Prompt
from llm_pg.report.charts import charts
from llm_pg.rewards.specs import resolve_all
from llm_pg.rollout.dual_scoring import make_dual_scoring
from llm_pg.terminal import Terminal

LETTERS = [{"prompt": f"sort: {w}=", "letters": w} for w in ("cab", "bca", "dcb", "ba", "hg", "fe", "ed", "cb")]


def test_pass_at_k_is_told_at_the_powers_of_two_and_at_the_number_of_samples() -> None:
    assert [curve(n) for n in (0, 1, 2, 4, 6, 8)] == [[], [1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]
    sampled = [[True, False, False, False, False, True], [False] * 6]
    result = summarise([True, False], sampled, [1, 1], unscorable=0)
    assert {k: share.mean for k, share in result.pass_at.items()} == pytest.approx(
        {k: pass_at_k(6, 2, k) / 2 for k in (1, 2, 4, 6)}
    )
    assert result.sampled is not None
    assert result.pass_at[1].mean == pytest.approx(result.sampled.mean)


def answers(texts: list[str]) -> Callable[..., list[tuple[str, list[int]]]]:
    return lambda prompts, number, greedy: [(text, [1] * len(text)) for text in texts for _ in range(number)]


def asked(*texts: str) -> list[Prompt]:
    return [Prompt(i, text, None, (i + 1,), {}) for i, text in enumerate(texts)]


def test_strict_and_lenient_are_shares_of_the_greedy_answers() -> None:
    result = evaluate(
        asked("a", "b", "c", "d"),
        answers(["x", "yy", "", "zzz"]),
        lambda some, texts, ids: ([1.0, 0.0, None, 0.0], [2.0, -1.0, None, 0.5]),
        num_samples=0,
        threshold=1.0,
        readings=lambda some, texts, ids, deciding: {"strict": deciding, "lenient": [1.0, 1.0, None, 0.5]},
    )
    assert result.strict == result.greedy
    assert result.lenient is not None
    assert (result.greedy.mean, result.lenient.mean, result.mean_length) == (0.25, 0.5, 1.5)
    assert result.reward is not None
    assert result.reward.mean == 0.5  # of the three that could be scored
    told = result.metrics()
    assert (told["eval/strict"], told["eval/lenient"], told["eval/length"]) == (0.25, 0.5, 1.5)
    plain = evaluate(asked("a"), answers(["x"]), lambda *_: ([1.0], [1.0]), num_samples=0, threshold=1.0)
    assert not {"eval/strict", "eval/lenient"} & set(plain.metrics())


def test_an_evaluation_comes_back_from_json_with_its_readings() -> None:
    import dataclasses

    result = evaluate(
        asked("a", "b"),
        answers(["x", "y"]),
        lambda some, texts, ids: ([float(i % 3 == 0) for i in range(len(texts))], [0.1 * i for i in range(len(texts))]),
        num_samples=3,
        threshold=1.0,
        readings=lambda some, texts, ids, deciding: {"strict": deciding, "lenient": [1.0, 1.0]},
    )
    assert Evaluation.from_json(json.loads(json.dumps(dataclasses.asdict(result)))) == result


def config(**changes: Any) -> Config:
    return GRPOConfig(**changes)


def test_the_twin_of_the_deciding_function_is_taken_and_settings_come_before_it() -> None:
    functions = resolve_all(["format_tags", "countdown"])
    assert make_dual_scoring(config(), functions) is None
    found = make_dual_scoring(config(pass_reward="countdown"), functions)
    assert found is not None
    assert found.names == {"strict": None, "lenient": "countdown_anywhere"}
    found = make_dual_scoring(config(), resolve_all(["number_match"]))
    assert found is not None
    assert found.names == {"strict": "marked_number", "lenient": None}
    found = make_dual_scoring(config(lenient_reward="number_match"), resolve_all(["countdown"]))
    assert found is not None
    assert found.names == {"strict": None, "lenient": "number_match"}


def test_fixed_arguments_of_the_deciding_function_go_to_its_twin() -> None:
    found = make_dual_scoring(config(), resolve_all([{"function": "number_match", "tolerance": 0.5}]))
    assert found is not None
    assert found.scorer.functions[0].options == {"tolerance": 0.5}


def test_a_function_of_ones_own_that_is_called_as_a_shipped_one_has_no_twin() -> None:
    def countdown(completion: str, **row: Any) -> float:
        return 1.0

    assert make_dual_scoring(config(), resolve_all([countdown])) is None


@pytest.fixture
def run(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def go(**changes: Any) -> Any:
        settings = {
            **{"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4},
            **{"num_eval_prompts": 4, "eval_num_samples": 3, "eval_steps": 1, "use_cpu": True, "run_name": "r"},
            **changes,
        }
        trainer = GRPOTrainer(
            model=make_model("llama"),
            reward_funcs=["sort_letters"],
            args=GRPOConfig(str(tmp_path), **settings),
            train_dataset=LETTERS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )
        trainer.train()
        return trainer

    return go


def test_a_run_reports_both_readings_and_the_curve_before_and_after(run: Callable[..., Any]) -> None:
    folder = run().folder.path
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary[f"strict_{when}"] == summary[f"pass_rate_{when}_interval"]
        assert summary[f"lenient_{when}"][0] >= summary[f"strict_{when}"][0]
        assert 1 <= summary[f"mean_length_{when}"] <= 4
    assert list(summary["pass_at"]) == list(summary["pass_at_before"]) == ["1", "2", "3"]
    line = read_metrics(folder / "metrics.jsonl")[0]
    assert {"eval/strict", "eval/lenient", "eval/pass@1", "eval/pass@3"} <= set(line)
    chart = next(c for c in charts([read_run(folder)]) if c.title == "pass@k")
    assert [s.label for s in chart.series] == ["before", "after"]
    assert [x for x, _ in chart.series[0].points] == [1.0, 2.0, 3.0]
    assert "lenient" in (folder / "report.html").read_text()


def test_a_lenient_function_of_ones_own_is_used_in_evaluations_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def anything(completion, **row):\n    return 1.0\n")
    folder = run(lenient_reward=f"{tmp_path}/mine.py:anything").folder.path
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["lenient_after"] == pytest.approx([1.0, 4 / (4 + 1.96**2), 1.0], abs=1e-4)  # Wilson, all of 4
    assert not any("anything" in name for line in read_metrics(folder / "metrics.jsonl") for name in line)


def test_a_gain_of_the_strict_score_alone_is_named_by_the_doctor(run: Callable[..., Any]) -> None:
    folder = run().folder.path
    path = folder / "summary.json"
    summary = json.loads(path.read_text())

    def findings(**changes: Any) -> list[str]:
        path.write_text(json.dumps({**summary, **changes}))
        return [finding.rule for finding in examine_run(folder) if "held-out prompts the strict" in finding.cause]

    rises = {"strict_before": [0.1, 0.05, 0.15], "strict_after": [0.7, 0.6, 0.8], "lenient_before": [0.69, 0.6, 0.8]}
    assert findings(**rises, lenient_after=[0.7, 0.6, 0.8]) == ["format-only"]
    assert findings(**rises, lenient_after=[0.9, 0.8, 0.95]) == []
    assert findings(**{**rises, "strict_after": [0.22, 0.14, 0.3]}, lenient_after=[0.7, 0.6, 0.8]) == []


def test_a_reading_that_does_not_exist_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match="no shipped reward function 'nonsense'"):
        run(strict_reward="nonsense")
