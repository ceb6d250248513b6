"""A user's function that forks, and whose child comes back out of it.

Such a child would go on as a second worker, or a second trainer, on the same pipes and files. It is ended instead, and
the call has no score: of two answers nobody knows which one is meant. A child that ends by itself, runs another program
or stays inside the function does no harm.
"""

import contextlib
import os
import select
import sys
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import ClassVar

PATIENCE_S = 0.5  # how long a call that has forked waits for a child to come back too; one that comes later is ended


class ForkedChildError(RuntimeError):
    """A function forked, and the child process left it as well."""


class OneProcess:
    """A context manager around a call of a user's function: only the process that entered leaves.

    A forked child ends here. ForkedChildError in the caller where one came within PATIENCE_S seconds.
    """

    writer: ClassVar[int] = -1  # in a forked child, and in what it forks: where it tells that it came back

    def __enter__(self) -> None:
        _watch_forks()
        self.pid = os.getpid()
        self.begun: list[tuple[int, int]] = []  # pipes of forks that have begun and not ended
        self.readers: list[int] = []  # of a pipe from each child
        self._token = _current.set(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if os.getpid() != self.pid:
            self._end(error)
        _current.reset(self._token)
        came_back = error is None and self._came_back()
        for descriptor in self.readers:
            os.close(descriptor)
        if came_back:
            raise ForkedChildError(
                "the function forked, and the child process returned from it as well. End a forked child inside the "
                "function (os._exit), or use subprocess or multiprocessing"
            )

    def _end(self, error: BaseException | None) -> None:
        """End a child: with the code that it asked for, or because it came back."""
        if isinstance(error, SystemExit):
            sys.stdout.flush()
            os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
        with contextlib.suppress(OSError):  # nobody waits any more
            os.write(self.writer, b"!")
        os._exit(1)

    def _came_back(self) -> bool:
        """Whether a child has left the function; waits for those that are neither gone nor another program by now."""
        waiting = set(self.readers)
        while waiting:
            ready = select.select(list(waiting), [], [], PATIENCE_S)[0]
            if any(os.read(descriptor, 1) for descriptor in ready):
                return True
            if not ready:
                return False
            waiting -= set(ready)
        return False


_current: ContextVar[OneProcess | None] = ContextVar("current", default=None)


@cache
def _watch_forks() -> None:
    """Once in a process: hooks, which do nothing outside a call."""

    def before() -> None:
        call = _current.get()
        if call is not None and OneProcess.writer < 0:
            call.begun.append(os.pipe())

    def in_parent() -> None:
        call = _current.get()
        if call is not None and call.begun:
            reader, writer = call.begun.pop()
            os.close(writer)
            call.readers.append(reader)

    def in_child() -> None:
        call = _current.get()
        if call is not None and call.begun:
            reader, OneProcess.writer = call.begun.pop()
            os.close(reader)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)
