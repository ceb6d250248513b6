"""A run that is going on: its folder and lock, its workers and engine, and the objects that the loop is made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..algorithms.algorithm import Algorithm
from ..config import ConfigError
from ..config.engines import capabilities_of
from ..evaluate import Evaluation
from ..learner.learner import Learner
from ..metrics import read_metrics
from ..model.bars import no_progress_bars
from ..model.policy import Policy
from ..model.teacher import ScoresTokens
from ..prompts import Prompts, fingerprint
from ..report.live import page_from_begin_to_end
from ..rollout.collector import Collector
from ..sampling.random import stream_key
from ..terminal.plain import Plan
from .before.auditing import audit_run
from .before.rehearsal import rehearse_end
from .before.trial import expected_seconds, try_longest_batch
from .context import RunContext
from .evaluator import Evaluator
from .guard import NON_FINITE_LIMIT, NON_FINITE_LIMIT_SCALED, FiniteCheck, Interrupted, Signals, name_of
from .logs.callbacks import Callbacks
from .logs.observers import Observers
from .logs.profiling import Profiler
from .logs.summary import run_summary
from .saving import checkpoint_files, provenance
from .saving.checkpointer import Checkpointer
from .saving.crash import CrashKeeper
from .saving.folder import full_disks_named
from .saving.lock import FolderLock
from .saving.model_writer import ModelWriter
from .sources import AllRanks, in_flight, make_ahead, make_source, put_back
from .start import check_same_start, make_learner, start_policy

STEP_STREAM = 4


class TrainingRun:
    """What the loop of `trainer.train` is made of; `open_run` makes one.

    Attributes:
        source: step -> scored rollouts. learner: rollouts -> one update. evaluator, observers, checkpointer: what
            follows a step. callbacks: TRL's. crash: keeps what a step that fails began from.
    """

    def __init__(
        self,
        context: RunContext,
        learner: Learner,
        collector: Collector,
        prompts: Prompts,
        evaluator: Evaluator,
        callbacks: Callbacks,
        found: Path | None,
        *,
        override: bool,
        inner: contextlib.ExitStack,
    ) -> None:
        self.context, self.learner, self.evaluator, self.callbacks = context, learner, evaluator, callbacks
        self.prompts, self._inner = prompts, inner
        config, folder, ranks = context.config, context.folder, context.ranks
        self.checkpointer = Checkpointer(context, learner, prompts, _facts(context, collector, prompts), callbacks)
        self.crash = CrashKeeper(context, self.checkpointer, learner)
        scaled = context.strategy.scaler is not None
        self.finite = FiniteCheck(NON_FINITE_LIMIT_SCALED if scaled else NON_FINITE_LIMIT)
        self.profiler = Profiler(folder.path / "profile", config.run.profile_steps * ranks.is_main)
        settings = context.redactor.tree(config.model_dump(mode="json"))
        self.start = self.step = learner.step = 0 if found is None else self._restore(found, override, settings)
        evaluator.writer.newest_checkpoint = self.checkpointer.newest_step
        if found is not None:
            evaluator.resume(self.start)
        self.source = self._make_source(collector)
        evaluator.paused = self.source.paused
        if config.run.save_steps and ranks.is_main:
            self.checkpointer.check_room()
        self.trial = ranks.together(lambda: try_longest_batch(context, learner, prompts.prompts))
        self.signals = Signals()
        resume_step = self.start if found is not None else None
        self.observers = Observers(context, learner, prompts, callbacks, self.signals, settings, resume_step)
        self._introduce(collector)

    def _restore(self, found: Path, override: bool, settings: dict[str, Any]) -> int:
        context, checkpointer = self.context, self.checkpointer
        done, overridden = checkpointer.restore(found, override=override)
        if checkpointer.extension:
            context.terminal.say(checkpointer.extension)
        context.accelerator.wait_for_everyone()  # another rank may still be reading
        if context.ranks.is_main:
            for place in checkpoint_files.set_aside(context.folder.checkpoints, done):
                context.terminal.warn(f"A checkpoint of a step that is done again is kept as {place}.")
            context.folder.write_config(settings)  # a run may go on to more steps
        for line in overridden:
            context.terminal.warn(f"Overridden: {line}.")
        context.terminal.say(f"Going on from {found}: {done} steps are done.")
        return done

    def _make_source(self, collector: Collector) -> AllRanks:
        context, policy = self.context, self.learner.policy
        source: Any = make_source(context, collector, self.prompts)
        if context.config.rollout.max_staleness:
            with policy.gathered():
                source = context.ranks.together(
                    lambda: self._inner.enter_context(make_ahead(context, policy, collector, self.prompts))
                )
                put_back(context, source, self.checkpointer.landed, self.prompts, collector)
            self.checkpointer.in_flight = in_flight(source, context.ranks)
        return AllRanks(source, policy, self.learner.algorithm, self.prompts, context.ranks, context.config)

    def _introduce(self, collector: Collector) -> None:
        """Terminal and callbacks hear what the steps will be, and what an earlier process did of them."""
        context, terminal = self.context, self.context.terminal
        terminal.begin(plan_of_run(context, bool(self.evaluator.prompts)))
        self.learner.updater.progress = terminal.trained
        if hasattr(collector.engine, "progress"):
            collector.engine.progress = terminal.sampled
        context.clock.watch = terminal.phase
        self.callbacks.best = self.evaluator.best
        is_main, max_steps = context.ranks.is_main, context.config.train.max_steps
        earlier = read_metrics(context.folder.metrics) if self.start and is_main else []
        collector.max_steps = max_steps
        self.callbacks.begin(
            self.start,
            max_steps,
            len(self.prompts.prompts) / context.plan.prompts,
            self.learner.optimizer,
            self.learner.scheduler,
            is_main=is_main,
            earlier=earlier,
        )
        if self.start and is_main:
            terminal.recall(earlier, self.evaluator.before, sum(context.clock.seconds.values()))
        context.accelerator.wait_for_everyone()

    # --- the loop

    def evaluate_before(self) -> None:
        """The evaluation of the model as it begins, where it does begin, and what it says of the time to come."""
        before = None if self.start else self.evaluator.before_training()
        if before is None:
            return
        self.observers.before(before)
        terminal, config, seconds = self.context.terminal, self.context.config, self.context.clock.seconds["eval"]
        terminal.pace.spend("eval", seconds)
        if self.trial is None:
            return
        tokens = before.num_prompts * (1 + config.eval.eval_num_samples) * before.mean_length
        rate, passes, rows = tokens / seconds, config.algorithm.num_iterations, self.context.plan.rows_per_rank
        terminal.predict(*expected_seconds(self.trial, config.train.max_steps, passes, rows, rate, before.mean_length))

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do, from 1; it ends with the last, or where a callback asks for it.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and its state saved.
            RunStopped: too many updates in a row were skipped.
        """
        last, ranks, seed = self.context.config.train.max_steps, self.context.ranks, self.context.config.run.seed
        self._inner.enter_context(self.signals)
        self.observers.begin_steps()
        for step in range(self.start + 1, last + 1):
            self.step = step
            self.crash.begin(step)
            with self.profiler.step():
                self.observers.begin_step()
                key = stream_key(seed, STEP_STREAM, step, torch.tensor(ranks.number))
                torch.manual_seed(int(key) % 2**63)
                yield step
            self.crash.end()
            if self.observers.received is not None and step < last:
                self._interrupt(self.observers.received)
            if self.callbacks.stops:
                break
        self.profiler.finish()

    def _interrupt(self, number: int) -> None:
        """End in order after the step that a signal came in."""
        saved = self.checkpointer.try_to_save(self.step)
        where = "its state is saved, --resume goes on from it" if saved else "its state could not be saved"
        text = f"{name_of(number)}: ended after step {self.step} of {self.context.config.train.max_steps}; {where}."
        self.observers.trackers.finish()
        self.context.terminal.warn(text)
        self._end_groups()
        raise Interrupted(number, text)

    def finish(self) -> dict[str, Any]:
        """After the last step: its checkpoint and the model, then the last evaluation, then the summary, which is
        returned. Whatever ends the evaluation, checkpoint and model are there."""
        context = self.context
        after = self._leave()
        if after is not None and context.ranks.is_main:
            context.folder.write_evaluation(after, "after.json")
        self._inner.close()
        metrics = self.callbacks.close(context.plan.rows)
        summary = run_summary(
            context.config,
            self.evaluator.before,
            after,
            algorithm=context.spec.name,
            steps=self.step,
            seconds=context.clock.seconds,
            model=str(context.folder.model),
            versions=self.checkpointer.identity()["versions"],
            metrics=metrics,
        )
        context.ranks.together(lambda: self.observers.finish(summary, self.evaluator.before, after))
        self._end_groups()
        return summary

    def _end_groups(self) -> None:
        """The last that a run does on its ranks, all together: no rank ends while another still writes."""
        self.context.ranks.leave(self.context.strategy.close)

    def _leave(self) -> Evaluation | None:
        clock, writer, ranks = self.context.clock, self.evaluator.writer, self.context.ranks
        with clock("save"):
            if self.context.config.run.save_at_end:
                self.checkpointer.try_to_save(self.step)
            ranks.together(writer.save)
        try:
            after = self.evaluator.after_training(self.step)
        except Exception as error:
            self.crash.keep_evaluation(error, self.step, self.context.folder.model)
            raise
        best = self.evaluator.restore_best(self.step)
        with clock("save"):
            if best is not None:
                ranks.together(writer.save)
            ranks.together(writer.save_merged)
        return best or after


@contextlib.contextmanager
def open_run(
    context: RunContext,
    policy: Policy,
    algorithm: Algorithm,
    prompts: Prompts,
    collector: Collector,
    evaluator: Evaluator,
    callbacks: Callbacks,
    *,
    make_optimizer: Callable[[], Any] = lambda: None,
    make_scheduler: Callable[[int, Any], Any] = lambda steps, optimizer: None,
    teacher: ScoresTokens | None = None,
    resume: bool | str | Path = False,
    override: bool = False,
) -> Iterator[TrainingRun]:
    """A run from its folder's lock to its end; what a step raised is saved before it is raised again.

    Args:
        make_optimizer: an optimiser of its own over the policy's parameters; it returns None = the config's.
        make_scheduler: of the number of steps and the optimiser; it returns None = the config's.
        teacher: scores the tokens that are sampled; None = the algorithm has none.
        resume: True = go on from the newest whole checkpoint of the run's folder; a path = from that one.
        override: go on although the checkpoint belongs to other settings.
    """
    folder, ranks = context.folder, context.ranks
    with full_disks_named(folder.path), ranks.losses_named(), no_progress_bars(), contextlib.ExitStack() as outer:
        ranks.together(lambda: _take_folder(context, outer, bool(resume)))
        ranks.together(lambda: _rehearse(context, evaluator.writer))
        check_same_start(policy.model, prompts.prompts, ranks)
        collector.scorer.write_output_to(folder.path / "rewards.log")
        with contextlib.ExitStack() as inner:
            inner.enter_context(collector.scorer)
            inner.enter_context(collector)
            found = find_checkpoint(context, resume) if resume else None
            if ranks.is_main:
                _write_first(context, outer, is_new=found is None)
            start_policy(context, policy, resumes=found is not None, held_out=evaluator.prompts)
            run = TrainingRun(
                context,
                make_learner(context, policy, algorithm, make_optimizer, make_scheduler, teacher),
                collector,
                prompts,
                evaluator,
                callbacks,
                found,
                override=override,
                inner=inner,
            )
            if not run.start:
                ranks.together(lambda: _audit(context, collector, prompts))
            with context.terminal.running():
                try:
                    yield run
                except Exception as error:
                    run.crash.keep(error)
                    raise
    callbacks.fire("on_train_end")


def begin_again(context: RunContext, evaluator: Evaluator) -> None:
    """Prepares a further run of one trainer, from the weights as they are: in a folder of its own.

    Raises:
        ConfigError: on several ranks.
    """
    if context.ranks.count > 1:
        raise ConfigError(
            "train() was called again on several ranks, whose process groups ended with the first run. Start a "
            "second script from the saved model, or go on with resume_from_checkpoint=True and a larger max_steps."
        )
    context.folder.move_on()
    evaluator.begin_again()


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _take_folder(context: RunContext, stack: contextlib.ExitStack, resumes: bool) -> None:
    """The run's folder, for this process alone until the run ends."""
    if context.ranks.is_main:
        context.folder.check(context.config, resume=resumes)
        stack.enter_context(FolderLock(context.folder.path))


def _write_first(context: RunContext, stack: contextlib.ExitStack, *, is_new: bool) -> None:
    """The files that a run's folder has from its first step on, and its page until it ends."""
    folder, redactor, config = context.folder, context.redactor, context.config
    if is_new:
        folder.begin(redactor.tree(config.model_dump(mode="json")))
    provenance.note(folder.path, redactor.tree(provenance.session(context.ranks.count, _device())))
    seconds = config.run.report_seconds
    stack.enter_context(page_from_begin_to_end(folder.path, context.terminal.warn, redactor.text, seconds=seconds))


def _rehearse(context: RunContext, writer: ModelWriter) -> None:
    if context.ranks.is_main:
        merges, model = context.config.run.merge_adapter, writer.policy.model
        rehearse_end(model, writer.tokenizer, context.folder.path, merges=merges, prompts=writer.compared)


def _audit(context: RunContext, collector: Collector, prompts: Prompts) -> None:
    if context.ranks.is_main:
        audit_run(context.config, collector.scorer, prompts.prompts, context.terminal.warn)


def find_checkpoint(context: RunContext, resume: bool | str | Path) -> Path | None:
    """The checkpoint to go on from. One that was named is taken or refused, never replaced by another."""
    if not isinstance(resume, bool):
        why = checkpoint_files.problem(Path(resume))
        if why is not None:
            raise ConfigError(
                f"Checkpoint {resume} cannot be used: {why}. Without a path, --resume takes the newest whole one."
            )
        return Path(resume)
    found, warnings = checkpoint_files.newest(context.folder.checkpoints)
    for warning in warnings:
        context.terminal.warn(warning)
    if found is None:
        context.terminal.warn(f"No whole checkpoint in {context.folder.checkpoints}: starting from the beginning.")
    return found


def _facts(context: RunContext, collector: Collector, prompts: Prompts) -> dict[str, Any]:
    """What beside the config must be the same to go on."""
    config, scorer = context.config, collector.scorer
    facts: dict[str, Any] = {
        "data": fingerprint(prompts.prompts),
        "reward_funcs": [function.name for function in scorer.functions],
        "reward_weights": scorer.weights,
        "prompts_per_step": context.plan.prompts,
    }
    # A minibatch holds the same share of every rank, and draws without keys are those of a rank's whole batch.
    keyed = capabilities_of(collector.engine).keyed_draws
    if config.algorithm.steps_per_generation > 1 or not keyed:
        facts["ranks"] = context.ranks.count
    return facts


def plan_of_run(context: RunContext, evaluates: bool) -> Plan:
    """What the terminal knows of the steps before the first."""
    config, plan = context.config, context.plan
    return Plan(
        name=context.folder.path.name,
        algorithm=context.spec.name,
        max_steps=config.train.max_steps,
        groups=plan.prompts,
        rows=plan.rows_per_rank,
        passes=config.algorithm.num_iterations,
        logging_steps=config.run.logging_steps,
        samples=config.run.num_completions_to_print,
        every=(("eval", config.eval.eval_steps), ("save", config.run.save_steps)),
        at_end=(*(("eval",) if evaluates else ()), *(("save",) if config.run.save_at_end else ())),
    )
