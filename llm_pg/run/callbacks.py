"""transformers' TrainerCallbacks at the events of a run, and what they may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..config import ConfigError

if TYPE_CHECKING:
    from .best import Best

# TRL's name of a logged number -> ours. Callbacks and `log_history` find both.
LOGGED = {
    "loss": "policy_loss",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "uniform_groups",
    "step_time": "seconds",
}


_WISHES = ("should_evaluate", "should_save", "should_log", "should_training_stop", "should_epoch_stop")


def logged(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step under our names and, where TRL logs the same quantity, under TRL's."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    numbers.update({theirs: numbers[ours] for theirs, ours in LOGGED.items() if ours in numbers})
    parts = {name.removeprefix("reward/"): value for name, value in numbers.items() if name.startswith("reward/")}
    return {**numbers, **{f"rewards/{name}/mean": value for name, value in parts.items()}}


class Exported:
    """The attributes of a callback of transformers that it names as its state."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def state_dict(self) -> dict[str, Any]:
        return dict(self.callback.state()["attributes"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.callback, name, value)


class Callbacks:
    """Calls every callback in order, with transformers' state and control; an exception in one ends the run.

    A step is a batch of rollouts: `state.global_step` counts those that are done, `on_pre_optimizer_step` and
    `on_optimizer_step` come once an update. Events that have no place here never come (substeps, prediction steps).

    Args:
        callbacks: TrainerCallback objects or classes. args: the run's config, whose settings are read by TRL's names.
        model, processing_class: handed to every event, as are optimizer and lr_scheduler from `begin` on.
        gather: a rank's words -> those of all ranks; None = there is one rank.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] | None,
        args: Any,
        model: Any,
        processing_class: Any,
        gather: Callable[[list[str]], list[list[str]]] | None = None,
    ) -> None:
        self.gather = gather or (lambda words: [words])
        self.args, self.state, self.control = args, TrainerState(log_history=[]), TrainerControl()
        self.offered: dict[str, Any] = {"model": model, "processing_class": processing_class}
        self.offered.update(optimizer=None, lr_scheduler=None, train_dataloader=None, eval_dataloader=None)
        self.steps_per_epoch = 1.0
        self.best: Best | None = None  # of the run, where it keeps one
        self.callbacks: list[TrainerCallback] = []
        for callback in callbacks or ():
            self.add(callback)
        self.fire("on_init_end")

    def add(self, callback: Any) -> None:
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise ConfigError(
                f"callbacks holds {made!r}, which is no transformers.TrainerCallback. Derive it from that class, which "
                "has a method for every event."
            )
        self.callbacks.append(made)

    def pop(self, callback: Any) -> TrainerCallback | None:
        """Take out the callback, or the first of the class, and return it; None where there is none."""
        for each in self.callbacks:
            if each is callback or (isinstance(callback, type) and type(each) is callback):
                self.callbacks.remove(each)
                return each
        return None

    def stateful(self) -> dict[str, Any]:
        """Returns the callbacks whose state checkpoints hold, by the name of their class (the second one of a class
        with -1, ...): those with `state_dict` and `load_state_dict`, and transformers' `ExportableState`."""
        found: dict[str, Any] = {}
        for callback in self.callbacks:
            own = hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
            if own or isinstance(callback, ExportableState):
                name, again = f"callback/{type(callback).__name__}", 0
                while name in found:
                    again += 1
                    name = f"callback/{type(callback).__name__}-{again}"
                found[name] = callback if own else Exported(callback)
        return found

    def fire(self, event: str, **more: Any) -> None:
        for callback in list(self.callbacks):
            answer = getattr(callback, event)(self.args, self.state, self.control, **self.offered, **more)
            self.control = self.control if answer is None else answer

    # --- the events of a run, in order

    def begin(
        self,
        done: int,
        max_steps: int,
        steps_per_epoch: float,
        optimizer: Any,
        lr_scheduler: Any,
        *,
        is_main: bool,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Before the first step. done: steps of an earlier process. earlier: its lines of metrics."""
        state = self.state
        state.global_step, state.max_steps = done, max_steps
        state.log_history = [logged(line) for line in earlier]
        self.steps_per_epoch = steps_per_epoch
        state.epoch, state.num_train_epochs = done / steps_per_epoch, -int(-max_steps // steps_per_epoch)
        state.logging_steps, state.save_steps = self.args.run.logging_steps, self.args.run.save_steps
        state.eval_steps = self.args.eval.eval_steps
        state.is_local_process_zero = state.is_world_process_zero = is_main
        self.offered.update(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.control.should_training_stop = self.control.should_epoch_stop = False
        if self.callbacks:
            optimizer.register_step_pre_hook(lambda *_: self.fire("on_pre_optimizer_step"))
            optimizer.register_step_post_hook(lambda *_: self.fire("on_optimizer_step"))
        self._note_best()
        self.fire("on_train_begin")
        self.fire("on_epoch_begin")

    def step_begin(self) -> None:
        control = self.control
        control.should_save = control.should_evaluate = control.should_log = False
        self.fire("on_step_begin")

    def after_update(self, step: int) -> None:
        """After the update of a step, before its evaluation, its line of metrics and its checkpoint."""
        before, self.state.global_step = int(self.state.epoch), step
        self.state.epoch = step / self.steps_per_epoch
        self.fire("on_step_end")
        if int(self.state.epoch) > before:
            self.fire("on_epoch_end")
            if step < self.state.max_steps:
                self.fire("on_epoch_begin")
        self.agree()

    def log(self, values: Mapping[str, Any]) -> None:
        """A step's line of metrics, where it is a step to log or a callback asked for it."""
        every = self.state.logging_steps
        if self.state.global_step % every and not self.control.should_log:
            return
        logs = {**logged(values), "epoch": round(float(self.state.epoch), 4)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """An evaluation, by its names in metrics.jsonl with `eval_` for `eval/`; the best before it is in the state."""
        named = {f"eval_{name.removeprefix('eval/')}": value for name, value in metrics.items()}
        self.state.log_history.append({**named, "step": self.state.global_step})
        # EarlyStoppingCallback looks for what metric_for_best_model names behind `eval_`.
        also = {} if self.best is None else {f"eval_{self.best.metric}": metrics[self.best.metric]}
        self.fire("on_evaluate", metrics={**named, **also})
        self._note_best()

    def _note_best(self) -> None:
        if self.best is not None and self.best.step is not None:
            self.state.best_metric, self.state.best_global_step = self.best.value, self.best.step

    def due(self, what: str, step: int, every: int) -> bool:
        """Whether to `evaluate` or `save` after this step: by the config's count, or because a callback asked."""
        return bool((every and step % every == 0) or getattr(self.control, f"should_{what}"))

    def agree(self) -> None:
        """What a callback of one rank asks for is done by all: evaluations and steps are work of all together."""
        own = [name for name in _WISHES if getattr(self.control, name)]
        for name in {name for of_rank in self.gather(own) for name in of_rank}:
            setattr(self.control, name, True)

    @property
    def stops(self) -> bool:
        return bool(self.control.should_training_stop or self.control.should_epoch_stop)
