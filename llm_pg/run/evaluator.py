"""Evaluations of a run on its held-out prompts: before, between and after its steps; and the best model by them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ..config import ConfigError
from ..config.check import best_metrics
from ..config.schema import EvalConfig
from ..evaluate import Evaluation, Judged, evaluate
from ..model.policy import Policy
from ..prompts import Prompt
from ..rollout.collector import Collector
from ..words import choices
from .context import RunContext
from .logs.callbacks import Callbacks
from .saving.best import Best, load_weights
from .saving.model_writer import ModelWriter


class Evaluator:
    """Evaluates the policy, and keeps the model of the best evaluation.

    Args:
        context: of the run. collector: samples and scores. prompts: held out; [] = nothing is evaluated.
        policy: whose weights are sampled from. writer: saves the best. callbacks: may ask for an evaluation.

    Attributes:
        before: the evaluation before the first step. newest: the last one made, and its step.
        name: of the held-out prompts, where there are several sets. others: the further sets by their names; they are
            evaluated beside it and decide nothing.
        paused: a context inside which nothing is sampled in the background.
    """

    def __init__(
        self,
        context: RunContext,
        collector: Collector,
        prompts: Sequence[Prompt],
        policy: Policy,
        writer: ModelWriter,
        callbacks: Callbacks,
    ) -> None:
        self.context, self.collector, self.prompts, self.policy = context, collector, prompts, policy
        self.writer, self.callbacks = writer, callbacks
        self.best = make_best(context, writer)
        self.before: Evaluation | None = None
        self.newest: tuple[int, Evaluation] | None = None
        self.paused: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.name, self.others = "", {}  # type: str, dict[str, Sequence[Prompt]]

    def evaluate(self, title: str = "Evaluation", prompts: Sequence[Prompt] | None = None) -> Evaluation:
        """Greedy and sampled pass rates and mean rewards on these prompts, else on the held-out ones, with intervals,
        on this rank."""
        prompts = self.prompts if prompts is None else prompts
        if not prompts:
            raise ConfigError("There are no held-out prompts to evaluate on: set data.num_eval_prompts above 0.")
        with self.context.clock("eval"), self.paused():
            result = evaluate_held_out(self.collector, prompts, self.context.config.eval)
        self.context.terminal.evaluation(title, result)
        return result

    def begin_again(self) -> None:
        """For a further run, whose folder is another."""
        self.best, self.before, self.newest = make_best(self.context, self.writer), None, None

    def resume(self, step: int) -> None:
        """Go on after `step` from what an earlier process found."""
        self.before, self.newest = self.context.folder.read_evaluation(), None
        if self.best is not None:
            self.context.ranks.together(self.best.mend)
            self.best.recall(step)

    def before_training(self) -> Evaluation | None:
        """Of the model as it begins; None where that is not asked for."""
        self.before = self.newest = None
        if not (self.prompts and self.context.config.eval.eval_on_start):
            return None
        self.before = self._on_all_ranks("Before", 0)
        if self.context.ranks.is_main:
            self.context.folder.write_evaluation(self.before)
        return self.before

    def after_step(self, step: int) -> Evaluation | None:
        """Where one is due by the config's count or by a callback's wish, and another step follows."""
        config = self.context.config
        due = self.callbacks.due("evaluate", step, config.eval.eval_steps)
        if not (due and self.prompts and step < config.train.max_steps):
            return None
        return self._on_all_ranks(f"Step {step}", step)

    def after_training(self, step: int) -> Evaluation | None:
        """After the last step; where a callback ended the run by its evaluation, that is it."""
        if not self.prompts:
            return None
        if self.newest is not None and self.newest[0] == step:
            return self.newest[1]
        return self._on_all_ranks("After", step)

    def restore_best(self, step: int) -> Evaluation | None:
        """Puts the best model in place of that of the last `step`, where this is asked for; returns its evaluation, or
        None where the last stays."""
        best, policy = self.best, self.policy
        if not self.context.config.run.load_best_model_at_end or best is None or best.step in (None, step):
            return None
        load_weights(policy.model, self.context.folder.best)
        if policy.critic is not None:
            policy.critic.load(self.context.folder.best)
        self.context.terminal.say(
            f"Ending with the model of step {best.step}: {best.metric} {best.value:.4g}, {self.context.folder.best}."
        )
        return best.evaluation

    def _on_all_ranks(self, title: str, step: int) -> Evaluation:
        ranks = self.context.ranks

        def every() -> tuple[Evaluation, dict[str, Evaluation]]:
            main = self.evaluate(f"{title}, {self.name}" if self.name else title)
            return main, {name: self.evaluate(f"{title}, {name}", prompts) for name, prompts in self.others.items()}

        with self.policy.gathered():
            own = ranks.together(every)
        result, others = ranks.gather(own)[0]  # a late reward may differ; what is the best is decided once
        self.callbacks.by_name = {self.name: result, **others} if self.name else {}
        self.newest = step, result
        self._compare(step, result)
        return result

    def _compare(self, step: int, result: Evaluation) -> None:
        best, folder, terminal = self.best, self.context.folder, self.context.terminal
        if best is None:
            return
        if best.observe(step, result):
            terminal.say(f"Best so far: {best.metric} {best.value:.4g}, saved in {folder.best}.")
        elif best.problem:
            terminal.warn(
                f"The model of step {step}, the best so far, was not saved: {best.problem} at {folder.best}. The one "
                f"saved before stays ({best.step})."
            )


def make_best(context: RunContext, writer: ModelWriter) -> Best | None:
    """None where the config names no metric."""
    run, ranks = context.config.run, context.ranks
    metric = run.metric_for_best_model or ("eval/greedy" if run.load_best_model_at_end else None)
    if metric is None:
        return None
    known = best_metrics(context.config)
    if metric not in known:
        raise ConfigError(
            f"metric_for_best_model is {metric!r}, and there is no set of that name: {choices(metric, known)} "
            "Several sets by name are an eval_dataset that is a dict."
        )
    if metric == "eval_reward":  # what `named_evaluation` logs by this name
        metric = "eval/sampled_reward" if context.config.eval.eval_num_samples else "eval/reward"
    return Best(context.folder.best, metric, run.greater_is_better, writer.save, ranks)


def evaluate_held_out(collector: Collector, prompts: Sequence[Prompt], settings: EvalConfig) -> Evaluation:
    """Greedy and sampled pass rates and mean rewards on these prompts, with intervals."""

    def answers(some: Sequence[Any], num_samples: int, greedy: bool) -> list[tuple[str, list[int]]]:
        each = max(settings.eval_batch_size // num_samples, 1)
        pieces = [(at, some[at : at + each]) for at in range(0, len(some), each)]
        return [answer for at, piece in pieces for answer in collector.answer(piece, num_samples, greedy, at)]

    def verdicts(some: Sequence[Any], texts: Sequence[str], ids: Sequence[list[int]]) -> Judged:
        scores = collector.score(some, texts, ids)
        parts = scores.parts
        name = settings.pass_reward or next(iter(parts))
        if name not in parts:
            raise ConfigError(
                f"eval.pass_reward is {name!r}, which is none of the reward functions: {', '.join(parts)}."
            )
        return parts[name], scores.reward

    return evaluate(
        prompts,
        answers,
        verdicts,
        num_samples=settings.eval_num_samples,
        threshold=settings.pass_threshold,
        readings=collector.readings,
    )
