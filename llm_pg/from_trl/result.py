"""What `train()` and `evaluate()` return: our summary, with what scripts read of transformers' results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..prompts import Prompt
from ..run.evaluator import Evaluator
from ..run.logs.trl_log import named_evaluation


class TrainResult(dict[str, Any]):
    """The summary of a run, as it is written to `summary.json`, with the fields of transformers' `TrainOutput`."""

    @property
    def global_step(self) -> int:
        """Steps that are done."""
        return int(self["steps"])

    @property
    def training_loss(self) -> float:
        """Mean loss over all steps."""
        return float(self["metrics"]["train_loss"])

    @property
    def metrics(self) -> dict[str, float]:
        """train_runtime in seconds, train_samples_per_second, train_steps_per_second, train_loss, epoch."""
        return dict(self["metrics"])


class EvaluationResult(dict[str, float]):
    """The numbers of an evaluation by TRL's names (`eval_reward`, `eval_completions/mean_length`, ...) beside ours
    (`eval_greedy`, `eval_pass@4`).

    Attributes:
        evaluation: of the set, or of the first of several. Its attributes are read as the result's own:
            `result.greedy.mean`.

    Args:
        values: the numbers, by name.
        evaluation: of the set, or of the first of several.
    """

    def __init__(self, values: dict[str, float], evaluation: Any) -> None:
        super().__init__(values)
        self.evaluation = evaluation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "evaluation":
            raise AttributeError(name)
        return getattr(self.evaluation, name)


def evaluate_sets(evaluator: Evaluator, sets: Mapping[str, Sequence[Prompt]], prefix: str) -> EvaluationResult:
    """Evaluates on each set, and times it.

    Args:
        evaluator: of the trainer.
        sets: prompts by the name of their set; a set without a name is "".
        prefix: before the name of each number; the set's name follows it.
    """
    values: dict[str, float] = {}
    evaluations = []
    for name, prompts in sets.items():
        began = time.perf_counter()
        evaluations.append(evaluator.evaluate(f"Evaluation {name}".strip(), prompts))
        seconds = time.perf_counter() - began
        of_set = f"{prefix}_{name}" if name else prefix
        values |= named_evaluation(evaluations[-1], of_set)
        values |= {f"{of_set}_runtime": seconds, f"{of_set}_samples_per_second": len(prompts) / seconds}
    return EvaluationResult(values, next(iter(evaluations), None))
