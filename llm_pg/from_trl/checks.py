"""What a script asks of a trainer by TRL's names: taken where it means the same here, else refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import ConfigError, nearest
from ..config.trl import TRAINER

# Methods of TRL's trainers that are called, or may be called by a script, with the same meaning.
CALLED = frozenset(
    (
        *("log", "create_optimizer", "create_scheduler", "train", "evaluate", "save_model", "save_state"),
        *("log_metrics", "save_metrics", "metrics_format", "add_callback", "remove_callback", "pop_callback"),
        *("push_to_hub", "create_model_card", "end", "is_world_process_zero", "is_local_process_zero"),
        *("get_train_dataloader", "get_decay_parameter_names"),
    )
)
_INSTEAD = {
    "compute_loss": "give a loss of your own, `surrogate='file.py:function'`, or `Algorithm(loss=...)` in a loop of "
    "your own (docs/own-loop.md)",
    "_compute_loss": "give a loss of your own, `surrogate='file.py:function'`",
    "training_step": "use a callback's on_step_begin and on_step_end",
    "_generate_and_score_completions": "give a sampler of your own, `GRPOTrainer(sampler=...)`, and reward functions",
    "_calculate_rewards": "give reward functions; `reward_weights` adds them up",
    "prediction_step": "evaluation samples completions and scores them",
}


def check_trainer_arguments(given: dict[str, Any]) -> None:
    """ConfigError for an argument of TRL's trainers that asks for what is not here, or that nobody knows."""
    for name, value in given.items():
        if name not in TRAINER:
            known = [*TRAINER, "teacher_model", "sampler", "terminal", "clock"]
            raise ConfigError(f"A trainer has no argument {name!r} (given {value!r}).{nearest(name, known)}")
        word = TRAINER[name]
        if not word.asks_for_nothing(value):
            raise ConfigError(f"TRL's argument {name}={value!r} is refused: {word.note}.")


def check_algorithm(trainer: str, name: str, runs: Sequence[str]) -> None:
    """ConfigError where a config names an algorithm that a trainer does not run; runs: () = it runs all."""
    if runs and name not in runs:
        raise ConfigError(
            f"{trainer} runs {', '.join(runs)}, and the config names algorithm {name!r}. Use the trainer of that "
            "algorithm, or PolicyGradientTrainer, which runs every row."
        )


def check_made(made: Any, method: str) -> Any:
    """Returns what a subclass's method made. ConfigError where it made nothing."""
    if made is None:
        raise ConfigError(f"{method} returned None, and set nothing on the trainer: return what it makes.")
    return made


def check_overrides(trainer: Any, base: type) -> None:
    """Raises ConfigError where a subclass overrides a method of TRL's trainers that is never called here.

    Args:
        trainer: an object. base: the class that all trainers of this package derive from.
    """
    kinds = [kind for kind in type(trainer).__mro__ if issubclass(kind, base) and kind.__module__ != base.__module__]
    defined = {name: kind for kind in reversed(kinds) for name in vars(kind) if not name.startswith("__")}
    if not defined:
        return
    import trl

    theirs = {name for name in dir(trl.GRPOTrainer) if callable(getattr(trl.GRPOTrainer, name))}
    for name, kind in defined.items():
        if name in theirs - CALLED and callable(vars(kind)[name]):
            instead = _INSTEAD.get(name, "a loop of your own is made of the same pieces (docs/own-loop.md)")
            raise ConfigError(
                f"{kind.__name__}.{name} overrides a method of TRL's trainer that is never called here, so what it "
                f"does would be lost without a word: {instead}."
            )
