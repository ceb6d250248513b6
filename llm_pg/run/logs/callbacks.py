"""transformers' TrainerCallbacks at the events of a run, and what they may ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ...config import ConfigError
from ...evaluate import Evaluation
from .trl_log import TrlLog, named_evaluation

if TYPE_CHECKING:
    from ..saving.best import Best

_WISHES = ("should_evaluate", "should_save", "should_log", "should_training_stop", "should_epoch_stop")


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics is a number."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float))}


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
        any_of: which flags are set on any rank; None = there is one rank.

    Attributes:
        trl: the numbers of the steps by TRL's names, of which entries of the log are made.
        emit: what takes an entry of the log; `write` unless a trainer's `log` does more.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] | None,
        args: Any,
        model: Any,
        processing_class: Any,
        any_of: Callable[[Sequence[bool]], list[bool]] | None = None,
    ) -> None:
        self.any_of = any_of or list
        self.agrees = True  # whether any rank has a callback that could ask for something
        self.args, self.state, self.control = args, TrainerState(log_history=[]), TrainerControl()
        self.offered: dict[str, Any] = {"model": model, "processing_class": processing_class}
        self.offered.update(optimizer=None, lr_scheduler=None, train_dataloader=None, eval_dataloader=None)
        self.by_name: dict[str, Evaluation] = {}  # the last of each set that has a name
        self.trl, self.emit = TrlLog(), self.write
        self.steps_per_epoch = 1.0
        self._began = (0, time.perf_counter())
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
        self.steps_per_epoch, self.trl = steps_per_epoch, TrlLog()
        state.log_history = [self._entry(line) for line in earlier]
        self._began = (done, time.perf_counter())
        state.epoch, state.num_train_epochs = done / steps_per_epoch, -int(-max_steps // steps_per_epoch)
        state.logging_steps, state.save_steps = self.args.run.logging_steps, self.args.run.save_steps
        state.eval_steps = self.args.eval.eval_steps
        state.is_local_process_zero = state.is_world_process_zero = is_main
        self.offered.update(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.control.should_training_stop = self.control.should_epoch_stop = False
        (self.agrees,) = self.any_of([bool(self.callbacks)])
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
        self.trl.add(values)
        self.state.num_input_tokens_seen = int(self.trl.num_tokens)
        if self.state.global_step % every and not self.control.should_log:
            return
        self.emit({**numbers_of(values), **self.trl.take(), "epoch": round(float(self.state.epoch), 4)})

    def write(self, logs: dict[str, float]) -> None:
        """An entry of the log: into the history, and to the callbacks."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)

    def _entry(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Of a step that an earlier process did."""
        self.trl.add(line)
        return {**numbers_of(line), **self.trl.take()}

    def close(self, completions_per_step: int) -> dict[str, float]:
        """The last entry of a run that came to its end, as transformers writes it; returns what it says of the run."""
        done, began = self._began
        steps, seconds = self.state.global_step - done, max(time.perf_counter() - began, 1e-9)
        of_run = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps * completions_per_step / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "total_flos": self.state.total_flos,
            "train_loss": self.trl.train_loss,
            "epoch": round(float(self.state.epoch), 4),
        }
        self.emit({**self.trl.take(), **of_run})
        return of_run

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation between two steps, and those of sets that have names; the best before it is in the state."""
        # EarlyStoppingCallback looks for what metric_for_best_model names behind `eval_`.
        also = {} if self.best is None else {f"eval_{self.best.metric}": evaluation.metrics()[self.best.metric]}
        values = named_evaluation(evaluation)
        for name, of_set in self.by_name.items():
            values |= named_evaluation(of_set, f"eval_{name}")
        self.evaluated_as(values, also)
        self._note_best()

    def evaluated_as(self, values: Mapping[str, float], also: Mapping[str, float] | None = None) -> None:
        """The numbers of an evaluation; `also` is for callbacks alone."""
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.fire("on_evaluate", metrics={**values, **(also or {})})

    def _note_best(self) -> None:
        if self.best is not None and self.best.step is not None:
            self.state.best_metric, self.state.best_global_step = self.best.value, self.best.step

    def due(self, what: str, step: int, every: int) -> bool:
        """Whether to `evaluate` or `save` after this step: by the config's count, or because a callback asked."""
        return bool((every and step % every == 0) or getattr(self.control, f"should_{what}"))

    def agree(self) -> None:
        """What a callback of one rank asks for is done by all: evaluations and steps are work of all together."""
        if self.agrees:
            for name, is_asked in zip(_WISHES, self.any_of([getattr(self.control, n) for n in _WISHES]), strict=True):
                setattr(self.control, name, is_asked)

    @property
    def stops(self) -> bool:
        return bool(self.control.should_training_stop or self.control.should_epoch_stop)
