"""The parts of a trainer, made from a config and from what its caller brings."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from ..algorithms.algorithm import Algorithm
from ..collect.collector import Collector
from ..collect.curriculum import make_stream
from ..collect.episodes import EpisodeCollector
from ..collect.twins import make_twins
from ..config import Config, ConfigError, flat
from ..config.check import plan_batch, resolve_row
from ..config.load import checked
from ..config.schema import EvalConfig
from ..doctor import arithmetic
from ..environments.rollout import Limits
from ..environments.writing import TurnWriter
from ..evaluate import Evaluation, Judged, evaluate
from ..metrics import Clock, read_metrics
from ..prompts import Prompt, load_prompts
from ..prompts.sources import read_object
from ..rewards.scorer import Scorer
from ..sampling.protocol import Sampler, SamplingParams
from ..terminal import Terminal, make_terminal
from ..terminal.plain import Plan
from ..training.adapters import check_passes, check_repeatable, check_trainable, has_adapter
from ..training.critic import HEAD_LEARNING_RATE, Critic
from ..training.merging import check_merge
from ..training.optimiser import make_optimizer, make_scheduler
from ..training.policy import Policy
from ..training.precision import compute_in, hold_trained_in_float32
from ..training.update import Updater
from ..words import choices
from .callbacks import Callbacks
from .drop_in import TrlFace, check_arguments
from .engines import make_sampler
from .folder import RunFolder
from .launch import (
    check_ahead,
    check_backend,
    check_count,
    cpu_asked,
    make_shards,
    make_zero,
    parent_command,
    scales_losses,
    without_deepspeed,
    zero_in_parts,
)
from .models import end_token_ids, incoming_half, load_model, load_tokenizer, prepare_model, prepare_tokenizer
from .preflight import task_rewards
from .ranks import Ranks
from .redact import Redactor
from .trial import Trial, expected_seconds, memory_text, try_longest, wanted


class Parts(TrlFace):
    """See `trainer.PolicyGradientTrainer` for the arguments."""

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
        callbacks: Sequence[Any] | None = None,
        terminal: Terminal | None = None,
        clock: Clock | None = None,
        **of_trl: Any,
    ) -> None:
        self.began = time.perf_counter()
        check_arguments(of_trl)
        self.config = config = checked((args or self.default_config()).model_copy(deep=True))
        self._check_algorithm()
        config.train.use_cpu = config.train.use_cpu or cpu_asked(os.environ, parent_command())
        if isinstance(config, flat.FlatConfig) and train_dataset is not None and not isinstance(train_dataset, dict):
            if not isinstance(train_dataset, Sized):  # a stream or a generator, whose length nobody knows before
                cap = config.data.num_train_prompts + (config.data.num_eval_prompts if eval_dataset is None else 0)
                train_dataset = list(read_object(train_dataset, "train_dataset", config, cap).rows)
            config.fit(len(train_dataset), holds_out=eval_dataset is None)
        self.clean = Redactor(config.model_dump(mode="json"))
        self.clock = clock or Clock()
        self.row = resolve_row(config)
        compute_in(config, incoming_half(model, config.model), scales_losses=scales_losses(config))
        check_backend(config, needs_critic=self.row.needs_critic)
        # accelerate keeps the first Accelerator's precision for the whole process; a second trainer may want another.
        AcceleratorState._reset_state()
        with without_deepspeed():
            self.accelerator = Accelerator(
                mixed_precision="bf16" if config.train.bf16 else "fp16" if config.train.fp16 else "no",
                cpu=config.train.use_cpu,
                # Said, as a launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide gradients; sums are ours.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                log_with=list(config.run.report_to) or None,
                project_dir=config.run.output_dir,
            )
        check_count(self.accelerator.num_processes)
        check_ahead(config, self.accelerator.num_processes)
        self.ranks = Ranks(self.accelerator)
        self.shards = make_shards(self.accelerator)
        self.terminal = (terminal or make_terminal()) if self.ranks.is_main else Terminal.silent()
        self.plan = plan_batch(config, self.ranks.count)
        self.folder = RunFolder(config)
        # An adapter draws its first weights from the global generator.
        with self.clock("load"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self._load(model, processing_class, peft_config, train_dataset, eval_dataset)
        self.scorer = make_scorer(config, reward_funcs, [p.row for p in (*self.train_prompts, *self.eval_prompts)])
        self.params = sampling_params(config)
        self.algorithm = Algorithm(self.row, config.rollout.max_completion_length)
        sampler = make_sampler(config, self.model, self.tokenizer, ranks=self.ranks, say=self.terminal.warn)
        self.collector = collector_of(
            config,
            sampler,
            self.model,
            self.tokenizer,
            self.scorer,
            device=self.accelerator.device,
            gamma=self.row.gamma,
        )
        self.trial: Trial | None = None
        self.step = 0
        self.callbacks = Callbacks(callbacks, config, self.model, self.tokenizer)

    def _check_algorithm(self) -> None:
        name = self.config.algorithm.name
        if self.algorithms and name not in self.algorithms:
            raise ConfigError(
                f"{type(self).__name__} runs {', '.join(self.algorithms)}, and the config names algorithm {name!r}. "
                "Use the trainer of that algorithm, or PolicyGradientTrainer, which runs every row."
            )

    def _load(self, model: Any, tokenizer: Any, peft_config: Any, train: Any, held_out: Any) -> None:
        config = self.config
        if isinstance(model, (str, Path)):
            config.model.model_name_or_path = str(model)
            config.model.make = None
        self.tokenizer = prepare_tokenizer(tokenizer) if tokenizer is not None else self._own_tokenizer(model)
        if model is None or isinstance(model, (str, Path)):
            self.model = load_model(config.model, self.tokenizer, seed=config.run.seed, peft_config=peft_config)
        else:
            self.model = prepare_model(model, self.tokenizer, config.model, peft_config)
        check_trainable(self.model)
        said = hold_trained_in_float32(self.model, autocast=config.train.bf16 or config.train.fp16)
        if said is not None:
            self.terminal.say(said)
        if has_adapter(self.model):
            check_passes(self.model, self.accelerator.autocast)
        if config.model.disable_dropout:
            check_repeatable(self.model, self.accelerator.autocast)
        check_merge(config, self.model, sharded=self.shards is not None or zero_in_parts())
        if config.algorithm.sync_ref_model and has_adapter(self.model):
            raise ConfigError(
                "sync_ref_model is true and the model has an adapter: its reference is the same weights with the "
                "adapter off, which cannot move by themselves. Set sync_ref_model=false, or train without the adapter."
            )
        context = getattr(self.model.config, "max_position_embeddings", None)
        self.train_prompts, self.eval_prompts = load_prompts(
            config, self.tokenizer, train_dataset=train, eval_dataset=held_out, context_length=context
        )
        if isinstance(config, flat.FlatConfig):
            config.settle(len(self.train_prompts), self.plan.prompts)
        self.stream = make_stream(config, self.train_prompts, self.plan.prompts)
        if (
            self.shards is None and not config.model.load_in_4bit
        ):  # else each layer goes to the device on its own, when it is cut
            self.model.to(self.accelerator.device)
        if config.train.gradient_checkpointing:
            # transformers 5.23 renamed it; older ones know the second name alone.
            name = "activation_checkpointing_enable"
            enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            if hasattr(self.model, "enable_input_require_grads"):
                self.model.enable_input_require_grads()

    def _own_tokenizer(self, model: Any) -> Any:
        if model is not None and not isinstance(model, (str, Path)):
            name = getattr(model.config, "_name_or_path", "")
            if not name:
                raise ConfigError(
                    "The model was given as an object without a name: give its tokenizer as processing_class."
                )
            self.config.model.model_name_or_path = name
            self.config.model.make = None
        return load_tokenizer(self.config.model)

    def _tell_callbacks(self, done: int) -> None:
        """The run begins for them, with what an earlier process logged."""
        epoch = len(self.train_prompts) / self.plan.prompts
        earlier = read_metrics(self.folder.metrics) if done and self.ranks.is_main else []
        self.collector.max_steps = self.config.train.max_steps
        self.callbacks.begin(
            done,
            self.config.train.max_steps,
            epoch,
            self.optimizer.optimizer,
            self.scheduler,
            is_main=self.ranks.is_main,
            earlier=earlier,
        )

    @property
    def critic_only_steps(self) -> int:
        """First steps of the run in which only the critic learns."""
        return self.config.critic.critic_warmup_steps if self.row.needs_critic else 0

    def _make_critic(self) -> Critic | None:
        settings = self.config.critic
        if not self.row.needs_critic:
            return None
        critic = Critic(self.model, kind=settings.critic_kind, trunk_gradient=settings.critic_trunk_gradient)
        if settings.critic_path is not None:
            try:
                critic.load(settings.critic_path)
            except ValueError as error:
                raise ConfigError(f"critic_path: {error}") from None
        return critic

    def _critic_rate(self) -> float:
        settings = self.config.critic
        if settings.critic_learning_rate is not None:
            return settings.critic_learning_rate
        return HEAD_LEARNING_RATE if settings.critic_kind == "head" else 2 * self.config.train.learning_rate

    def _try_longest(self) -> Trial | None:
        """Whether the longest batch fits, before anything depends on it; None where it is not tried."""
        config, micro = self.config, self.plan.micro_rows
        self.terminal.say(f"{arithmetic(config, self.ranks.count)}\n{memory_text(config, self.policy, micro)}")
        if self.shards is not None:
            self.terminal.say(
                f"FSDP2: weights, gradients and moments in shards over {self.ranks.count} ranks, each with its part of "
                "the memory above; whole weights stand on every rank while it samples. The longest batch is not tried."
            )
            return None
        if self.zero is not None:
            self.terminal.say(
                f"DeepSpeed: {self.zero.told} in parts over {self.ranks.count} ranks. The longest batch is not tried."
            )
            return None
        if not wanted(config.run.try_longest_batch, self.policy):
            return None
        trial = try_longest(
            self.policy,
            prompt_length=max(len(prompt.ids) for prompt in self.train_prompts),
            completion_length=config.rollout.max_completion_length,
            num_groups=self.plan.rows_per_rank // self.plan.num_generations,
            num_generations=self.plan.num_generations,
            micro_rows=micro,
            entropy_grad=bool(self.row.entropy_coef),
            moments=not self.optimizer.state,
        )
        self.terminal.say(str(trial))
        if trial.rows < trial.asked:
            self.terminal.warn(
                f"{trial.asked} of the longest completions do not fit into memory together, {trial.rows} do: passes "
                f"are kept to as many tokens as those have, {self.policy.most_tokens:,}, with the same gradient."
            )
        return trial

    def _predict_time(self, before: Evaluation) -> None:
        """The range of time that the run may take, from the trial and the speed of the first evaluation."""
        seconds = self.clock.seconds["eval"]
        self.terminal.pace.spend("eval", seconds)
        if self.trial is None:
            return
        tokens = before.num_prompts * (1 + self.config.eval.eval_num_samples) * before.mean_length
        rate, passes, rows = tokens / seconds, self.config.algorithm.num_iterations, self.plan.rows_per_rank
        of_steps = expected_seconds(self.trial, self.config.train.max_steps, passes, rows, rate, before.mean_length)
        self.terminal.predict(*of_steps)

    def _recall(self, before: Evaluation | None) -> None:
        """The terminal hears of what an earlier process did of this run."""
        if self.ranks.is_main:
            self.terminal.recall(read_metrics(self.folder.metrics), before, sum(self.clock.seconds.values()))

    def _plan_of_run(self) -> Plan:
        config = self.config
        return Plan(
            name=self.folder.path.name,
            algorithm=self.row.name,
            max_steps=config.train.max_steps,
            groups=self.plan.prompts,
            rows=self.plan.rows_per_rank,
            passes=config.algorithm.num_iterations,
            logging_steps=config.run.logging_steps,
            samples=config.run.num_completions_to_print,
            every=(("eval", config.eval.eval_steps), ("save", config.run.save_steps)),
            at_end=(*(("eval",) if self.eval_prompts else ()), *(("save",) if config.run.save_at_end else ())),
        )

    def _make_updater(self) -> Updater:
        config, train = self.config, self.config.train
        self.policy = Policy(
            self.model,
            params=self.params,
            pad_id=int(self.tokenizer.pad_token_id),
            with_reference=self.row.beta > 0,
            autocast=self.accelerator.autocast,
            packing=train.packing,
            critic=self._make_critic(),
        )
        if self.shards is not None:
            self.policy.shard(self.shards)
        critic = [] if self.policy.critic is None else self.policy.critic.trainable()
        optimizer = make_optimizer(train, self.policy.trainable(), critic, self._critic_rate())
        self.scheduler = make_scheduler(config, optimizer, train.max_steps - self.critic_only_steps)
        self.zero = make_zero(self.accelerator, self.policy, optimizer, train.max_grad_norm)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer) if self.zero is None else self.zero
        return Updater(
            self.policy,
            self.algorithm,
            self.optimizer,
            self.scheduler,
            self.accelerator,
            micro_rows=self.plan.micro_rows,
            num_iterations=config.algorithm.num_iterations,
            num_minibatches=config.algorithm.steps_per_generation,
            max_grad_norm=train.max_grad_norm,
        )


def sampling_params(config: Config) -> SamplingParams:
    """The distribution that is sampled and trained."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_completion_length=rollout.max_completion_length,
        stop=tuple(rollout.stop),
    )


def make_scorer(config: Config, reward_funcs: Any, rows: Sequence[Mapping[str, Any]]) -> Scorer:
    """The reward functions given, else those of the config or the task; each finds its columns in `rows` and can grade
    every one of them."""
    settings = config.reward
    if reward_funcs is None:
        funcs = task_rewards(config)
    elif config.rollout.environment is not None:
        raise ConfigError("reward_funcs are given and rollout.environment names what gives the rewards; give one.")
    else:
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    scorer = Scorer(
        funcs,
        settings.reward_weights,
        workers=settings.reward_workers,
        deadline=settings.reward_timeout,
        in_process=settings.reward_in_process,
        # A turn of few episodes may fail in all of them; episodes are counted over the batch.
        max_unscorable=settings.max_unscorable if config.rollout.environment is None else 1.0,
        strict=settings.strict,
    )
    scorer.check_columns(sorted(rows[0]))
    scorer.check_rows(rows)
    decides, known = config.eval.pass_reward, [function.name for function in scorer.functions]
    if decides is not None and decides.split("/")[0] not in known:  # after the slash stands a part of its answer
        raise ConfigError(f"eval.pass_reward cannot be {decides!r}; {choices(decides, known)}")
    return scorer


def make_collector(config: Config, model: Any, tokenizer: Any, scorer: Scorer, *, gamma: float = 1.0) -> Collector:
    """Sampler and scorer as one, outside a run."""
    sampler = make_sampler(config, model, tokenizer)
    return collector_of(config, sampler, model, tokenizer, scorer, device=model.device, gamma=gamma)


def collector_of(
    config: Config, sampler: Sampler, model: Any, tokenizer: Any, scorer: Scorer, *, device: torch.device, gamma: float
) -> Collector:
    """Sampler and scorer as one: single completions, or episodes where the config names an environment."""
    params, seed, rollout = sampling_params(config), config.run.seed, config.rollout
    if rollout.environment is None:
        twins = make_twins(config, scorer.functions)
        return Collector(sampler, scorer, tokenizer, params, seed=seed, gamma=gamma, twins=twins)
    return EpisodeCollector(
        sampler,
        scorer,
        tokenizer,
        params,
        seed=seed,
        gamma=gamma,
        writer=TurnWriter(tokenizer, end_token_ids(model, tokenizer), config.data.chat_template_kwargs),
        limits=Limits(rollout.max_turns, rollout.max_completion_length, rollout.max_turn_length),
        max_unscorable=config.reward.max_unscorable,
        device=device,
    )


def evaluate_held_out(collector: Collector, prompts: Sequence[Prompt], settings: EvalConfig) -> Evaluation:
    """Greedy and sampled pass rates and mean rewards on these prompts, with intervals."""

    def answers(some: Sequence[Prompt], num_samples: int, greedy: bool) -> list[tuple[str, list[int]]]:
        each = max(settings.eval_batch_size // num_samples, 1)
        pieces = [(at, some[at : at + each]) for at in range(0, len(some), each)]
        return [answer for at, piece in pieces for answer in collector.answer(piece, num_samples, greedy, at)]

    def verdicts(some: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int]]) -> Judged:
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
