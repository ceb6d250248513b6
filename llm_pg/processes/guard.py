"""A process between the trainer and a child of it, so that neither the child nor what it starts outlives the trainer.

    trainer  ->  guard  ->  child  ->  whatever the child starts

On Linux the guard adopts what daemonises below it (a child subreaper), whether it called setsid, forked twice or was
left running. It ends all of it when the child ends, on SIGTERM, and when the trainer is gone, also by SIGKILL. Where
the guard itself is killed, the kernel ends the child, and children of that can be left. Elsewhere than on Linux, and
where a container forbids it, no process can adopt: there the child's process group is ended, and a process that has
left the group (setsid) is not found.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from types import FrameType
from typing import NoReturn

from llm_pg.processes import descendants

GRACE_S = 1.0  # seconds that what a child leaves behind has after SIGTERM; a sandbox removes its folder meanwhile
_LOOK_S = 0.2  # seconds between looks at the parent
_ENDING = ("SIGTERM", "SIGINT", "SIGHUP")  # by name: this file is imported where there are no such signals, too


def can_stand() -> bool:
    """Returns whether this system has what a guard and its child need: fork, and limits of resources (not Windows)."""
    return hasattr(os, "fork") and find_spec("resource") is not None


def main(parent: str, grace: str, entry: str, *command: str) -> None:
    """Stands guard over `entry`, a `module:function`, or over a command. See `child.Child`, which starts this."""
    stand_guard(int(parent), float(grace))
    if command:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            sys.exit(f"{command[0]} cannot be started: {error.strerror}.")
    module, _, function = entry.partition(":")
    getattr(import_module(module), function)()


def stand_guard(parent: int, grace: float = 0.0) -> None:
    """Forks. Returns in the child; the process that called stays behind as its guard.

    The guard ends as the child did, with its exit code or by its signal, once everything below is gone. Call it in a
    process that has one thread and has loaded nothing.

    Args:
        parent: process number of the trainer, which has started this process.
        grace: seconds that the child has after SIGTERM; 0 = it is killed at once.
    """
    adopts = _adopts()
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            asked.append(number)

    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watched = (*(getattr(signal, name) for name in _ENDING), signal.SIGCHLD)
    before = {number: signal.signal(number, ask) for number in watched}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(waker)
        os.setsid()  # what signals its own group does not reach the guard
        _end_with(guard)
        return
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # the pipes are the child's: the trainer sees their end
    os.dup2(null, 1)
    status = _watch(child, parent, wake, asked)
    if status is None and not grace:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        descendants.end(max(grace, GRACE_S)) if adopts else _end_group(child, grace if status is None else 0.0)
    except TimeoutError as error:
        os.write(2, f"A process of llm_pg has ended, and {error}.\n".encode())
    _end_as(status)


def _end_with(parent: int) -> None:
    """Has the kernel end this process with its parent, even while a function holds the interpreter lock.

    Args:
        parent: its process number as it was at the start; where it has ended since, so does this process.
    """
    if sys.platform == "linux":
        descendants.die_with_parent()
    if os.getppid() != parent:
        sys.exit(0)


def _adopts() -> bool:
    """Whether orphans below this process become its children, and /proc shows them."""
    if sys.platform != "linux" or not os.path.exists("/proc/self/stat"):
        return False
    try:
        descendants.become_subreaper()
    except OSError:  # a container's filter of system calls
        return False
    return True


def _watch(child: int, parent: int, wake: int, asked: list[int]) -> int | None:
    """Reap what ends, until the child has (returns its status), or is to be ended (None)."""
    while not asked and os.getppid() == parent:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == child:
                return found[1]
        if select.select([wake], [], [], _LOOK_S)[0]:
            os.read(wake, 1 << 12)
    return None


def _end_group(leader: int, grace: float) -> None:
    """Where nothing can be adopted: SIGTERM for the child's group, and SIGKILL after `grace` seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it, or dead ones only
        if grace:
            os.killpg(leader, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and descendants.remain():
            time.sleep(_LOOK_S)
        os.killpg(leader, signal.SIGKILL)


def _end_as(status: int | None) -> NoReturn:
    """End with the status of another process; 0 for one that was ended by us."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core file, the child's, is enough
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status) if status is not None else 0)
