"""The checkpoints of a run: what is saved to go on with, when, and the refusal to go on with something else."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from ... import __version__
from ...config import ConfigError
from ...config.flat import FlatConfig
from ...config.rollout import RolloutConfig
from ...distributed.tensors import core_of, put, shape_of
from ...learner.learner import Learner
from ...metrics import sync
from ...prompts import Prompts
from ..context import RunContext
from ..logs.callbacks import Callbacks
from . import checkpoint_files

# What JSON holds of batches that were sampled ahead, and their tensors.
InFlight = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]

# Sections that may differ when a run goes on: where it writes, how it is watched, how functions are bounded.
_FREE = ("run", "eval", "reward")
# Settings that change memory and speed and never the result.
_FREE_LEAVES = {
    "train": ("per_device_train_batch_size", "gradient_accumulation_steps", "packing", "use_cpu"),
    "rollout": tuple(leaf for leaf in RolloutConfig.model_fields if leaf.startswith("vllm_")),
}


class Stateful(Protocol):
    """What a checkpoint holds of an object, as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves and restores the moving parts of a run: trainable weights, the optimiser's moments, and the state of every
    registered object.

    Args:
        context: of the run. learner: whose policy and optimizer are saved.
        prompts: of the run; those that learn have a state.
        facts: what beside the config must be the same to go on: data fingerprint, reward functions, batch.
        callbacks: may ask for a checkpoint, and hear of it.

    Attributes:
        parts: name -> object with `state_dict` and `load_state_dict` (JSON); see `register`.
        saved: step of the checkpoint that was written or restored last.
        extension: what becomes of the schedules, where a run goes on to another number of steps.
        in_flight: set where completions are sampled ahead: step -> what all ranks hold of later batches.
        landed: the batches in flight of the checkpoint that was restored.
    """

    def __init__(
        self,
        context: RunContext,
        learner: Learner,
        prompts: Prompts,
        facts: dict[str, Any],
        callbacks: Callbacks,
    ) -> None:
        self.context, self.learner, self.prompts, self.facts = context, learner, prompts, facts
        self.callbacks, self.policy = callbacks, learner.policy
        self.root, self.config, self.ranks = context.folder.checkpoints, context.config, context.ranks
        self.strategy = learner.strategy
        self.parts: dict[str, Stateful] = {}
        scaler = context.strategy.scaler
        if scaler is not None:
            self.register("scaler", scaler)
        self.register("scheduler", ScheduleState(learner.scheduler, learner.optimizer))
        self.register("algorithm", learner.algorithm)
        self.register("prompts", prompts)
        self.register("seconds", context.clock)
        for name, callback in callbacks.stateful().items():
            self.register(name, callback)
        self.saved: int | None = None
        self.extension = ""
        self.in_flight: Callable[[int], InFlight] | None = None
        self.landed: InFlight = ([], {})

    def register(self, name: str, part: Stateful) -> None:
        """From now on checkpoints hold this object's state too, and a resume restores it.

        Raises ValueError where the name is taken.
        """
        if name in self.parts:
            raise ValueError(f"Checkpoints already hold something called {name!r}; give this one another name.")
        self.parts[name] = part

    @property
    def joint(self) -> bool:
        """Whether ranks save together: each brings its part of the weights, or what it has sampled ahead."""
        return self.strategy.sharded or (self.in_flight is not None and self.ranks.count > 1)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = {k: v for k, v in self.config.model_dump(mode="json").items() if k not in _FREE}
        for section, leaves in _FREE_LEAVES.items():
            settings[section] = {k: v for k, v in settings[section].items() if k not in leaves}
        settings["run"] = {"seed": self.config.run.seed}
        if self.prompts.learns:  # then verdicts decide what is trained on
            settings["eval"] = {k: getattr(self.config.eval, k) for k in ("pass_reward", "pass_threshold")}
        versions = {"llm_pg": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return self.context.redactor.tree({"config": settings, **self.facts, "versions": versions})

    def numbers(self) -> dict[str, Any]:
        """What of the state is small: that of every registered object."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """What changes in training, by name: the policy's own, a moving reference's and the critic's with prefixes."""
        policy = self.policy
        own: dict[str, torch.nn.Parameter] = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        if self.config.algorithm.sync_ref_model and policy.reference is not None:
            own.update({f"reference.{name}": p for name, p in policy.reference.named_parameters()})
        return own if policy.critic is None else {**own, **policy.critic.weights()}

    def _state(self, step: int, numbers: dict[str, Any] | None, alone: bool) -> checkpoint_files.RunState:
        held = self._weights()
        weights, optimizer = self.strategy.collect(held), self.strategy.moments(held)
        reported = self.numbers() if numbers is None else numbers
        if self.in_flight is None or (alone and self.ranks.count > 1):
            return checkpoint_files.RunState(step, weights, optimizer, reported)
        batches, tensors = self.in_flight(step)
        return checkpoint_files.RunState(step, weights, optimizer, {**reported, "in_flight": batches}, tensors)

    def save(self, step: int, numbers: dict[str, Any] | None = None, *, alone: bool = False) -> None:
        """Write the checkpoint of a step, once. CheckpointError where it cannot be written.

        alone: no other rank is asked for anything, so what several have sampled ahead is left out and sampled again.
        """
        if self.saved == step:
            return
        state = self._state(step, numbers, alone)
        frozen = None if alone else self._frozen()
        if self.joint and not alone:
            problem = self.ranks.gather(self.ranks.together(lambda: self._written(state, frozen)))[0]
        else:
            problem = self._written(state, frozen)
        if problem:
            raise checkpoint_files.CheckpointError(problem)
        self.saved = step

    def _written(self, state: checkpoint_files.RunState, frozen: dict[str, torch.Tensor] | None) -> str:
        """Writes the checkpoint on the first rank; returns why it could not be written, else an empty text."""
        if self.ranks.is_main:
            try:
                keep = self.config.run.save_total_limit
                folder = checkpoint_files.save(
                    self.root, state, self.identity(), keep, write_model=lambda at: self._write_model(at, state, frozen)
                )
                if isinstance(self.config, FlatConfig):
                    checkpoint_files.link_checkpoint(Path(self.config.run.output_dir), folder, state.step)
            except checkpoint_files.CheckpointError as error:
                return str(error)
        return ""

    def _frozen(self) -> dict[str, torch.Tensor] | None:
        """What the model has beside its trained weights, whole, where ranks hold parts of it; an adapter needs none."""
        model, held = self.policy.model, self._weights()  # the same names on every rank; the state is on the first
        return self.strategy.state_dict(
            model, [] if self.policy.has_adapter else [name for name in model.state_dict() if name not in held]
        )

    def _write_model(
        self, folder: Path, state: checkpoint_files.RunState, frozen: dict[str, torch.Tensor] | None
    ) -> None:
        """What `from_pretrained` reads; its weights are those of the state where that has all of them."""
        policy, model = self.policy, core_of(self.policy.model)
        own = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
        if policy.has_adapter or not own.keys() <= state.weights.keys():
            trained = {n: x for n, x in state.weights.items() if n in policy.model.state_dict()}
            policy.model.save_pretrained(folder, **({} if frozen is None else {"state_dict": {**frozen, **trained}}))
        else:
            facts = copy.deepcopy(model.config)
            facts.architectures, facts.dtype = [type(model).__name__], next(iter(state.weights.values())).dtype
            facts.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            try:
                os.link(folder / "weights.safetensors", folder / "model.safetensors")
            except OSError:  # a file system without hard links
                shutil.copy2(folder / "weights.safetensors", folder / "model.safetensors")
        if policy.tokenizer is not None:
            policy.tokenizer.save_pretrained(folder)
        self.callbacks.state.save_to_json(str(folder / "trainer_state.json"))

    def check_room(self) -> None:
        """CheckpointError when the disk has no room for one checkpoint: weights and two moments of each."""
        weights = sum(math.prod(shape_of(p)) * p.element_size() for p in self._weights().values())
        checkpoint_files.check_room(self.root, 3 * weights)

    def newest_step(self) -> int | None:
        return max(checkpoint_files.whole(self.root), default=None)

    def restore(self, folder: Path, *, override: bool = False) -> tuple[int, list[str]]:
        """Put a verified checkpoint back; its step, and the differences that were overridden.

        Raises ConfigError, with a table, when it belongs to other settings and `override` is false, or when its
        weights have other names or shapes.
        """
        state, identity = checkpoint_files.load(folder)
        changed = difference(identity, self.identity())
        length = [change for change in changed if change[0] == "train.max_steps"]
        if changed == length:
            changed = []
        if state.step > self.config.train.max_steps:
            raise ConfigError(
                f"Checkpoint {folder} is of step {state.step}, and max_steps is {self.config.train.max_steps}: nothing "
                "is left to do. Give a larger max_steps."
            )
        if changed and not override:
            raise ConfigError(
                f"Checkpoint {folder} belongs to a run with other settings:\n{table(changed)}\nGo back to those, go on "
                "with the present ones all the same (--override; the result is then that of neither), or start anew "
                "with run.overwrite=true or another run.run_name."
            )
        self._restore_weights(folder, state)
        self._restore_numbers(state.numbers)
        self.extension = self._new_length(length[0][1], state.numbers) if length else ""
        # What was sampled ahead under other settings is sampled again: other prompts, groups or distributions.
        as_before = all(name.startswith(("versions.", "rollout.max_staleness")) for name, _, _ in changed)
        self.landed = (state.numbers.get("in_flight", []), state.in_flight) if as_before else ([], {})
        self.saved = (
            state.step if folder.resolve() == checkpoint_files.folder_of(self.root, state.step).resolve() else None
        )
        return state.step, [": ".join((name, f"{old} then, {new} now")) for name, old, new in changed]

    def _new_length(self, then: str, numbers: dict[str, Any]) -> str:
        """What a run of another length does to what is spread over its steps."""
        train, algorithm = self.config.train, self.config.algorithm
        text = f"max_steps was {then} and is {train.max_steps} now."
        moving = []
        if not train.lr_scheduler_type.startswith("constant"):
            before, now = numbers["scheduler"]["_last_lr"][0], self.learner.scheduler.get_last_lr()[0]
            moving.append(
                f"The schedule {train.lr_scheduler_type} is spread over the new length: the learning rate goes on at "
                f"{now:.3g} where it was {before:.3g}"
            )
        if algorithm.entropy_coef_final is not None:
            moving.append("The entropy coefficient is spread over the new length too")
        if not moving:
            return f"{text} Nothing is spread over the steps, so this is the longer run, bit for bit."
        return f"{text} {'. '.join(moving)}; a run of that length from its first step would have been another."

    def _restore_weights(self, folder: Path, state: checkpoint_files.RunState) -> None:
        parameters = self._weights()
        odd = sorted(set(parameters) ^ set(state.weights)) or [
            n for n, p in parameters.items() if shape_of(p) != state.weights[n].shape
        ]
        if odd:
            raise ConfigError(
                f"Checkpoint {folder} holds the weights of another model: {len(odd)} differ in name or shape, "
                f"{odd[0]} first. Give the model (and adapter) that it was made with."
            )
        for name, value in state.weights.items():
            put(value, parameters[name])
        self.strategy.restore(parameters, state.optimizer)

    def _restore_numbers(self, numbers: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            if name in numbers:
                part.load_state_dict(numbers[name])

    # --- in the loop

    def after_step(self, step: int) -> None:
        """Writes the checkpoint of this step, where one is due by the config's count or by a callback's wish."""
        if not self.callbacks.due("save", step, self.config.run.save_steps):
            return
        with self.context.clock("save"):
            saved = self.try_to_save(step)
        if saved:
            self.callbacks.fire("on_save")
        self.callbacks.agree()

    def try_to_save(self, step: int) -> bool:
        """Writes `checkpoints/step-<n>`, on all ranks together; a failure of the disk is printed and older checkpoints
        stay. What else fails on one rank ends all."""
        return self.ranks.together(lambda: self._tried_to_save(step))

    def _tried_to_save(self, step: int) -> bool:
        if not self.ranks.is_main and not self.joint:
            return True
        try:
            if self.ranks.is_main:
                sync(self.context.folder.metrics)
            self.save(step)
        except checkpoint_files.CheckpointError as error:
            self.context.terminal.warn(str(error))
            return False
        return True


class ScheduleState:
    """The state of a learning rate schedule. Base rates and functions come from the config, so that an overridden rate
    takes effect."""

    def __init__(self, scheduler: Any, optimizer: Any) -> None:
        self.scheduler, self.optimizer = scheduler, optimizer

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scheduler = self.scheduler
        if not hasattr(scheduler, "lr_lambdas"):  # of a script's own making
            scheduler.load_state_dict(state)
            for group, rate in zip(self.optimizer.param_groups, state["_last_lr"], strict=True):
                group["lr"] = rate
            return
        own = {k: v for k, v in scheduler.state_dict().items() if k in ("base_lrs", "lr_lambdas")}
        scheduler.load_state_dict({**state, **own})
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def difference(saved: Any, present: Any, path: str = "") -> list[tuple[str, str, str]]:
    """(setting, then, now) for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(present, dict):
        keys = [*saved, *(k for k in present if k not in saved)]
        return [
            line for k in keys for line in difference(saved.get(k), present.get(k), f"{path}.{k}" if path else str(k))
        ]
    return [] if saved == present else [(path.removeprefix("config."), repr(saved), repr(present))]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Differences in aligned columns."""
    lines = [("setting", "then", "now"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)
