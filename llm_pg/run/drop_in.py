"""What a script written for TRL's trainers does with a trainer besides `train`, and the arguments that it may bring."""

from __future__ import annotations

from typing import Any, NoReturn

from ..config import Config, ConfigError, nearest
from ..config.trl import TRAINER
from .callbacks import Callbacks


def check_arguments(given: dict[str, Any]) -> None:
    """ConfigError for an argument of TRL's trainers that asks for what is not here, or that nobody knows."""
    for name, value in given.items():
        if name not in TRAINER:
            known = [*TRAINER, "terminal", "clock"]
            raise ConfigError(f"A trainer has no argument {name!r} (given {value!r}).{nearest(name, known)}")
        word = TRAINER[name]
        if not word.asks_for_nothing(value):
            raise ConfigError(f"TRL's argument {name}={value!r} is refused: {word.note}.")


class TrlFace:
    """Names of TRL's trainers on ours."""

    config: Config
    callbacks: Callbacks
    tokenizer: Any

    @property
    def args(self) -> Config:
        """The run's config."""
        return self.config

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def state(self) -> Any:
        """transformers' TrainerState: `log_history`, `global_step`, `epoch`, ..."""
        return self.callbacks.state

    def add_callback(self, callback: Any) -> None:
        """Add a TrainerCallback, or make one of the class given."""
        self.callbacks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Take out this callback, or the first of this class."""
        self.callbacks.pop(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Take out this callback, or the first of this class, and return it; None where there is none."""
        return self.callbacks.pop(callback)

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: nothing is uploaded by a run."""
        raise ConfigError(
            "push_to_hub is refused: a run uploads nothing. Save the model, `trainer.save_model(folder)`, and upload "
            "the folder: `huggingface_hub.upload_folder(repo_id=..., folder_path=folder)`."
        )

    def create_model_card(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a run writes a report instead."""
        raise ConfigError(
            "create_model_card is refused: the run's folder has report.html, config.yaml and summary.json instead."
        )
