"""Runs a command for as long as the process that asked for it lives: `python leash.py PARENT_PID COMMAND...`.

A server that outlives its trainer holds the accelerator's memory. The trainer may end in ways that run no code of its
own (SIGKILL), so this small process watches it: when its parent is another than PARENT_PID, or on SIGTERM, everything
in its session is ended. Imports nothing of the package, so that it starts at once.
"""

from __future__ import annotations

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


def _die_with_parent() -> None:
    """In the child, before it becomes the command: should this watcher be killed, the kernel ends the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(parent: int, command: Sequence[str]) -> int:
    """The command's exit status; 0 where it was ended from here."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(LOOK_EVERY)
    if child.poll() is not None and not asked:
        return child.returncode
    # The whole group, whose leader this process is: vLLM's engine is a process of its own.
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
