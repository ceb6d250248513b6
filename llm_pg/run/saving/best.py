"""The best model so far, by a number of the held-out evaluation: saved in `best/` beside what the run goes on with."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...config import ConfigError
from ...distributed.tensors import like, writable
from ...evaluate import Evaluation
from ..ranks import Ranks
from .checkpoint_files import CheckpointError
from .folder import replaced, said_by_disk

FACTS = "best.json"


class Best:
    """Keeps the model of the best evaluation.

    Args:
        folder: where it is saved, replaced as a whole. metric: a name of `Evaluation.metrics()`.
        greater_is_better: else the smallest wins. A tie keeps the earlier model.
        save: writes model and tokenizer into a folder; called on every rank, since shards are gathered by all.
        ranks: of the run, of which the first writes; None = there is one.
    """

    def __init__(
        self,
        folder: Path,
        metric: str,
        greater_is_better: bool,
        save: Callable[[Path], None],
        ranks: Ranks | None = None,
    ) -> None:
        self.folder, self.metric, self.greater_is_better = folder, metric, greater_is_better
        self.save, self.ranks, self.is_main = save, ranks, ranks is None or ranks.is_main
        self.problem = ""  # why the last better model was not saved
        self.step: int | None = None
        self.value = math.nan
        self.evaluation: Evaluation | None = None

    @property
    def _before(self) -> Path:
        return self.folder.with_name(self.folder.name + ".old")

    def mend(self) -> None:
        """Put back what a kill left under its other name. On the first rank, before any rank recalls."""
        if self.is_main and not self.folder.exists() and self._before.exists():
            self._before.rename(self.folder)

    def recall(self, newest_step: int) -> None:
        """Go on from what an interrupted run saved, unless it is of a step that is going to be done again."""
        try:
            facts = json.loads((self.folder / FACTS).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return
        if facts["step"] <= newest_step and facts["metric"] == self.metric:
            self.step, self.value = facts["step"], facts["value"]
            self.evaluation = Evaluation.from_json(facts["evaluation"])

    def observe(self, step: int, evaluation: Evaluation) -> bool:
        """Keep the present model if its evaluation is better than any before; whether it was."""
        metrics = evaluation.metrics()
        if self.metric not in metrics:
            raise ConfigError(
                f"metric_for_best_model is {self.metric!r}, which the evaluation of this task does not give; it gives "
                f"{', '.join(metrics)}."
            )
        self.problem, value = "", metrics[self.metric]
        better = value > self.value if self.greater_is_better else value < self.value
        if math.isnan(value) or not (better or self.step is None):
            return False
        if self.ranks is None:
            self._try_to_keep(step, value, evaluation)
        else:  # only the first rank writes, and all must know the same best
            self.ranks.together(lambda: self._try_to_keep(step, value, evaluation))
            self.problem = self.ranks.gather(self.problem)[0]
        if self.problem:
            return False
        self.step, self.value, self.evaluation = step, value, evaluation
        return True

    def _try_to_keep(self, step: int, value: float, evaluation: Evaluation) -> None:
        try:
            self._keep(step, value, evaluation)
        except Exception as error:
            if said_by_disk(error) is None and not isinstance(error, (OSError, CheckpointError)):
                raise
            # The run goes on, with the best before.
            self.problem = getattr(error, "strerror", None) or " ".join(str(error).split())

    def _keep(self, step: int, value: float, evaluation: Evaluation) -> None:
        with replaced(self.folder, writes=self.is_main) as beside:
            self.save(beside)
            if self.is_main:
                facts = {
                    "step": step, "metric": self.metric, "value": value, "evaluation": dataclasses.asdict(evaluation)
                }  # fmt: skip
                (beside / FACTS).write_text(json.dumps(facts, ensure_ascii=False))


def load_weights(model: Any, folder: Path) -> None:
    """The saved weights of `folder` back into the model, or into its adapters; each rank takes the shards it holds."""
    with writable(model):
        _load(model, folder)


def _load(model: Any, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        for name in model.peft_config:
            place = folder if name == "default" else folder / name
            saved = _as_held(
                load_file(place / "adapter_model.safetensors"), get_peft_model_state_dict(model, None, name)
            )
            set_peft_model_state_dict(model, saved, adapter_name=name)
        return
    saved = {
        name: value for part in sorted(folder.glob("model*.safetensors")) for name, value in load_file(part).items()
    }
    held = model.state_dict()
    if not saved.keys() <= held.keys():  # files may hold other names and shapes than the model (experts one by one)
        read = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True)
        saved = read.state_dict()
    with torch.no_grad():
        missing, unexpected = model.load_state_dict(_as_held(saved, held), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{folder} holds weights of another model: {[*unexpected, *(set(missing) - tied)][0]} is in one alone."
        )
    model.tie_weights()


def _as_held(saved: dict[str, Tensor], held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: like(value, held[name]) if name in held else value for name, value in saved.items()}
