"""A process that belongs to this one: started, spoken to over two pipes, and ended with all that it has started.

    this process  ->  guard  ->  child  ->  whatever it starts

There is one way to end it: the guard is asked to, or notices that this process is gone (see `guard`). A child is
started by its own command and not forked (accelerators and thread pools do not survive a fork) nor by multiprocessing
(whose start runs the user's script again, which need not be guarded for it).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .descendants import KILL_S
from .frames import encode, read, read_bytes, write
from .guard import GRACE_S, can_stand

PATIENCE = GRACE_S + 1.0  # seconds for a guard to say how a child ended: first it ends what that left behind
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from llm_pg.processes.guard import main; "
    "main(*sys.argv[2:])"
)
_LAST_LINES = 12


class Child:
    """A process and its guard, seen from the one that starts it; not started on Windows, which has no fork.

    Args:
        run: `module:function`, called without arguments with this process's import path, which finds its requests and
            answers by `own_pipes`; or the words of a command, which reads nothing.
        output: takes what it prints; None = the standard error of this process.
        pass_fds: descriptors that it has under the same numbers. env: its environment; None = that of this process.
        grace: seconds that it has to end in order; 0 = it is killed at once.

    Raises:
        ValueError: the system has no fork.

    Attributes:
        process: the guard, which ends as the child does, and after everything that the child has started.
        requests, answers: descriptors to write to and to read from; -1 for a command.
    """

    def __init__(
        self,
        run: str | Sequence[str],
        *,
        output: IO[bytes] | None = None,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        grace: float = 0.0,
    ) -> None:
        if not can_stand():
            raise ValueError(f"{run} needs a process of its own, which needs os.fork: Linux or macOS.")
        path = json.dumps([str(entry) or os.getcwd() for entry in sys.path] + [os.getcwd()])
        is_function = isinstance(run, str)
        words = [str(run)] if is_function else ["", *run]
        self.grace = grace
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, path, str(os.getpid()), str(grace), *words],
            stdin=subprocess.PIPE if is_function else subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_function else output,
            stderr=output,
            bufsize=0,
            pass_fds=pass_fds,
            env=env,
            start_new_session=True,  # Ctrl-C in the terminal is for this process, which finishes its step first
        )
        pipes = (self.process.stdin, self.process.stdout)
        self.requests, self.answers = (-1 if pipe is None else pipe.fileno() for pipe in pipes)

    def send(self, message: dict[str, Any]) -> None:
        """Writes a request. BrokenPipeError where nobody reads it any more."""
        write(self.requests, encode(message))

    def receive(self) -> dict[str, Any] | None:
        """Waits for the next answer; None where the child has ended."""
        return read(self.answers)

    def receive_bytes(self) -> bytes | None:
        """The same of an answer that is not JSON."""
        return read_bytes(self.answers)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def ask_to_end(self) -> None:
        """Has the guard end the child and all it started; returns at once. Any thread may call it."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # a stopped process handles no signal but this one

    def end(self, patience: float = 0.0) -> str:
        """Ends the child and all it started, after `patience` seconds in which it may end by itself; says how it did.

        Returns:
            exit code N, killed by SIGNAL, or killed, where it was asked to end here.
        """
        try:
            code: int | None = self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            code = None
            self.ask_to_end()
            try:
                self.process.wait(timeout=max(self.grace, GRACE_S) + KILL_S + 5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()  # the kernel ends the child with it
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if code is None:
            return "killed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def own_pipes() -> tuple[int, int]:
    """In a child: the descriptors of its requests and answers, in the place of 0 and 1.

    Input becomes empty and output joins the standard error, so that nothing that prints can break a message.
    """
    requests, answers = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    os.close(empty)
    return requests, answers


def end_of(log: Path) -> str:
    """Where a log is, and its last lines, for a message."""
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return f"Its log {log} ends:\n" + "\n".join(f"  {line[:300]}" for line in lines)


def anonymous_file() -> int:
    """A descriptor of memory to share with a child; no folder holds it, so that nothing is left however both end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("llm_pg")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
