"""The loop: prompts -> sampler -> rewards -> algorithm -> policy.update -> metrics."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .algorithms.algorithm import Batch
from .collect.collector import Experience
from .config import ConfigError, flat
from .estimators.kl import k3
from .estimators.masked import masked_mean
from .metrics import Clock, MetricsFile, peak_memory_mb, update_metrics
from .prompts import fingerprint
from .rollouts import TextRollouts
from .run import checkpoint
from .run.auditing import audit_run
from .run.beginning import check_same_start
from .run.best import load_weights
from .run.crash import Keeper
from .run.ending import Ending
from .run.folder import full_disks_named
from .run.guard import NON_FINITE_LIMIT, NON_FINITE_LIMIT_SCALED, FiniteCheck, Interrupted, Signals, name_of
from .run.launch import whole_models
from .run.lock import FolderLock
from .run.onlookers import Onlookers, follow
from .run.profiling import Profiler
from .run.ranks import merge_metrics
from .run.rehearsal import rehearse_end
from .run.resume import Saver
from .run.throughput import Work, matmul_rate, tokens_to_train
from .run.trackers import Trackers
from .run.warm_start import warm_start
from .sampling.random import stream_key, uniform
from .training.critic import with_values
from .training.update import UpdateStats


class PolicyGradientTrainer(Ending):
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

    def train(
        self,
        resume: bool | str | Path | None = False,
        *,
        override: bool = False,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> dict[str, Any]:
        """Run to `max_steps`; returns the summary that is also written to `summary.json`.

        Args:
            resume: True = go on from the newest whole checkpoint of the run's folder; a path = from that one.
            override: go on although the checkpoint belongs to other settings.
            resume_from_checkpoint: TRL's name for `resume`.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
            RunStopped, RewardError, EngineError: the run cannot go on. Whatever a step raises, its batch and the state
                before it are kept first (`crash/`).
        """
        config, resume = self.config, resume or resume_from_checkpoint or False
        with full_disks_named(self.folder.path), contextlib.ExitStack() as self.open:
            self.ranks.together(lambda: self._take_folder(bool(resume)))
            self.ranks.together(self._rehearse_end)
            check_same_start(self.model, self.train_prompts, self.ranks)
            self.scorer.write_output_to(self.folder.path / "rewards.log")
            with self.scorer, self.collector, contextlib.ExitStack() as self.ahead_open:
                self.evaluated = None
                self.step = start = self._begin(resume, override)
                before = self.folder.read_evaluation() if start else None
                if start:
                    self._recall(before)
                else:
                    self.ranks.together(self._audit_rewards)
                with self.terminal.running():
                    if self.eval_prompts and config.eval.eval_on_start and not start:
                        before = self._evaluate_together("Before")
                        if self.ranks.is_main:
                            self.folder.write_evaluation(before)
                        self._predict_time(before)
                    with Signals() as self.signals:
                        self._steps(start)
                        after = self._leave()
            summary = self._finish(before, after)
        self.callbacks.fire("on_train_end")
        return summary

    def _take_folder(self, resume: bool) -> None:
        """The run's folder, for this process alone until the run ends."""
        if self.ranks.is_main:
            self.folder.check(self.config, resume=resume)
            self.open.enter_context(FolderLock(self.folder.path))

    def _audit_rewards(self) -> None:
        if self.ranks.is_main:
            audit_run(self.config, self.scorer, self.train_prompts, self.terminal.warn)

    def _rehearse_end(self) -> None:
        if self.ranks.is_main:
            merges = self.config.run.merge_adapter
            rehearse_end(self.model, self.tokenizer, self.folder.path, merges=merges, prompts=self._compared())

    def _steps(self, start: int) -> None:
        last, self.saving = self.config.train.max_steps, Clock(self.terminal.phase)
        self.received: int | None = None
        if self.onlookers is not None:
            self.onlookers.begin()
        for self.step in range(start + 1, last + 1):
            self.keeper.begin(self.step)
            try:
                with self.profiler.step():
                    self._one_step()
            except Exception as error:
                self.keeper.keep(error)
                raise
            if self.received is not None and self.step < last:
                self._interrupt(self.received)
            if self.callbacks.stops:
                break
        self.profiler.finish()
        self.clock.add(self.saving)

    def _interrupt(self, number: int) -> None:
        """End in order after the step that a signal came in."""
        saved = self.save_checkpoint()
        where = "its state is saved, --resume goes on from it" if saved else "its state could not be saved"
        text = f"{name_of(number)}: ended after step {self.step} of {self.config.train.max_steps}; {where}."
        self.trackers.finish()
        self.accelerator.end_training()
        self.terminal.warn(text)
        raise Interrupted(number, text)

    def _begin(self, resume: bool | str | Path, override: bool) -> int:
        """Warm start or resume; returns the number of steps already done."""
        found = self._find(resume) if resume else None
        settings = self.clean.tree(self.config.model_dump(mode="json"))
        if found is None:
            if self.ranks.is_main:
                self.folder.begin(settings)
            if self.config.warm_start.warm_start_steps:
                self._warm_start()
                if self.ranks.is_main:
                    self._save_start()
        elif self.row.beta and self.folder.start.exists():
            self._load_start()
        self.updater = self._make_updater()
        facts: dict[str, Any] = {
            "data": fingerprint(self.train_prompts),
            "reward_funcs": [function.name for function in self.scorer.functions],
            "reward_weights": self.scorer.weights,
            "prompts_per_step": self.plan.prompts,
        }
        # A minibatch holds the same share of every rank; transformers' generate draws for a rank's whole batch.
        if self.config.algorithm.steps_per_generation > 1 or self.config.rollout.engine == "transformers":
            facts["ranks"] = self.ranks.count
        parts = (self.updater, self.clean, facts, self.ranks, self.stream, self.clock)
        self.saver = Saver(self.folder.checkpoints, self.config, *parts)
        self.profiler = Profiler(self.folder.path / "profile", self.config.run.profile_steps * self.ranks.is_main)
        dtype = torch.bfloat16 if self.config.train.bf16 else self.model.dtype
        self.work = Work(self.model, matmul_rate(self.accelerator.device, dtype))
        self.finite = FiniteCheck(NON_FINITE_LIMIT if self.accelerator.scaler is None else NON_FINITE_LIMIT_SCALED)
        self.keeper = Keeper(
            self.folder.crash, self.saver, self.optimizer.optimizer, self.ranks, self.clean, self.terminal.warn
        )
        done = self._restore(found, override) if found else 0
        if found and self.ranks.is_main:
            self.folder.write_config(settings)  # a run may go on to more steps
        self.best = self._make_best()
        if self.best is not None and found:
            self.ranks.together(self.best.mend)
            self.best.recall(done)
        if self.config.rollout.max_staleness:
            with self.policy.gathered():
                self.ahead = self.ranks.together(self._make_ahead)
        if self.config.run.save_steps and self.ranks.is_main:
            self.saver.check_room()
        self.trackers = Trackers(self.accelerator, list(self.config.run.report_to), self.terminal.warn, self.clean)
        self.trackers.start(self.config.run.project, settings)
        if self.ranks.is_main:
            self.metrics = MetricsFile(self.folder.metrics, resume_step=done if found else None)
        self.trial = self.ranks.together(self._try_longest)
        follow(self.terminal, self._plan_of_run(), self.updater, self.collector.sampler)
        self.clock.watch = self.terminal.phase
        seen = (self.terminal, self.trackers, self.folder, self.config, settings)
        self.onlookers = Onlookers(*seen) if self.ranks.is_main else None
        self.callbacks.best = self.best
        self._tell_callbacks(done)
        self.accelerator.wait_for_everyone()
        return done

    def _find(self, resume: bool | str | Path) -> Path | None:
        """The checkpoint to go on from. One that was named is taken or refused, never replaced by another."""
        if not isinstance(resume, bool):
            why = checkpoint.problem(Path(resume))
            if why is not None:
                raise ConfigError(
                    f"Checkpoint {resume} cannot be used: {why}. Without a path, --resume takes the newest whole one."
                )
            return Path(resume)
        found, warnings = checkpoint.newest(self.folder.checkpoints)
        for warning in warnings:
            self.terminal.warn(warning)
        if found is None:
            self.terminal.warn(f"No whole checkpoint in {self.folder.checkpoints}: starting from the beginning.")
        return found

    def _restore(self, found: Path, override: bool) -> int:
        done, overridden = self.saver.restore(found, override=override)
        if self.saver.extension:
            self.terminal.say(self.saver.extension)
        self.accelerator.wait_for_everyone()  # another rank may still be reading
        if self.ranks.is_main:
            for place in checkpoint.set_aside(self.folder.checkpoints, done):
                self.terminal.warn(f"A checkpoint of a step that is done again is kept as {place}.")
        for line in overridden:
            self.terminal.warn(f"Overridden: {line}.")
        self.terminal.say(f"Going on from {found}: {done} steps are done.")
        return done

    def _warm_start(self) -> None:
        settings = self.config.warm_start
        self.terminal.say(f"Warm start: {settings.warm_start_steps} supervised steps (trl SFTTrainer) ...")
        with self.clock("warm_start"), whole_models():  # the weights are cut after it
            loss = warm_start(self.model, self.tokenizer, self.config, {p.text for p in self.eval_prompts})
        self.terminal.say(f"Warm start done: loss {loss:.3f} nats per token, {self.clock.seconds['warm_start']:.1f} s.")

    def _save_start(self) -> None:
        """The weights after the warm start (of an adapter, the adapter), the reference of a resumed run."""
        if self.row.beta:
            self.model.save_pretrained(self.folder.start, max_shard_size="1000GB")

    def _load_start(self) -> None:
        load_weights(self.model, self.folder.start)

    def _one_step(self) -> None:
        """One batch, from its prompts to its line of metrics and its checkpoint."""
        clock, config = self.saving, self.config
        self.callbacks.step_begin()
        self.saving = Clock(self.terminal.phase)
        begin = time.perf_counter()
        torch.manual_seed(int(stream_key(config.run.seed, 4, self.step, torch.tensor(self.ranks.number))) % 2**63)
        experience = self._gather_experience(clock)
        self.keeper.experience = experience
        rollouts, old_logp_BT = self._look(experience.rollouts, clock)
        with clock("update"):
            rate = self.scheduler.get_last_lr()[0] if self.step > self.critic_only_steps else 0.0
            batch, updates = self._update(rollouts, old_logp_BT)
        values = {"step": self.step, "learning_rate": rate, **experience.metrics()}
        values.update(self._learn_of_prompts(experience))
        values.update(self._of_update(batch, updates))
        values.update(self._keep_near(updates))
        readable = self._readable(experience, batch)
        self.callbacks.step_end(self.step)
        self._agree()
        evaluation: dict[str, float] = {}
        if self._evaluates():
            evaluation = self._evaluate_together(f"Step {self.step}", clock).metrics()
            values.update(evaluation)
        values["seconds"] = time.perf_counter() - begin
        self._write(values, experience, readable, clock)
        self.finite.observe([u.stepped for u in updates], self.step)
        self._end_step(evaluation)

    def _look(self, rollouts: TextRollouts, clock: Clock) -> tuple[TextRollouts, Tensor | None]:
        """The passes before the update, each only where the row needs it: reference, entropies, values.

        With them the log-probabilities of before the update, where the critic's pass gave them.
        """
        if self.row.beta:
            with clock("reference"):
                rollouts.ref_logp_BT = self.policy.ref_logp(rollouts, self.plan.micro_rows)
        if self.row.top_entropy_quantile < 1:
            with clock("update"):
                rollouts.entropy_BT = self.policy.entropies(rollouts, self.plan.micro_rows)
        if not self.row.needs_critic:
            return rollouts, None
        with clock("value"):
            after, reuses = self.row.truncated == "bootstrap", self.updater.reuses
            seen = self.policy.observe(rollouts, self.plan.micro_rows, with_logp=reuses, after=after)
            assert seen.value_BT is not None
            valued = with_values(rollouts, seen.value_BT, seen.after_B, gamma=self.row.gamma)
            return valued, seen.logp_BT if reuses else None

    def _update(self, rollouts: TextRollouts, old_logp_BT: Tensor | None) -> tuple[Batch, list[UpdateStats]]:
        config = self.config
        progress = (self.step - 1) / config.train.max_steps
        batch = self.algorithm.weigh(rollouts, progress=progress, all_sum=self.ranks.all_sum)
        if old_logp_BT is not None:
            batch.old_logp_BT = old_logp_BT
        self.keeper.batch = batch
        measure = bool(config.run.noise_steps) and self.step % config.run.noise_steps == 0
        order, critic_only = self._orders(len(rollouts.logp_BT)), self.step <= self.critic_only_steps
        return batch, self.updater.update(batch, order, measure_noise=measure, critic_only=critic_only)

    def _of_update(self, batch: Batch, updates: list[UpdateStats]) -> dict[str, Any]:
        rollouts = batch.rollouts
        values = {"entropy_coef": batch.entropy_coef}
        values.update(update_metrics(updates, self.config.algorithm.steps_per_generation))
        if self.row.needs_critic:
            foretold = self.algorithm.foretold(rollouts, batch.mask_BT, self.ranks.all_sum)
            values.update({} if foretold is None else {"explained_variance": foretold})
        if rollouts.ref_logp_BT is not None:
            values["kl"] = float(masked_mean(k3(rollouts.logp_BT, rollouts.ref_logp_BT), rollouts.mask_BT))
        return values

    def _readable(self, experience: Experience, batch: Batch) -> list[dict[str, Any]]:
        """The first groups as a person can read them, also written to the run's folder."""
        count = self.config.run.log_completions
        if not count or not self.ranks.is_main:
            return []
        numbers = self.updater.seen.numbers(experience.rollouts.logp_BT)
        readable = experience.readable(batch.weight_BT, count, numbers)
        try:
            self.folder.write_completions(self.step, readable)
        except OSError as error:  # a run is worth more than its completions
            self.terminal.warn(f"The completions of step {self.step} are not written: {error}.")
        return readable

    def _keep_near(self, updates: list[UpdateStats]) -> dict[str, float]:
        """What follows an update: the adaptive penalty sees the KL that its last pass met, the reference may move."""
        settings = self.config.algorithm
        if settings.sync_ref_model and self.step % settings.ref_model_sync_steps == 0:
            self.policy.refresh_reference(settings.ref_model_mixup_alpha)
        if self.algorithm.kl_penalty is None:
            return {}
        last = updates[-settings.steps_per_generation :]
        kl = torch.tensor(sum(u.values.get("approx_kl", 0.0) for u in last), device=self.accelerator.device)
        self.algorithm.observe_kl(float(self.ranks.all_sum(kl)))
        return {"kl_penalty": self.algorithm.kl_penalty.weight}

    def _write(
        self, values: dict[str, Any], experience: Experience, readable: list[dict[str, Any]], clock: Clock
    ) -> None:
        """The step's line, from all ranks; before its checkpoint, which must not outlive it."""
        values["tokens_per_second"] = values["tokens"] / max(clock.seconds["sample"], 1e-9)
        assert self.keeper.batch is not None
        rows = self.algorithm.contributes_B(self.keeper.batch).nonzero().squeeze(1)
        rollouts = experience.rollouts.rows(rows)  # the others were dropped before any pass
        trained = tokens_to_train(rollouts.prompt_ids_B, int(rollouts.context_length_B.sum()))
        values["train_tokens_per_second"] = trained / max(clock.seconds["update"], 1e-9)
        passes = self.config.algorithm.num_iterations
        values["mfu"] = self.work.utilisation(passes * trained, clock.seconds["update"])
        values["memory"] = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mb()
        values.update({f"seconds/{phase}": s for phase, s in clock.seconds.items()})
        self.clock.add(clock)
        told = self.ranks.gather((values, experience.scores.problems, self.signals.received))
        rows_of = [self.plan.num_generations * len(self.plan.share(rank, len(told))) for rank in range(len(told))]
        values = merge_metrics([each[0] for each in told], rows_of)
        self.callbacks.log(values)
        if self.onlookers is not None:
            self.metrics.write(values)
            self.onlookers.step(values, readable)
        for rank, (_, problems, _) in enumerate(told):
            for function, causes in problems.items():
                self.terminal.warn(f"Reward function {function}{f' (rank {rank})' if rank else ''}: {causes}")
        self.received = next((number for _, _, number in told if number is not None), None)

    def _orders(self, num_rows: int) -> Tensor:
        """The order of the rows in each pass over the batch, a function of (seed, step, pass)."""
        keys = stream_key(self.config.run.seed, 3, self.step, torch.arange(self.config.algorithm.num_iterations))
        noise = uniform(keys.unsqueeze(1), torch.arange(num_rows).unsqueeze(0))
        return noise.argsort(1).to(self.accelerator.device)


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

    algorithms = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce_plus_plus_baseline")
    default_config = flat.GRPOConfig


class ActorCriticTrainer(PolicyGradientTrainer):
    """A2C and PPO: a learned critic, GAE over tokens; see the config's `critic` section."""

    algorithms = ("a2c", "ppo")
    default_config = flat.ActorCriticConfig
