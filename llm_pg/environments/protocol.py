"""What an environment of several turns is: reset, then a text at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

ENVIRONMENTS = "environments"  # the column in which reward functions get the objects that episodes were played with


@dataclass(frozen=True)
class Reply:
    """What an environment makes of one turn.

    Attributes:
        text: what the model reads next (a tool's result, a user's turn); it is tokenised once, and never trained.
        reward: of the turn just taken, finite; None = this episode cannot be scored, which ends it.
        done: the episode is over.
        role: of `text` in a conversation with a chat template: user, or what the template knows beside it (tool).
    """

    text: str = ""
    reward: float | None = 0.0
    done: bool = False
    role: str = "user"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.role, str):
            raise ValueError(f"The text and the role of a Reply are texts; got {self.text!r} and {self.role!r}.")
        self.text.encode()  # half of a surrogate pair would end the run in the tokenizer; here it ends the episode


class Environment(Protocol):
    """A conversation partner that gives rewards. One object plays one episode; it lives in a worker process.

    It must be a function of (row, seed, texts): a worker that was late or died is replaced, and the new one plays the
    turns so far again. Draw random numbers from `random.Random(seed)`, and hold no state outside the object.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin the episode of a prompt's row (all its columns). The prompt itself is the opening.

        seed: differs between the samples of a prompt; what decides how hard the episode is belongs into the row, so
        that the samples of a group can be compared.
        """
        ...

    def step(self, text: str) -> Reply:
        """Take the model's turn, decoded without special tokens."""
        ...
