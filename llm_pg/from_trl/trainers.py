"""Trainers with the names and arguments of TRL's. Each name calls the piece that does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, trainer_pt_utils

from ..config import Config, flat
from ..estimators.ratios import has_left
from ..learner.optimizer import make_optimizer, make_scheduler
from ..metrics import Clock
from ..run.logs.callbacks import Callbacks
from ..sampling.protocol import SamplingEngine
from ..terminal import Terminal
from ..trainer import Trainer
from .checks import check_algorithm, check_made, check_overrides, check_trainer_arguments
from .datasets import evaluation_sets, named_sets, prompts_of, train_dataloader
from .hub import HubModel, HubSaves
from .result import EvaluationResult, TrainResult, evaluate_sets


class PolicyGradientTrainer(Trainer):
    """Fine-tunes a causal LM by policy gradient. The algorithm is the row that the config names.

    Args:
        model: hub id, local folder, or a transformers model; None = what the config's `model` section says.
        reward_funcs: one or several: functions in TRL's form or the plain form, names of shipped ones,
            `module:function` or `file.py:function`, reward models (hub id, folder or module); None = those of the
            config, or the task's own.
        args: `GRPOConfig(...)`, `RLOOConfig(...)`, `ReinforceConfig(...)` or a `Config`.
        train_dataset: a `datasets` object, or rows (dicts) with a `prompt` column; None = the config's.
        eval_dataset: the same for held-out prompts, or several sets by name, of which the first (or the one that
            metric_for_best_model names) decides; None = the config's, or rows held out of the training data.
        processing_class: the tokenizer; None = the model's own.
        peft_config: a peft config; the reference is then the model with the adapter off.
        tools: functions that the model may call through its chat template, or their addresses (docs/tools.md); None =
            the config's.
        environment_factory: makes an object for each episode: `reset(**row)` begins it, its other public methods are
            tools, and reward functions get the objects as `environments`; None = the config's.
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
        algorithms: the rows that this trainer runs; () = all.
        default_config: its class of config.

    What else it has are the pieces of `llm_pg.trainer.Trainer`, and TRL's names for them.

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
        tools: Sequence[Any] | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] | None = None,
        environment_factory: Any = None,
        teacher_model: Any = None,
        sampler: SamplingEngine | None = None,
        terminal: Terminal | None = None,
        clock: Clock | None = None,
        **of_trl: Any,
    ) -> None:
        check_trainer_arguments(of_trl)
        check_overrides(self, PolicyGradientTrainer)
        args, named = named_sets(args or self.default_config(), eval_dataset)
        check_algorithm(type(self).__name__, args.algorithm.name, self.algorithms)
        super().__init__(
            args,
            model,
            tokenizer=processing_class,
            peft_config=peft_config,
            reward_funcs=reward_funcs,
            reward_tokenizers=reward_processing_classes,
            train_dataset=train_dataset,
            eval_dataset=next(iter(named.values())) if named else eval_dataset,
            callbacks=callbacks,
            tools=tools,
            environment_factory=environment_factory,
            teacher=teacher_model,
            sampler=sampler,
            terminal=terminal,
            clock=clock,
        )
        if named:
            self.evaluator.name, *others = named
            self.evaluator.others = {name: prompts_of(self, named[name], named) for name in others}
        self.output_dir = Path(self.config.run.output_dir)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        classes = reward_processing_classes
        self.reward_processing_classes = list(classes) if isinstance(classes, (list, tuple)) else [classes]
        self.own_optimizer: Any
        self.own_scheduler: Any
        self.own_optimizer, self.own_scheduler = optimizers or (None, None)
        self.hub = HubModel(self.config, self.context.spec, self.folder)
        if self.hub.options.push and self.hub.options.strategy != "end":
            self.callbacks.add(HubSaves(self.hub, self.context.terminal.warn))
        self.callbacks.emit = self.log

    # --- training and evaluation

    def train(
        self,
        resume: bool | str | Path | None = False,
        *,
        override: bool = False,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> TrainResult:
        """Runs to `max_steps`; returns the summary that is also written to `summary.json`, with the fields of
        transformers' TrainOutput: `global_step`, `training_loss`, `metrics`.

        Called again, it trains the weights as they are by a further run, in the folder `<run>-2`.

        Args:
            resume: True = go on from the newest whole checkpoint of the run's folder; a path = from that one.
            override: go on although the checkpoint belongs to other settings.
            resume_from_checkpoint: TRL's name for `resume`.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
            RunStopped, RewardError, EngineError: the run cannot go on. Whatever a step raises, its batch and the state
                before it are saved first (`crash/`).
        """
        summary = super().train(resume or resume_from_checkpoint, override=override)
        if self.hub.options.push is True:
            self.push_to_hub(dataset_name=self.config.data.dataset_name)
        return TrainResult(summary)

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
        result = evaluate_sets(
            self.evaluator, evaluation_sets(self, eval_dataset, self.eval_dataset), metric_key_prefix
        )
        self.callbacks.evaluated_as(result)
        return result

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Writes weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (of a PEFT model the
        adapter), and a critic beside them in `critic.safetensors`.

        Args:
            output_dir: a folder; None = `model/` in the run's folder.
            _internal_call: as in transformers; without effect.
        """
        super().save_model(output_dir)

    def get_train_dataloader(self) -> Any:
        """An epoch of rows as they are trained on: a batch is the rows of one step, each as often as it is sampled."""
        return train_dataloader(self.prompts, self.context.plan)

    # --- optimiser and schedule

    @property
    def optimizer(self) -> Any:
        """Of the run, or as `create_optimizer` left it; None before."""
        return self.own_optimizer if self.run is None else self.run.learner.optimizer

    @optimizer.setter
    def optimizer(self, value: Any) -> None:
        self.own_optimizer = value

    @property
    def lr_scheduler(self) -> Any:
        """Of the run, or as `create_scheduler` left it; None before."""
        return self.own_scheduler if self.run is None else self.run.learner.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, value: Any) -> None:
        self.own_scheduler = value

    def create_optimizer(self) -> Any:
        """The optimiser that was given, else that of the config. A subclass may make another."""
        self.own_optimizer = self.own_optimizer or make_optimizer(self.config.train, self.policy.parameters())
        return self.own_optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule that was given, else that of the config. A subclass may make another.

        Args:
            num_training_steps: steps of the run.
            optimizer: whose rate it moves; None = the run's own.
        """
        optimizer = optimizer or self.own_optimizer
        self.own_scheduler = self.own_scheduler or make_scheduler(self.config, optimizer, num_training_steps)
        return self.own_scheduler

    def build_optimizer(self) -> Any:
        if type(self).create_optimizer is PolicyGradientTrainer.create_optimizer:
            return self.own_optimizer
        return check_made(self.create_optimizer() or self.own_optimizer, "create_optimizer")

    def build_scheduler(self, num_steps: int, optimizer: Any) -> Any:
        if type(self).create_scheduler is PolicyGradientTrainer.create_scheduler:
            return self.own_scheduler
        return check_made(self.create_scheduler(num_steps, optimizer) or self.own_scheduler, "create_scheduler")

    # --- what it is made of

    @property
    def args(self) -> Config:
        """The run's config."""
        return self.config

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def state(self) -> TrainerState:
        """transformers' TrainerState: `log_history`, `global_step`, `epoch`, ..."""
        return self.callbacks.state

    @property
    def control(self) -> TrainerControl:
        """transformers' TrainerControl."""
        return self.callbacks.control

    @property
    def callback_handler(self) -> Callbacks:
        """What calls the callbacks; its attribute `callbacks` is the list of them."""
        return self.callbacks

    @property
    def accelerator(self) -> Accelerator:
        """accelerate's Accelerator."""
        return self.context.accelerator

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions; of a reward model its module."""
        loaded = [function.loaded() for function in self.scorer.functions]
        return [getattr(each, "model", None) or each for each in loaded]

    @property
    def reward_func_names(self) -> list[str]:
        """Their names, as they are logged."""
        return [function.name for function in self.scorer.functions]

    @property
    def reward_weights(self) -> torch.Tensor:
        """Their weights."""
        return torch.tensor(self.scorer.weights, dtype=torch.float32)

    @property
    def ref_model(self) -> Any:
        """The reference of the KL penalty, a module; None where there is none (beta 0), or where it is the model with
        its adapter switched off. Before `train` it is the policy as it is now."""
        policy = self.policy
        if self.run is None and self.context.spec.beta and not policy.has_adapter and not policy.reference:
            policy.freeze_reference()
        return policy.reference

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of a mixture of experts is trained."""
        return self.policy.routers is not None

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return self.context.ranks.is_main

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.accelerator.is_local_main_process

    def get_high_entropy_mask(self, entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        """Returns the tokens of largest entropy over all ranks, bool (B, T).

        Args:
            entropies: of each token, nats (B, T).
            mask: of the tokens that count (B, T).
            threshold: share of the tokens that are left out, in [0, 1]; the token at it is kept.
        """
        inside = mask.bool()
        everywhere = self.accelerator.gather(
            self.accelerator.pad_across_processes(entropies.masked_fill(~inside, torch.nan), dim=1, pad_index=torch.nan)
        )
        known = everywhere[~everywhere.isnan()]
        if not len(known):
            return torch.zeros_like(inside)
        return (entropies >= torch.quantile(known.float(), threshold)) & inside

    @staticmethod
    def get_off_policy_mask(
        advantages: torch.Tensor,
        per_token_logps: torch.Tensor,
        sampling_per_token_logps: torch.Tensor,
        mask: torch.Tensor,
        off_policy_threshold: float,
    ) -> torch.Tensor:
        """Returns 1 for completions that are kept by `off_policy_mask_threshold`, else 0; (B, 1), of the mask's type.

        Args:
            advantages: of each completion (B, 1).
            per_token_logps: of its tokens under the policy, nats (B, T).
            sampling_per_token_logps: by the sampler, nats (B, T).
            mask: of the tokens that count (B, T).
            off_policy_threshold: nats a token, > 0.
        """
        left_B1 = has_left(per_token_logps, sampling_per_token_logps, mask.bool(), off_policy_threshold)
        return ((advantages >= 0) | ~left_B1).to(mask.dtype)

    # --- callbacks and the log

    def add_callback(self, callback: Any) -> None:
        """Adds a callback.

        Args:
            callback: a TrainerCallback, or its class, of which one is made.
        """
        self.callbacks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Takes a callback out.

        Args:
            callback: the callback, or its class: the first of it is taken.
        """
        self.callbacks.pop(callback)

    def pop_callback(self, callback: Any) -> TrainerCallback | None:
        """Takes a callback out and returns it; None where there is none.

        Args:
            callback: the callback, or its class: the first of it is taken.
        """
        return self.callbacks.pop(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Takes an entry of the log: into `state.log_history`, and to the callbacks. A subclass may add to it.

        Args:
            logs: numbers by their names.
            start_time: of transformers; without effect.
        """
        self.callbacks.write(logs)

    def metrics_format(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns the numbers as people read them.

        Args:
            metrics: numbers by their names.
        """
        return dict(trainer_pt_utils.metrics_format(dict(metrics)))

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Prints the numbers of a split.

        Args:
            split: train or eval.
            metrics: numbers by their names.
        """
        trainer_pt_utils.log_metrics(self, split, dict(metrics))

    # --- what it writes into `args.output_dir`, and the hub

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Writes the numbers to `<split>_results.json`.

        Args:
            split: train or eval.
            metrics: numbers by their names.
            combined: also into `all_results.json`.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        trainer_pt_utils.save_metrics(self, split, dict(metrics), combined)

    def save_state(self) -> None:
        """Writes `state` to `trainer_state.json`."""
        if self.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(self.output_dir / "trainer_state.json"))

    def end(self) -> None:
        """Ends what is still open; a run closes its trackers and process groups itself."""

    @property
    def hub_model_id(self) -> str | None:
        """Of the repository that `push_to_hub` made or found; before, as it was given."""
        return self.hub.model_id

    def create_model_card(self, model_name: Any = None, dataset_name: Any = None, tags: Any = (), **more: Any) -> None:
        """Writes the model's card, `README.md`, into `output_dir`: data, algorithm, before and after, how to reproduce.

        Args:
            model_name: in the title; None = that of the run.
            dataset_name: in the card's data.
            tags: in the card's data.
            **more: of transformers' Trainer; what the card has no place for is left out.
        """
        if self.is_world_process_zero():
            of_card = {"model_name": model_name, "dataset_name": dataset_name or more.get("dataset"), "tags": tags}
            self.hub.write_card(self.output_dir, self.summary, **of_card)

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **options: Any) -> Any:
        """Uploads the model of the run and its card to the hub; returns huggingface_hub's CommitInfo.

        Args:
            commit_message: of the upload.
            blocking: of transformers; the upload is always waited for.
            **options: token, revision, and what `create_model_card` takes.

        Raises:
            ConfigError: the hub refuses, or cannot be reached; the model is where it was.
        """
        if not self.folder.model.exists():
            self.save_model()
        return self.hub.push(self.summary, commit_message, **options) if self.is_world_process_zero() else None


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

    algorithms = (
        *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo", "gmpo", "dppo", "sapo", "luspo", "vespo"),
        "reinforce_plus_plus_baseline",
    )
    default_config = flat.GRPOConfig


class ActorCriticTrainer(PolicyGradientTrainer):
    """A2C and PPO: a learned critic, GAE over tokens; see the config's `critic` section."""

    algorithms = ("a2c", "ppo")
    default_config = flat.ActorCriticConfig
