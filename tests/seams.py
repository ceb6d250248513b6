"""Where tests look into a run that goes on: callbacks of transformers' own class, as a user would write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Steps(TrainerCallback):
    """Calls `before(step)` at the beginning of each step and `after(step)` after its update, steps counted from 1."""

    def __init__(
        self, before: Callable[[int], object] | None = None, after: Callable[[int], object] | None = None
    ) -> None:
        self.before, self.after = before, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.before is not None:
            self.before(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.after is not None:
            self.after(state.global_step)


def raising(error: type[BaseException], at: int) -> Callable[[int], None]:
    """For `Steps`: raises `error` in step `at`, and in no other."""

    def raises(step: int) -> None:
        if step == at:
            raise error

    return raises
