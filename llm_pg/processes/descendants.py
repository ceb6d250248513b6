"""The processes below this one: adopted when they are orphaned, listed, ended.

The sandbox's supervisor imports this file by itself, in a fresh interpreter without site packages: standard library
only, and nothing that takes long to import. What looks into /proc or asks the kernel works on Linux alone.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache

KILL_S = 5.0  # seconds within which descendants that were sent SIGKILL must be gone
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIGKILL, _SIGTERM, _SIGSTOP = 9, 15, 19
_LOOK_S = 0.01


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)  # not at import: Windows has none


def become_subreaper() -> None:
    """Makes orphans among the descendants children of this process, however they daemonised. OSError if refused."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "subreaper")


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that forked it ends. OSError if refused."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL, "death signal")


def of(root: int) -> list[int]:
    """Returns every process below `root`, zombies too, from one look at /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def remain() -> bool:
    """Reaps dead children; returns whether any child, own or adopted, is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def kill() -> None:
    """Kills and reaps all descendants of a subreaper. TimeoutError where some are left after KILL_S seconds.

    All are stopped before any is killed: a stopped fork bomb cannot fill the places of its dead.
    """
    deadline = time.monotonic() + KILL_S
    stopped: set[int] = set()
    while remain():
        found = set(of(os.getpid()))
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(found)} descendants could not be killed within {KILL_S:g} s")
        for pid in found:
            _send(pid, _SIGKILL if found <= stopped else _SIGSTOP)
        stopped |= found


def end(grace: float) -> None:
    """Asks all descendants of a subreaper to end by SIGTERM, and kills those left after `grace` seconds.

    TimeoutError as of `kill`.
    """
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while remain() and time.monotonic() < deadline:
        found = set(of(os.getpid()))
        for pid in found - asked:
            _send(pid, _SIGTERM)
        asked |= found
        time.sleep(_LOOK_S)
    kill()


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # gone, or another user's by now (sudo), and then KILL_S is the limit


def _prctl(option: int, value: int, what: str) -> None:
    none = ctypes.c_ulong(0)
    if _libc().prctl(option, ctypes.c_ulong(value), none, none, none) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
