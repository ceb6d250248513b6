"""What comes between the steps of a run and after the last: evaluations, checkpoints, the model, the summary."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..evaluate import Evaluation
from ..metrics import Clock, MetricsFile
from ..report import leave_report
from ..training.merging import PROMPTS, save_merged
from ..training.shards import collect
from . import checkpoint
from .best import Best, load_weights
from .crash import Keeper
from .folder import full_disks_named, replaced
from .gathering import Gathering
from .onlookers import Onlookers
from .parts import evaluate_held_out
from .summary import run_summary
from .trackers import Trackers


class Ending(Gathering):
    """See `trainer.PolicyGradientTrainer`, which makes these when a run begins."""

    metrics: MetricsFile
    trackers: Trackers
    onlookers: Onlookers | None
    saving: Clock
    best: Best | None
    keeper: Keeper
    evaluated: tuple[int, Evaluation] | None  # the newest, and its step

    def _evaluates(self) -> bool:
        due = self.callbacks.due("evaluate", self.step, self.config.eval.eval_steps)
        return due and bool(self.eval_prompts) and self.step < self.config.train.max_steps

    def _end_step(self, evaluation: dict[str, float]) -> None:
        """After the step's line of metrics: callbacks hear of its evaluation, and the checkpoint is written."""
        if evaluation:
            self.callbacks.evaluated(evaluation)
        self._agree()
        if self.callbacks.due("save", self.step, self.config.run.save_steps):
            with self.saving("save"):
                saved = self.save_checkpoint()
            if saved:
                self.callbacks.fire("on_save")
            self._agree()

    def _agree(self) -> None:
        """What a callback of one rank asks for is done by all: evaluations and steps are work of all together."""
        self.callbacks.grant(self.ranks.gather(self.callbacks.wishes()))

    def evaluate(self, title: str = "Evaluation", clock: Clock | None = None) -> Evaluation:
        """Greedy and sampled pass rates and mean rewards on the held-out prompts, with intervals."""
        if not self.eval_prompts:
            raise ConfigError("There are no held-out prompts to evaluate on: set data.num_eval_prompts above 0.")
        alone = contextlib.nullcontext() if self.ahead is None else self.ahead.paused()
        with (clock or self.clock)("eval"), alone:
            result = evaluate_held_out(self.collector, self.eval_prompts, self.config.eval)
        self.terminal.evaluation(title, result)
        return result

    def _evaluate_together(self, title: str, clock: Clock | None = None) -> Evaluation:
        with self.policy.gathered():
            own = self.ranks.together(lambda: self.evaluate(title, clock))
        result = self.ranks.gather(own)[0]  # a late reward may differ; what is the best is decided once
        self.evaluated = self.step, result
        if self.best is not None and self.best.observe(self.step, result):
            self.terminal.say(f"Best so far: {self.best.metric} {self.best.value:.4g}, kept in {self.folder.best}.")
        elif self.best is not None and self.best.problem:
            self.terminal.warn(
                f"The model of step {self.step}, the best so far, was not kept: {self.best.problem} at "
                f"{self.folder.best}. The one kept before stays ({self.best.step})."
            )
        return result

    def _evaluate_last(self) -> Evaluation | None:
        """After the last step; where a callback ended the run by its evaluation, that is it."""
        if not self.eval_prompts:
            return None
        if self.evaluated is not None and self.evaluated[0] == self.step:
            return self.evaluated[1]
        return self._evaluate_together("After")

    def _leave(self) -> Evaluation | None:
        """A checkpoint of the last step and the model, then the last evaluation: whatever ends that, they are there."""
        with self.clock("save"):
            if self.config.run.save_at_end:
                self.save_checkpoint()
            self.save_model()
        try:
            after = self._evaluate_last()
        except Exception as error:
            self.keeper.keep_evaluation(error, self.step, self.folder.model)
            raise
        best = self._best_in_place()
        with self.clock("save"):
            if best is not None:
                self.save_model()
            self._save_merged()
        return after if best is None else best.evaluation

    def _make_best(self) -> Best | None:
        """None where no metric is named."""
        run = self.config.run
        metric = run.metric_for_best_model or ("eval/greedy" if run.load_best_model_at_end else None)
        if metric is None:
            return None
        return Best(
            self.folder.best, metric, run.greater_is_better, self.save_model, self.ranks.is_main, self.ranks.gather
        )

    def _best_in_place(self) -> Best | None:
        """Puts the best model in place of the last, where that is asked for; None where the last stays."""
        best = self.best
        if not self.config.run.load_best_model_at_end or best is None or best.step in (None, self.step):
            return None
        load_weights(self.model, self.folder.best)
        if self.policy.critic is not None:
            self.policy.critic.load(self.folder.best)
        self.terminal.say(
            f"Ending with the model of step {best.step}: {best.metric} {best.value:.4g}, {self.folder.best}."
        )
        return best

    def save_model(self, path: str | Path | None = None) -> None:
        """Weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (a PEFT model: its adapter).

        path: a folder; None = `model/` in the run's folder. A critic stands beside them, in `critic.safetensors`.
        """
        own = path is None or Path(path) == self.folder.model
        extra = {}
        policy = getattr(self, "policy", None)  # made when training begins; before that the weights are whole
        if policy is not None and policy.shards is not None:
            extra = {"state_dict": collect(self.model.state_dict(keep_vars=True), self.ranks.is_main)}
        self._check_finite(extra.get("state_dict"))
        place = (
            replaced(self.folder.model, writes=self.ranks.is_main) if own else contextlib.nullcontext(Path(path or ""))
        )
        with place as folder:
            if self.ranks.is_main:
                self.model.save_pretrained(folder, **extra)
                self.tokenizer.save_pretrained(folder)
            if self.row.needs_critic and (self.ranks.is_main or self.shards is not None):
                assert self.policy.critic is not None
                self.policy.critic.save(folder, writes=self.ranks.is_main)

    def _check_finite(self, collected: dict[str, Any] | None) -> None:
        """CheckpointError, on every rank, where a weight is NaN or inf. collected: weights gathered from shards, which
        the first rank has."""
        weights = dict(self.model.named_parameters()) if collected is None else collected
        bad = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
        if collected is not None:
            bad = self.ranks.gather(bad)[0]
        if not bad:
            return
        saver = getattr(self, "saver", None)
        good = None if saver is None else saver.newest_step()
        kept = (
            ""
            if good is None
            else f" The last good weights are those of checkpoint {good} in {self.folder.checkpoints}."
        )
        raise checkpoint.CheckpointError(
            f"The model was not saved: {len(bad)} of {len(weights)} weights hold NaN or inf ({bad[0]} first).{kept} "
            "Lower train.learning_rate, or look for the step in metrics.jsonl where grad_norm grew."
        )

    def _save_merged(self) -> None:
        """The merged model, only where it computes what was trained; the adapter is kept in any case."""
        if not (self.config.run.merge_adapter and self.ranks.is_main):
            return
        try:
            with replaced(self.folder.merged) as folder:
                said = save_merged(self.model, self.tokenizer, folder, self._compared())
        except ConfigError as error:
            self.terminal.warn(f"{self.folder.merged} was not written. {error} The adapter is in {self.folder.model}.")
        else:
            self.terminal.say(said)

    def _compared(self) -> list[tuple[int, ...]]:
        """Prompts on which a merged model is compared with the trained one: held-out ones, where there are any."""
        return [prompt.ids for prompt in (self.eval_prompts or self.train_prompts)[:PROMPTS]]

    def save_checkpoint(self) -> bool:
        """Write `checkpoints/step-<n>`; a failure is printed and older checkpoints stay."""
        if not self.ranks.is_main and not self.saver.joint:
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
            with full_disks_named(self.folder.path):
                self.folder.write_summary(summary)
            self.onlookers.finish()
            places = [f"Model:   {self.folder.model}", f"Metrics: {self.folder.metrics}"]
            places += leave_report(self.folder.path, self.terminal.warn)
            self.terminal.summary(summary, before, after, places)
        self.accelerator.end_training()
        return summary
