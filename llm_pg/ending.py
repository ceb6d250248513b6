"""What comes between the steps of a run and after the last: evaluations, checkpoints, the model, the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checkpoint
from .config import ConfigError
from .evaluate import Evaluation
from .metrics import Clock, MetricsFile
from .onlookers import Onlookers
from .parts import Parts, evaluate_held_out
from .report import leave_report
from .resume import Saver
from .shards import collect
from .summary import run_summary
from .trackers import Trackers


class Ending(Parts):
    """See `trainer.PolicyGradientTrainer`, which makes these when a run begins."""

    saver: Saver
    metrics: MetricsFile
    trackers: Trackers
    onlookers: Onlookers | None
    saving: Clock

    def _evaluates(self) -> bool:
        due = self.callbacks.due("evaluate", self.step, self.config.eval.eval_steps)
        return due and bool(self.eval_prompts) and self.step < self.config.train.max_steps

    def _end_step(self, evaluation: dict[str, float]) -> None:
        """After the step's line of metrics: callbacks hear of its evaluation, and the checkpoint is written."""
        if evaluation:
            self.callbacks.evaluated(evaluation)
        if self.callbacks.due("save", self.step, self.config.run.save_steps):
            with self.saving("save"):
                saved = self.save_checkpoint()
            if saved:
                self.callbacks.fire("on_save")

    def evaluate(self, title: str = "Evaluation", clock: Clock | None = None) -> Evaluation:
        """Greedy and sampled pass rates on the held-out prompts, with intervals."""
        if not self.eval_prompts:
            raise ConfigError("There are no held-out prompts to evaluate on: set data.num_eval_prompts above 0.")
        with (clock or self.clock)("eval"):
            result = evaluate_held_out(self.collector, self.eval_prompts, self.config.eval)
        self.terminal.evaluation(title, result)
        return result

    def _evaluate_together(self, title: str, clock: Clock | None = None) -> Evaluation:
        with self.policy.gathered():
            return self.ranks.together(lambda: self.evaluate(title, clock))

    def save_model(self, path: str | Path | None = None) -> None:
        """Weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (a PEFT model: its adapter).

        path: a folder; None = `model/` in the run's folder. A critic stands beside them, in `critic.safetensors`.
        """
        path = path or self.folder.model
        extra = {}
        if self.shards is not None:
            extra = {"state_dict": collect(self.model.state_dict(), self.ranks.is_main)}
        if self.ranks.is_main:
            self.model.save_pretrained(path, **extra)
            self.tokenizer.save_pretrained(path)
            if self.row.needs_critic:
                assert self.policy.critic is not None
                self.policy.critic.save(path)

    def save_checkpoint(self) -> bool:
        """Write `checkpoints/step-<n>`; a failure is printed and older checkpoints stay."""
        if not self.ranks.is_main and self.shards is None:
            return True
        try:
            if self.ranks.is_main:
                self.metrics.sync()
            self.saver.save(self.step)
        except checkpoint.CheckpointError as error:
            self.terminal.warn(str(error))
            return False
        return True

    def _finish(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        summary = run_summary(
            self.config,
            before,
            after,
            algorithm=self.row.name,
            steps=self.step,
            seconds=self.clock.seconds,
            model=str(self.folder.model),
            versions=self.saver.identity()["versions"],
        )
        self.trackers.finish()
        if self.onlookers is not None:
            self.folder.write_summary(summary)
            self.onlookers.finish()
            places = [f"Model:   {self.folder.model}", f"Metrics: {self.folder.metrics}"]
            places += leave_report(self.folder.path, self.terminal.warn)
            self.terminal.summary(summary, before, after, places)
        self.accelerator.end_training()
        return summary
