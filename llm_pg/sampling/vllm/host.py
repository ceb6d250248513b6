"""What is between the engine and a vLLM, wherever that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from .answers import Answer, Ask
from .errors import EngineError

State = tuple[int, ...]  # a fingerprint of weights


class Host(Protocol):
    """One or more vLLMs that hold the same weights. Models are given with each call, as the engine's may change."""

    served: State | None  # the weights that it holds; None = none of the model's
    advice: str  # what to look at where it computes with others

    def start(self, model: Any, present: State) -> None:
        """Begin to start; `present` is the model's state."""

    def wait(self) -> None:
        """Until it can sample. EngineError where it cannot."""

    def load(self, model: Any, present: State) -> None:
        """Bring it the model's weights and note their state."""

    def complete(self, asks: Sequence[Ask]) -> list[tuple[list[Answer], str]]:
        """Completions of each, and what to call the vLLM that gave them. EngineError where none can."""

    def older(self) -> dict[str, Tensor] | None:
        """The weights that it held before the present ones, where they were kept."""

    def explained(self, error: EngineError) -> EngineError:
        """The error with what the host knows beside it."""

    def stop(self) -> None:
        """End it."""
