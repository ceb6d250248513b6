"""What a checkpoint of text and images has beside its text, of which alone a policy is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from ...model.attention import core_of


@dataclass(frozen=True)
class OtherParts:
    """The parts of a model that read no text.

    Attributes:
        names: such as vision and audio. held: whether they are in memory and saved, untrained; else they were never
            loaded, and the saved model is without them.
        checkpoint: where the model came from. model: its class.
    """

    names: tuple[str, ...]
    held: bool
    checkpoint: str
    model: str

    def before(self) -> str:
        """Said before the first step."""
        if self.held:
            return f"{self.model} has parts for text and {self._listed}: that for text is trained, the rest is kept."
        return (
            f"The checkpoint {self.checkpoint} has parts for text and {self._listed}: that for text alone "
            f"({self.model}) is loaded, trained and saved; the saved model has no {self._listed}."
        )

    def at_the_save(self, folder: Any) -> str:
        """Said when the model is saved."""
        if self.held:
            return f"{folder}: the text part of {self.model} was trained; its {self._listed} is as it came."
        return f"{folder} holds the text part of {self.checkpoint} alone: no {self._listed}."

    @property
    def _listed(self) -> str:
        return " and ".join(self.names)


def other_parts(model: Any) -> OtherParts | None:
    """What the checkpoint of a model has beside its text part; None where that is all of it.

    Read off the model, and where it is the text part alone off the checkpoint that it came from, if that is on this
    machine.
    """
    core = core_of(model)
    config, checkpoint = core.config, str(getattr(core.config, "_name_or_path", ""))
    names, held = _beside_text(config), True
    if not names and checkpoint:
        try:
            whole = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError):
            return None
        names, held = _beside_text(whole), False
    return OtherParts(names, held, checkpoint, type(core).__name__) if names else None


def _beside_text(config: Any) -> tuple[str, ...]:
    text = config.get_text_config(decoder=True)
    if text is config:
        return ()
    own = {name: getattr(config, name, None) for name in type(config).sub_configs}
    return tuple(name.removesuffix("_config") for name, part in own.items() if part is not None and part is not text)
