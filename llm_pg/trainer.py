"""The loop: prompts -> sampler -> rewards -> algorithm -> policy.update -> metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from . import checkpoint
from .algorithms.algorithm import Algorithm
from .collect import Collector, Experience
from .config import Config, ConfigError, flat
from .config.check import plan_batch, resolve_row
from .estimators.kl import k3
from .estimators.masked import masked_mean
from .evaluate import Evaluation, evaluate
from .metrics import Clock, MetricsFile
from .models import end_token_ids, load_model, load_tokenizer, prepare_model, prepare_tokenizer
from .policy import Policy, Updater, UpdateStats
from .preflight import task_rewards
from .prompts import PromptStream, fingerprint, load_prompts
from .resume import Saver
from .rewards.scorer import Scorer
from .run_folder import RunFolder
from .sampling.generate import GenerateSampler
from .sampling.native import NativeSampler
from .sampling.protocol import Sampler, SamplingParams
from .sampling.random import stream_key, uniform
from .terminal import Terminal
from .warm_start import warm_start

ENGINES: dict[str, Callable[..., Sampler]] = {"native": NativeSampler, "transformers": GenerateSampler}


class PolicyGradientTrainer:
    """Fine-tunes a causal LM by policy gradient. The algorithm is the row that the config names.

    Args:
        model: hub id, local folder, or a transformers model; None = what the config's `model` section says.
        reward_funcs: one or several: functions in TRL's form or the plain form, names of shipped ones,
            `module:function` or `file.py:function`; None = those of the config, or the task's own.
        args: `GRPOConfig(...)`, `RLOOConfig(...)`, `ReinforceConfig(...)` or a `Config`.
        train_dataset, eval_dataset: `datasets` objects or lists of rows with a `prompt` column; None = the config's.
        processing_class: the tokenizer; None = the model's own.
        peft_config: a peft config; the reference is then the model with the adapter off.
        terminal: where progress is printed. clock: phases that ended before (imports).

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
        terminal: Terminal | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.began = time.perf_counter()
        self.config = config = (args or self.default_config()).model_copy(deep=True)
        self._check_algorithm()
        self.terminal, self.clock = terminal or Terminal(), clock or Clock()
        self.row = resolve_row(config)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.train.bf16 else "fp16" if config.train.fp16 else "no",
            cpu=config.train.use_cpu,
            log_with=list(config.run.report_to) or None,
            project_dir=config.run.output_dir,
        )
        self.plan = plan_batch(config, self.accelerator.num_processes)
        self.folder = RunFolder(config)
        with self.clock("load"):
            self._load(model, processing_class, peft_config, train_dataset, eval_dataset)
        self.scorer = self._make_scorer(reward_funcs)
        self.params = SamplingParams(
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            min_p=config.rollout.min_p,
            max_completion_length=config.rollout.max_completion_length,
            stop=tuple(config.rollout.stop),
        )
        self.algorithm = Algorithm(self.row, config.rollout.max_completion_length)
        self.collector = self._make_collector()
        self.step = 0

    # --- making the parts

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
            self.model = load_model(config.model, self.tokenizer, seed=config.run.seed)
        else:
            self.model = prepare_model(model, self.tokenizer, config.model)
        if peft_config is not None:
            from peft import get_peft_model

            self.model = get_peft_model(self.model, peft_config)
        context = getattr(self.model.config, "max_position_embeddings", None)
        self.train_prompts, self.eval_prompts = load_prompts(
            config, self.tokenizer, train_dataset=train, eval_dataset=held_out, context_length=context
        )
        self.stream = PromptStream(
            self.train_prompts, self.plan.prompts, seed=config.run.seed, shuffle=config.data.shuffle_dataset
        )
        self.model.to(self.accelerator.device)
        if config.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
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

    def _make_scorer(self, reward_funcs: Any) -> Scorer:
        settings = self.config.reward
        if reward_funcs is None:
            funcs = task_rewards(self.config)
        else:
            funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        scorer = Scorer(
            funcs,
            settings.reward_weights,
            workers=settings.reward_workers,
            deadline=settings.reward_timeout,
            in_process=settings.reward_in_process,
            max_unscorable=settings.max_unscorable,
            strict=settings.strict,
        )
        scorer.check_columns(sorted(self.train_prompts[0].row))
        return scorer

    def _make_collector(self) -> Collector:
        rollout = self.config.rollout
        if rollout.engine not in ENGINES:
            raise ConfigError(f"rollout.engine {rollout.engine!r} is not available here; use {' or '.join(ENGINES)}.")
        sampler: Sampler = ENGINES[rollout.engine](
            self.model, self.tokenizer, end_token_ids(self.model, self.tokenizer), rollout.rollout_batch_size
        )
        return Collector(
            sampler, self.scorer, self.tokenizer, self.params, seed=self.config.run.seed, gamma=self.row.gamma
        )

    def _make_updater(self) -> Updater:
        config, train = self.config, self.config.train
        self.policy = Policy(
            self.model,
            params=self.params,
            pad_id=int(self.tokenizer.pad_token_id),
            with_reference=self.row.beta > 0,
            autocast=self.accelerator.autocast,
        )
        optimizer = torch.optim.AdamW(
            self.policy.trainable(),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.scheduler = transformers.get_scheduler(
            train.lr_scheduler_type, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=train.max_steps
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
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

    # --- the run

    def train(self, resume: bool = False) -> dict[str, Any]:
        """Run to `max_steps`; returns the summary that is also written to `summary.json`."""
        config = self.config
        self.folder.check(config, resume=resume)
        self.scorer.write_output_to(self.folder.path / "rewards.log")
        with self.scorer:
            start = self._begin(resume)
            before = self.folder.read_evaluation() if start else None
            if config.eval.eval_on_start and not start:
                before = self.evaluate("Before")
                self.folder.write_evaluation(before)
            for self.step in range(start + 1, config.train.max_steps + 1):
                self._one_step()
            after = self.evaluate("After")
        with self.clock("save"):
            self.save_model(self.folder.model)
        return self._finish(before, after)

    def _begin(self, resume: bool) -> int:
        """Warm start or resume; returns the number of steps already done."""
        found = None
        if resume:
            found, warnings = checkpoint.newest(self.folder.checkpoints)
            for warning in warnings:
                self.terminal.warn(warning)
            if found is None:
                self.terminal.warn(f"No whole checkpoint in {self.folder.checkpoints}: starting from the beginning.")
        if found is None:
            self.folder.begin(self.config)
            if self.config.warm_start.warm_start_steps:
                self._warm_start()
                self.model.save_pretrained(self.folder.start)
        elif self.folder.start.exists():
            self._load_start()
        self.updater = self._make_updater()
        self.saver = Saver(self.folder.checkpoints, self.config, self.updater, fingerprint(self.train_prompts))
        self.accelerator.init_trackers("llm_pg", config=self.config.model_dump(mode="json"))
        done = self.saver.restore(found) if found else 0
        if found:
            self.terminal.say(f"Going on from {found}: {done} steps are done.")
        self.metrics = MetricsFile(self.folder.metrics, resume_step=done if found else None)
        return done

    def _warm_start(self) -> None:
        settings = self.config.warm_start
        self.terminal.say(f"Warm start: {settings.warm_start_steps} supervised steps (trl SFTTrainer) ...")
        with self.clock("warm_start"):
            loss = warm_start(self.model, self.tokenizer, self.config, {p.text for p in self.eval_prompts})
        self.terminal.say(f"Warm start done: loss {loss:.3f} nats per token, {self.clock.seconds['warm_start']:.1f} s.")

    def _load_start(self) -> None:
        from safetensors.torch import load_model as load_weights

        load_weights(self.model, self.folder.start / "model.safetensors")

    def _one_step(self) -> None:
        clock, config = Clock(), self.config
        begin = time.perf_counter()
        each = self.plan.prompts // self.accelerator.num_processes  # whole groups, in order
        first = each * self.accelerator.process_index
        prompts = self.stream.take(self.step - 1)[first : first + each]
        experience = self.collector.collect(prompts, self.step, self.plan.num_generations, clock, first)
        rollouts = experience.rollouts
        if self.row.beta:
            with clock("reference"):
                rollouts.ref_logp_BT = self.policy.ref_logp(rollouts, self.plan.micro_rows)
        with clock("update"):
            batch = self.algorithm.weigh(
                rollouts, progress=(self.step - 1) / config.train.max_steps, all_sum=self._all_sum
            )
            rate = self.scheduler.get_last_lr()[0]
            updates = self.updater.update(batch, self._orders(len(prompts) * self.plan.num_generations))
        values = {"step": self.step, **experience.metrics(), **self._update_metrics(updates, rate)}
        values["entropy_coef"] = batch.entropy_coef
        if rollouts.ref_logp_BT is not None:
            values["kl"] = float(masked_mean(k3(rollouts.logp_BT, rollouts.ref_logp_BT), rollouts.mask_BT))
        if config.run.log_completions:
            readable = experience.readable(batch.weight_BT, config.run.log_completions)
            self.folder.write_completions(self.step, readable)
        if config.eval.eval_steps and self.step % config.eval.eval_steps == 0 and self.step < config.train.max_steps:
            values.update(self.evaluate(f"Step {self.step}", clock).metrics())
        if config.run.save_steps and self.step % config.run.save_steps == 0:
            with clock("save"):
                self.save_checkpoint()
        self._write(values, experience, clock, time.perf_counter() - begin)

    def _update_metrics(self, updates: list[UpdateStats], rate: float) -> dict[str, Any]:
        out: dict[str, Any] = {"learning_rate": rate, "skipped_updates": sum(not u.stepped for u in updates)}
        for name in updates[0].values:
            out[name] = sum(u.values.get(name, 0.0) for u in updates) / len(updates)
        if len(updates) > 1:
            per_pass = self.config.algorithm.steps_per_generation
            out.update(
                {
                    k: v * per_pass
                    for k, v in out.items()
                    if k in ("entropy", "clip_fraction", "approx_kl", "sampler_gap")
                }
            )
        out["grad_norm"] = sum(u.grad_norm for u in updates) / len(updates)
        return out

    def _write(self, values: dict[str, Any], experience: Experience, clock: Clock, seconds: float) -> None:
        values["tokens_per_second"] = values["tokens"] / max(clock.seconds["sample"], 1e-9)
        values["memory"] = peak_memory_mb()
        values["seconds"] = seconds
        values.update({f"seconds/{phase}": s for phase, s in clock.seconds.items()})
        self.clock.add(clock)
        self.metrics.write(values)
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=self.step)
        if self.step % self.config.run.logging_steps == 0 or self.step == self.config.train.max_steps:
            self.terminal.step(values, self.config.train.max_steps)
        for function, causes in experience.scores.problems.items():
            self.terminal.warn(f"Reward function {function}: {causes}")

    def _all_sum(self, x: Tensor) -> Tensor:
        return x if self.accelerator.num_processes == 1 else self.accelerator.reduce(x, reduction="sum")

    def _orders(self, num_rows: int) -> Tensor:
        """The order of the rows in each pass over the batch, a function of (seed, step, pass)."""
        keys = stream_key(self.config.run.seed, 3, self.step, torch.arange(self.config.algorithm.num_iterations))
        noise = uniform(keys.unsqueeze(1), torch.arange(num_rows).unsqueeze(0))
        return noise.argsort(1).to(self.accelerator.device)

    # --- evaluation, saving, ending

    def evaluate(self, title: str = "Evaluation", clock: Clock | None = None) -> Evaluation:
        """Greedy and sampled pass rates on the held-out prompts, with intervals."""
        settings = self.config.eval
        if not self.eval_prompts:
            raise ConfigError("There are no held-out prompts to evaluate on: set data.num_eval_prompts above 0.")

        def verdicts(prompts: Sequence[Any], texts: Sequence[str], ids: Sequence[list[int]]) -> list[float | None]:
            parts = self.collector.score(prompts, texts, ids).parts
            return parts[settings.pass_reward or next(iter(parts))]

        with (clock or self.clock)("eval"):
            result = evaluate(
                self.eval_prompts,
                self.collector.answer,
                verdicts,
                num_samples=settings.eval_num_samples,
                threshold=settings.pass_threshold,
            )
        self.terminal.evaluation(title, result)
        return result

    def save_model(self, path: str | Path) -> None:
        """Weights and tokenizer as `AutoModelForCausalLM.from_pretrained` reads them (a PEFT model: its adapter)."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

    def save_checkpoint(self) -> None:
        """Write `checkpoints/step-<n>`; a failure is printed and older checkpoints stay."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.saver.save(self.step)
        except checkpoint.CheckpointError as error:
            self.terminal.warn(str(error))

    def _finish(self, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
        seconds = self.clock.seconds
        summary = {
            "algorithm": self.row.name,
            "task": self.config.data.task or self.config.data.dataset_name or "dataset",
            "seed": self.config.run.seed,
            "pass_rate_before": before.greedy.mean if before else None,
            "pass_rate_before_interval": before.greedy.as_json() if before else None,
            "pass_rate_after": after.greedy.mean,
            "pass_rate_after_interval": after.greedy.as_json(),
            "sampled_before": before.sampled.mean if before and before.sampled else None,
            "sampled_after": after.sampled.mean if after.sampled else None,
            "pass_at": {str(k): share.as_json() for k, share in after.pass_at.items()},
            "num_eval_prompts": after.num_prompts,
            "steps": self.step,
            "seconds_total": round(sum(seconds.values()), 3),
            "seconds_by_phase": {phase: round(s, 3) for phase, s in seconds.items()},
            "model": str(self.folder.model),
            "versions": self.saver.identity()["versions"],
        }
        if self.accelerator.is_main_process:
            self.folder.write_summary(summary)
            places = [f"Model:   {self.folder.model}", f"Metrics: {self.folder.metrics}"]
            self.terminal.summary(summary, before, after, places)
        self.accelerator.end_training()
        return summary


def peak_memory_mb() -> float:
    """Peak memory in MB: the accelerator's where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class ReinforceTrainer(PolicyGradientTrainer):
    """REINFORCE with reward-to-go; baseline none or running_mean. KL in the reward (k1), where beta > 0."""

    algorithms = ("reinforce",)
    default_config = flat.ReinforceConfig


class RLOOTrainer(PolicyGradientTrainer):
    """RLOO: each completion against the mean of the others of its group; unbiased. KL in the reward (k1)."""

    algorithms = ("rloo",)
    default_config = flat.RLOOConfig


class GRPOTrainer(PolicyGradientTrainer):
    """GRPO and its relatives: group mean, group deviation, clipping; the reduction and KL of TRL 1.16."""

    algorithms = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
    default_config = flat.GRPOConfig
