"""The weight of the entropy bonus follows the entropy, from batch to batch and over a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import Algorithm, GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.estimators.kl import AdaptiveBonus
from llm_pg.metrics import read_metrics
from tests.tiny import ONE_STEP, ROWS, Recorder, graded


def test_the_weight_rises_under_the_target_and_falls_above_within_its_bounds() -> None:
    bonus = AdaptiveBonus(0.1, target=0.5, delta=0.04, lowest=0.05, highest=0.15)
    seen = []
    for entropy in (0.5, 0.4, 0.3, 0.6, 0.7, 0.8, 0.9):
        seen.append((round(bonus.coef, 10), round(bonus.applied, 10)))
        bonus.update(entropy)
    assert seen == [(0.1, 0.0), (0.14, 0.14), (0.15, 0.15), (0.15, 0.15), (0.11, 0.0), (0.07, 0.0), (0.05, 0.0)]


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="no weight lies between"):
        Algorithm("grpo", use_adaptive_entropy=True, entropy_coef_min=0.2, entropy_coef_max=0.1)


@pytest.mark.parametrize("more", [{"entropy_coef_final": 0.0}, {"top_entropy_quantile": 0.5}])
def test_what_it_does_not_go_with_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use_adaptive_entropy"):
        GRPOConfig("runs", use_adaptive_entropy=True, **more)


def coefficients(make_model: Callable[..., Any], tokenizer: Any, folder: Path, resume: Any = False) -> list[float]:
    settings = {**ONE_STEP, "max_steps": 5, "save_steps": 2, "use_adaptive_entropy": True, "entropy_target": 100.0}
    settings |= {"entropy_coef": 0.01, "entropy_coef_delta": 0.02, "run_name": "r", "overwrite": False}
    trainer = GRPOTrainer(
        make_model("llama"), graded, GRPOConfig(str(folder), **settings), ROWS, processing_class=tokenizer,
        terminal=Recorder(),
    )  # fmt: skip
    trainer.train(resume)
    return [line["entropy_coef"] for line in read_metrics(folder / "r" / "metrics.jsonl")]


def test_a_run_applies_it_from_the_second_step_and_goes_on_with_it(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    whole = coefficients(make_model, tokenizer, tmp_path)
    assert whole == pytest.approx([0.0, 0.03, 0.05, 0.07, 0.09])
    resumed = coefficients(make_model, tokenizer, tmp_path, tmp_path / "r" / "checkpoints" / "step-000004")
    assert resumed == whole
