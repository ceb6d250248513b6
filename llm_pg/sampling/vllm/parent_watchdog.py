"""Runs a command for as long as the process that asked for it lives: `python parent_watchdog.py PARENT_PID COMMAND...`.

A server that outlives its trainer holds the accelerator's memory. The trainer may end in ways that run no code of its
own (SIGKILL), so this small process watches it: when its parent is another than PARENT_PID, or on SIGTERM, everything
in the command's group is ended. Imports nothing of the package, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

LOOK_EVERY, PATIENCE = 0.25, 10.0  # seconds between looks at the parent; seconds to end in order
_PR_SET_PDEATHSIG = 1


def _in_child() -> None:
    """Before it becomes the command: a group of its own, and should this watcher be killed, the kernel ends it."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(parent: int, command: Sequence[str]) -> int:
    """The command's exit status, negative where a signal ended it."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    child = subprocess.Popen(command, preexec_fn=_in_child)
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(LOOK_EVERY)
    # The whole group: vLLM's engine and workers are processes of their own, and can outlast it.
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
