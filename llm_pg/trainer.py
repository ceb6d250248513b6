"""The loop: prompts -> sampler -> rewards -> algorithm -> update -> metrics, and the trainer that runs it.

It is made of the same pieces as a loop of your own (docs/own-loop.md). Sampling and scoring are behind the source
(`rollout/source.py`, made in `run/sources.py`), which collects the scored completions of a step: now, with refills, or
ahead of their step. `GRPOTrainer` and the others, with TRL's names and arguments, are in `from_trl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .algorithms.algorithm import Algorithm
from .config import Config
from .config.load import checked
from .learner.optimizer import check_optimizer
from .metrics import Clock
from .model.bars import no_progress_bars
from .model.loading import generation_stub
from .rollout.curriculum import make_stream
from .rollout.reading import warn_unread
from .run.before.fit_to_prompts import fit_to_prompts
from .run.before.preflight import has_no_rewards
from .run.build import collector_of, make_policy, make_scorer, place_reward_models
from .run.context import make_context
from .run.engines import make_sampler
from .run.evaluator import Evaluator
from .run.inputs import (
    check_teacher,
    fit_to_dataset,
    is_foreseen,
    load_run_model,
    load_run_prompts,
    load_run_tokenizer,
    load_teacher,
    name_teacher,
)
from .run.logs.callbacks import Callbacks
from .run.saving.model_writer import ModelWriter
from .run.tools import make_toolbox, name_tools, show_tools, shown_to
from .run.training_run import TrainingRun, begin_again, open_run
from .sampling.protocol import SamplingEngine
from .terminal import Terminal


class Trainer:
    """Fine-tunes a causal LM by policy gradient. The algorithm is the row that the config names.

    Args:
        config: settings; a checked copy is used.
        model: hub id, local folder, or a transformers model; None = what the config's `model` section says.
        tokenizer: None = the model's own.
        peft_config: of a new adapter, which is then what is trained.
        reward_funcs: one or several; None = those of the config, or the task's own.
        reward_tokenizers: of reward models, one for each of reward_funcs; None = they bring theirs.
        train_dataset: a `datasets` object, or rows (dicts) with a `prompt` column; None = the config's.
        eval_dataset: the same for held-out prompts; None = the config's, or rows held out of the training data.
        callbacks: transformers' TrainerCallbacks, objects or classes.
        tools: functions that the model may call through its chat template, or their addresses; None = the config's.
        environment_factory: makes an object for each episode, whose public methods are tools; None = the config's.
        teacher: what algorithm opd and rows with a teacher_coef learn from: hub id, folder or a transformers model with
            the same tokenizer; None = the config's.
        sampler: an engine of your own; None = the config's `rollout.engine`.
        terminal: where progress is printed; None = chosen by what the output is.
        clock: seconds of phases that ended before (imports).

    Attributes:
        config: the run's settings, as they are used.
        context: what never changes while a run goes on: batch plan, ranks, strategy, terminal, ...
        folder: where the run writes.
        model: what is trained.
        tokenizer: its tokenizer.
        train_prompts: all training prompts.
        eval_prompts: those held out.
        prompts: step -> training prompts.
        scorer: completions -> rewards.
        algorithm: scored rollouts -> advantages and loss.
        policy: the model with its reference and critic.
        teacher: scores the tokens that are sampled; None = the algorithm has none.
        collector: prompts -> scored rollouts.
        callbacks: transformers' callbacks, with their state and control.
        model_writer: saves the model as `from_pretrained` reads it.
        evaluator: step -> evaluation; `evaluator.evaluate()` makes one now.
        run: the parts that `train` uses, once it has begun; None before.
        summary: of the last run that came to its end, as in `summary.json`; None before.

    Raises:
        ConfigError: bad settings, data, model or reward functions, before anything expensive.
    """

    def __init__(
        self,
        config: Config,
        model: Any = None,
        *,
        tokenizer: Any = None,
        peft_config: Any = None,
        reward_funcs: Any = None,
        reward_tokenizers: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        environment_factory: Any = None,
        teacher: Any = None,
        sampler: SamplingEngine | None = None,
        terminal: Terminal | None = None,
        clock: Clock | None = None,
    ) -> None:
        config = config.model_copy(deep=True)
        if teacher is not None:
            name_teacher(config, teacher)
        name_tools(config, tools, environment_factory)
        self.config = config = checked(config)
        check_optimizer(config)
        if not reward_funcs and has_no_rewards(config):
            config.data.num_eval_prompts = 0  # what passes is what a reward function says
        toolbox = make_toolbox(config, tools, environment_factory)
        train_dataset = fit_to_dataset(config, train_dataset, eval_dataset)
        self.context = context = make_context(config, model, terminal=terminal, clock=clock)
        self.folder, ranks, terminal = context.folder, context.ranks, context.terminal
        with context.clock("load"), no_progress_bars():
            self.tokenizer = load_run_tokenizer(config, model, tokenizer)
            check_teacher(context, teacher, self.tokenizer)
            # What data, tokenizer and rewards alone can refuse comes before the weights, which may be large.
            first = None if is_foreseen(config, model) else load_run_model(context, model, self.tokenizer, peft_config)
            described = generation_stub(config.model) if first is None else first
            show_tools(config, toolbox, described, self.tokenizer, terminal.warn)
            loaded = load_run_prompts(context, first, self.tokenizer, train_dataset, eval_dataset)
            self.train_prompts, self.eval_prompts = shown_to(config, toolbox, self.tokenizer, *loaded)
            every = [*self.train_prompts, *self.eval_prompts]
            self.prompts = make_stream(config, self.train_prompts, context.plan.prompts)
            rows, device = [prompt.row for prompt in every], context.accelerator.device
            self.scorer = make_scorer(config, reward_funcs, rows, reward_tokenizers, toolbox=toolbox)
            self.model = load_run_model(context, model, self.tokenizer, peft_config) if first is None else first
            fit_to_prompts(self.model, self.tokenizer, every, config, terminal.warn)
        place_reward_models(self.scorer, device)
        self.algorithm = Algorithm(context.spec, config.rollout.max_completion_length)
        self.policy = make_policy(context, self.model, self.tokenizer)
        self.teacher = load_teacher(context, teacher, self.policy)
        engine = sampler or make_sampler(config, self.model, self.tokenizer, ranks=ranks, say=terminal.warn)
        gamma = context.spec.gamma
        self.collector = collector_of(
            config, engine, self.model, self.tokenizer, self.scorer, device=device, gamma=gamma, toolbox=toolbox
        )
        warn_unread(self.collector.sampler.reader, self.train_prompts, config, terminal.warn)
        self.callbacks = Callbacks(callbacks, config, self.model, self.tokenizer, ranks.any_of)
        compared = self.eval_prompts or self.train_prompts
        self.model_writer = ModelWriter(context, self.policy, self.tokenizer, compared)
        self.evaluator = Evaluator(
            context, self.collector, self.eval_prompts, self.policy, self.model_writer, self.callbacks
        )
        self.run: TrainingRun | None = None
        self.summary: dict[str, Any] | None = None

    def train(self, resume: bool | str | Path | None = False, *, override: bool = False) -> dict[str, Any]:
        """Runs to `max_steps`; returns the summary that is also written to `summary.json`.

        Called again, it trains the weights as they are by a further run, in the folder `<run>-2`.

        Args:
            resume: True = go on from the newest whole checkpoint of the run's folder; a path = from that one.
            override: go on although the checkpoint belongs to other settings.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
            RunStopped, RewardError, EngineError: the run cannot go on. Whatever a step raises, its batch and the state
                before it are saved first (`crash/`).
        """
        if self.run is not None and not resume:
            begin_again(self.context, self.evaluator)
            self.run = None
        with open_run(
            self.context,
            self.policy,
            self.algorithm,
            self.prompts,
            self.collector,
            self.evaluator,
            self.callbacks,
            make_optimizer=self.build_optimizer,
            make_scheduler=self.build_scheduler,
            teacher=self.teacher,
            resume=resume or False,
            override=override,
        ) as run:
            self.run = run
            run.evaluate_before()
            for step in run.steps():
                experience = run.source.collect(step)
                update = run.learner.update(experience)
                run.callbacks.after_update(step)
                evaluation = run.evaluator.after_step(step)
                run.observers.after_step(step, experience, update, evaluation)
                run.finite.observe([each.stepped for each in update.steps], step)
                run.checkpointer.after_step(step)
            self.summary = run.finish()
        return self.summary

    def build_optimizer(self) -> Any:
        """An optimiser over `policy.parameters()` for the run that begins; None = the config's. A subclass may return
        one."""
        return None

    def build_scheduler(self, num_steps: int, optimizer: Any) -> Any:
        """A schedule of the run that begins; None = the config's. A subclass may return one.

        Args:
            num_steps: of the run.
            optimizer: whose rate it moves.
        """
        return None

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (of a PEFT model the
        adapter), and a critic beside them in `critic.safetensors`.

        Args:
            output_dir: a folder; None = `model/` in the run's folder.
        """
        self.model_writer.save(output_dir)
