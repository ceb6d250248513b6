"""What becomes of an argument of TRL's: the same here, translated, without a purpose here, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["supported", "mapped", "idle", "refused"]


@dataclass(frozen=True)
class Word:
    """An argument of TRL 1.16.

    Args:
        kind: supported (a setting here has the same name and meaning), mapped (translated into settings here), idle
            (accepted: what it governs does not exist here), refused (any value that asks for something is an error).
        default: TRL's. rloo: the default in `RLOOConfig` where it differs.
        note: what it becomes, why it has no purpose, or what to do instead. It completes "TRL's x is refused: ...".
        accepts: further values that ask for nothing, or for what is the case anyway.
    """

    kind: Kind
    default: Any
    note: str = ""
    accepts: tuple[Any, ...] = ()
    rloo: Any = ...

    def asks_for_nothing(self, value: Any) -> bool:
        value = getattr(value, "value", value)
        return any(type(value) is type(each) and value == each for each in (self.default, None, *self.accepts))


def same(default: Any, note: str = "", *, rloo: Any = ...) -> Word:
    return Word("supported", default, note, rloo=rloo)


def mapped(default: Any, note: str, *, rloo: Any = ...) -> Word:
    return Word("mapped", default, note, rloo=rloo)


def idle(default: Any, note: str) -> Word:
    return Word("idle", default, note)


def refused(default: Any, note: str, *accepts: Any) -> Word:
    return Word("refused", default, note, accepts)
