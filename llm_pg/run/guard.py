"""What ends a run early, and in order: signals, and steps that are no numbers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

NON_FINITE_LIMIT = 5
# A loss scaler begins far too high on purpose and finds its scale by skipping steps.
NON_FINITE_LIMIT_SCALED = 20


class RunStopped(RuntimeError):
    """A run that cannot go on; one paragraph says why and what is saved."""


class Interrupted(SystemExit):
    """A run that was asked to end, and did so in order. As a SystemExit it ends a program with 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


class Signals:
    """While it is open, the first SIGTERM or SIGINT is only remembered in `received`; a second one ends the process.

    After the first one the kernel's own action is put back, so the second one ends even a process that is deep in a
    long computation. Under torchrun, which may pass on a signal that the terminal sent to all, signals are remembered
    until the launcher loses patience. Outside the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            # os.write: a print could be in the middle of another one.
            text = f"{name_of(number)}: finishing this step, then saving. A second one ends at once.\n"
            os.write(2, text.encode())
        self.received = number
        if not self._launched:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)


def name_of(number: int) -> str:
    return signal.Signals(number).name


class FiniteCheck:
    """Counts optimiser steps in a row that were skipped; RunStopped at the limit."""

    def __init__(self, limit: int = NON_FINITE_LIMIT) -> None:
        self.limit, self.in_a_row = limit, 0

    def observe(self, stepped: Iterable[bool], step: int) -> None:
        """Of the updates of one step, in order."""
        for moved in stepped:
            self.in_a_row = 0 if moved else self.in_a_row + 1
            if self.in_a_row >= self.limit:
                raise RunStopped(
                    f"{self.in_a_row} optimiser steps in a row were skipped, the last in step {step}, because the loss "
                    "or the gradient was NaN or inf. The weights are those before the first of them. Lower "
                    "train.learning_rate or set train.max_grad_norm; with fp16, use bf16; and look for NaN in the "
                    "model's weights and in the rewards."
                )
