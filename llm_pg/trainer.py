"""The loop: prompts -> sampler -> rewards -> algorithm -> update -> metrics; and the trainers that run it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from .algorithms.algorithm import Algorithm
from .config import Config, ConfigError, flat, nearest
from .config.load import checked
from .config.trl import TRAINER
from .from_trl.face import TrlFace
from .from_trl.log import named_evaluation
from .from_trl.overrides import check_overrides
from .from_trl.result import EvaluationResult, TrainResult
from .learner.optimizer import check_optimizer, make_optimizer, make_scheduler
from .metrics import Clock
from .model.loading import context_length
from .model.policy import Policy
from .prompts import Prompt
from .prompts.load import load_held_out
from .rollout.curriculum import make_stream
from .rollout.reading import say_unread
from .run.build import collector_of, make_scorer, sampling_params
from .run.callbacks import Callbacks
from .run.context import make_context
from .run.engines import make_sampler
from .run.evaluator import Evaluator
from .run.folder import RunFolder
from .run.loading import fit_to_dataset, load_model_and_tokenizer, load_run_prompts, load_teacher, name_teacher
from .run.saving import ModelWriter
from .run.start import Factories
from .run.training_run import TrainingRun, open_run
from .sampling.protocol import SamplingEngine
from .terminal import Terminal
from .words import choices


def check_trainer_arguments(given: dict[str, Any]) -> None:
    """ConfigError for an argument of TRL's trainers that asks for what is not here, or that nobody knows."""
    for name, value in given.items():
        if name not in TRAINER:
            known = [*TRAINER, "teacher_model", "sampler", "terminal", "clock"]
            raise ConfigError(f"A trainer has no argument {name!r} (given {value!r}).{nearest(name, known)}")
        word = TRAINER[name]
        if not word.asks_for_nothing(value):
            raise ConfigError(f"TRL's argument {name}={value!r} is refused: {word.note}.")


class PolicyGradientTrainer(TrlFace):
    """Fine-tunes a causal LM by policy gradient. The algorithm is the row that the config names.

    Args:
        model: hub id, local folder, or a transformers model; None = what the config's `model` section says.
        reward_funcs: one or several: functions in TRL's form or the plain form, names of shipped ones,
            `module:function` or `file.py:function`, reward models (hub id, folder or module); None = those of the
            config, or the task's own.
        args: `GRPOConfig(...)`, `RLOOConfig(...)`, `ReinforceConfig(...)` or a `Config`.
        train_dataset: a `datasets` object, or rows (dicts) with a `prompt` column; None = the config's.
        eval_dataset: the same for held-out prompts; None = the config's, or rows held out of the training data.
        processing_class: the tokenizer; None = the model's own.
        peft_config: a peft config; the reference is then the model with the adapter off.
        reward_processing_classes: tokenizers of reward models, one for each of reward_funcs; None = they bring theirs.
        callbacks: transformers' TrainerCallbacks, objects or classes.
        optimizers: an optimiser over the parameters of `model`, given as an object, and a schedule of it; either may be
            None = the config's.
        teacher_model: what algorithm opd and rows with a teacher_coef learn from: hub id, folder or a transformers
            model with the same tokenizer; None = the config's.
        sampler: an engine of your own, with the method of `sampling.protocol.SamplingEngine`; None = the config's
            `rollout.engine`. Its log-probabilities are compared with the trainer's at every step (`sampler_gap`).
        terminal: where progress is printed; None = chosen by what the output is.
        clock: seconds of phases that ended before (imports).
        **of_trl: further arguments of TRL's trainers, which are refused with what to do instead.

    Attributes:
        config: the run's settings, as they are used.
        model: what is trained.
        tokenizer: its tokenizer.
        policy: the model with its reference and critic.
        prompts: training prompts by step.
        train_prompts: all training prompts.
        eval_prompts: those held out.
        run: the parts that `train` uses, once it has begun; None before.

    Raises:
        ConfigError: bad settings, data, model or reward functions, before anything expensive.
    """

    algorithms: ClassVar[tuple[str, ...]] = ()
    default_config: ClassVar[type[Config]] = flat.GRPOConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Config | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] | None = None,
        teacher_model: Any = None,
        sampler: SamplingEngine | None = None,
        terminal: Terminal | None = None,
        clock: Clock | None = None,
        **of_trl: Any,
    ) -> None:
        check_trainer_arguments(of_trl)
        check_overrides(self, PolicyGradientTrainer)
        config = (args or self.default_config()).model_copy(deep=True)
        if teacher_model is not None:
            name_teacher(config, teacher_model)
        self.config = config = checked(config)
        self._check_algorithm()
        check_optimizer(config)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        train_dataset = fit_to_dataset(config, train_dataset, eval_dataset)
        self.context = context = make_context(config, model, terminal=terminal, clock=clock)
        with context.clock("load"):
            self.model, self.tokenizer = load_model_and_tokenizer(context, model, processing_class, peft_config)
            self.train_prompts, self.eval_prompts = load_run_prompts(
                context, self.model, self.tokenizer, train_dataset, eval_dataset
            )
        self.prompts = make_stream(config, self.train_prompts, context.plan.prompts)
        rows = [prompt.row for prompt in (*self.train_prompts, *self.eval_prompts)]
        device = context.accelerator.device
        self.scorer = make_scorer(config, reward_funcs, rows, reward_processing_classes, device)
        self.algorithm = Algorithm(context.spec, config.rollout.max_completion_length)
        self.policy = Policy(
            self.model,
            params=sampling_params(config),
            tokenizer=self.tokenizer,
            autocast=context.accelerator.autocast,
            packing=config.train.packing,
            router_aux_loss_coef=config.train.router_aux_loss_coef,
        )
        self.teacher = load_teacher(context, teacher_model, self.policy)
        self.collector = collector_of(
            config,
            sampler or make_sampler(config, self.model, self.tokenizer, ranks=context.ranks, say=context.terminal.warn),
            self.model,
            self.tokenizer,
            self.scorer,
            device=device,
            gamma=context.spec.gamma,
        )
        say_unread(self.collector.sampler.reader, self.train_prompts, config, context.terminal.warn)
        classes = reward_processing_classes
        self.reward_processing_classes = list(classes) if isinstance(classes, (list, tuple)) else [classes]
        self.callbacks = Callbacks(callbacks, config, self.model, self.tokenizer, context.ranks.any_of)
        compared = self.eval_prompts or self.train_prompts
        writer = ModelWriter(context, self.policy, self.tokenizer, compared)
        self.evaluator = Evaluator(context, self.collector, self.eval_prompts, self.policy, writer, self.callbacks)
        self.run: TrainingRun | None = None
        self._result: TrainResult | None = None
        self._optimizer, self._lr_scheduler = optimizers or (None, None)
        self.callbacks.emit = self.log

    def _check_algorithm(self) -> None:
        name = self.config.algorithm.name
        if self.algorithms and name not in self.algorithms:
            raise ConfigError(
                f"{type(self).__name__} runs {', '.join(self.algorithms)}, and the config names algorithm {name!r}. "
                "Use the trainer of that algorithm, or PolicyGradientTrainer, which runs every row."
            )

    def train(
        self,
        resume: bool | str | Path | None = False,
        *,
        override: bool = False,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> TrainResult:
        """Run to `max_steps`; returns the summary that is also written to `summary.json`, with the fields of
        transformers' TrainOutput: `global_step`, `training_loss`, `metrics`.

        Called again, it trains the weights as they are by a further run, in the folder `<run>-2`.

        Args:
            resume: True = go on from the newest whole checkpoint of the run's folder; a path = from that one.
            override: go on although the checkpoint belongs to other settings.
            resume_from_checkpoint: TRL's name for `resume`.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
            RunStopped, RewardError, EngineError: the run cannot go on. Whatever a step raises, its batch and the state
                before it are kept first (`crash/`).
        """
        again = bool(resume or resume_from_checkpoint)
        if self.run is not None and not again:
            self._begin_again()
        with open_run(
            self.context,
            self.policy,
            self.algorithm,
            self.prompts,
            self.collector,
            self.evaluator,
            self.callbacks,
            factories=self._factories(),
            resume=resume or resume_from_checkpoint or False,
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
            self._result = run.finish()
        if getattr(config := self.config, "push_to_hub", False) is True:
            self.push_to_hub(dataset_name=config.data.dataset_name)
        return self._result

    def _factories(self) -> Factories:
        """What this trainer makes itself: what was given, and what a subclass overrides."""
        base = PolicyGradientTrainer
        optimizer = self._optimizer is not None or type(self).create_optimizer is not base.create_optimizer
        scheduler = self._lr_scheduler is not None or type(self).create_scheduler is not base.create_scheduler
        return Factories(
            (lambda: self.create_optimizer() or self._optimizer) if optimizer else None,
            (lambda steps, made: self.create_scheduler(steps, made) or self._lr_scheduler) if scheduler else None,
            self.teacher,
        )

    def create_optimizer(self) -> Any:
        """The optimiser that was given, else that of the config. A subclass may make another."""
        self._optimizer = self._optimizer or make_optimizer(self.config.train, self.policy.parameters())
        return self._optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule that was given, else that of the config. A subclass may make another.

        Args:
            num_training_steps: steps of the run.
            optimizer: whose rate it moves; None = the run's own.
        """
        if self._lr_scheduler is None:
            self._lr_scheduler = make_scheduler(self.config, optimizer or self._optimizer, num_training_steps)
        return self._lr_scheduler

    def _begin_again(self) -> None:
        """For a further run from the weights as they are: in a folder of its own, with a new optimiser."""
        if self.context.ranks.count > 1:
            raise ConfigError(
                "train() was called again on several ranks, whose process groups ended with the first run. Start a "
                "second script from the saved model, or go on with resume_from_checkpoint=True and a larger max_steps."
            )
        self.context.folder.move_on()
        self.run = None
        self.evaluator.begin_again()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> EvaluationResult:
        """Greedy and sampled pass rates and mean rewards, with intervals, as a dict by TRL's names and ours.

        The numbers are also written to `state.log_history` and given to the callbacks' `on_evaluate`.

        Args:
            eval_dataset: rows to evaluate on, or several sets by name; None = the held-out prompts.
            ignore_keys: of transformers; there are no model outputs here that could be left out.
            metric_key_prefix: before each name; of several sets the name of the set follows it.
        """
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        values: dict[str, float] = {}
        first = None
        for name, dataset in sets.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            prompts = self.eval_prompts if dataset is None else self._prompts_of(dataset)
            began = time.perf_counter()
            evaluation = self.evaluator.evaluate(f"Evaluation {name}".strip(), prompts)
            first = first or evaluation
            seconds = time.perf_counter() - began
            values.update(named_evaluation(evaluation, prefix))
            values.update({f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(prompts) / seconds})
        self.callbacks.evaluated_as(values)
        return EvaluationResult(values, first)

    def _prompts_of(self, dataset: Any) -> list[Prompt]:
        if isinstance(dataset, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in known:
                raise ConfigError(
                    f"evaluate got the name {dataset!r}, and eval_dataset {choices(dataset, list(known))}"
                )
            dataset = known[dataset]
        every = self.config.model_copy(deep=True)
        every.data.num_eval_prompts = 10**9
        return load_held_out(every, self.tokenizer, eval_dataset=dataset, context_length=context_length(self.model))

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Writes weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (of a PEFT model the
        adapter), and a critic beside them in `critic.safetensors`.

        Args:
            output_dir: a folder; None = `model/` in the run's folder.
            _internal_call: as in transformers; without effect.
        """
        self.evaluator.writer.save(output_dir)

    @property
    def folder(self) -> RunFolder:
        """Where the run writes."""
        return self.context.folder


class ReinforceTrainer(PolicyGradientTrainer):
    """REINFORCE with reward-to-go, and rows with another baseline or normalisation. KL in the reward (k1)."""

    algorithms = ("reinforce", "reinforce_plus_plus", "remax", "opo")
    default_config = flat.ReinforceConfig


class RLOOTrainer(PolicyGradientTrainer):
    """RLOO: each completion against the mean of the others of its group; unbiased. KL in the reward (k1).

    Also the rows that are unbiased for another objective: maxrl (likelihood of success), pass_at_k.
    """

    algorithms = ("rloo", "maxrl", "pass_at_k")
    default_config = flat.RLOOConfig


class GRPOTrainer(PolicyGradientTrainer):
    """GRPO and its relatives: group mean, group deviation, clipping; the reduction and KL of TRL 1.16."""

    algorithms = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo", "reinforce_plus_plus_baseline")
    default_config = flat.GRPOConfig


class ActorCriticTrainer(PolicyGradientTrainer):
    """A2C and PPO: a learned critic, GAE over tokens; see the config's `critic` section."""

    algorithms = ("a2c", "ppo")
    default_config = flat.ActorCriticConfig
