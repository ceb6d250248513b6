"""One process at a time writes a run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...config import ConfigError

NAME = ".lock"
_held: set[Path] = set()  # by this process: a lock of the kernel's does not keep a process from itself


class FolderLock:
    """While it is open, another process (or another run of this one) is refused the folder, by name.

    The lock is the kernel's (a POSIX record lock), so that it ends with the process however that ends, also over NFS,
    and no child inherits it. What is in the file, `<run>/.lock`, is for people. Where the file system has no locks,
    the file alone decides: a process of this machine that is gone has left it behind; one of another machine has to be
    asked about.

    Raises:
        ConfigError: on entering, where another process writes the folder: its host, its number and since when.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[bytes] | None = None

    def __enter__(self) -> FolderLock:
        place = self.path.resolve()
        if place in _held:
            raise ConfigError(f"Another run of this process writes {self.path.parent}. Give this one another run_name.")
        file = self.path.open("ab+", buffering=0)  # a buffer that a full disk did not take would fail once more
        try:
            _take(file, self.path)
            file.truncate(0)
            own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), **_birth(os.getpid())}
            file.write(json.dumps(own).encode())
        except BaseException:
            file.close()
            raise
        self._file = file
        _held.add(place)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # a full or lost disk: the kernel's lock ends with the file all the same
            self._file.truncate(0)
        self._file.close()
        _held.discard(self.path.resolve())


def check_free(folder: Path) -> None:
    """ConfigError where a process writes the folder; before anything expensive, and without taking the lock."""
    path = folder / NAME
    if path.resolve() in _held or not path.exists():
        return
    with path.open("r+") as file:
        _take(file, path)


def is_written(folder: Path) -> bool | None:
    """Whether a process writes the folder, by what is in its lock file; the lock itself is not touched, so that nobody
    who comes for it is refused. None = a process of another machine, which cannot be asked."""
    facts = _read(folder / NAME)
    if not facts:
        return False
    if facts.get("host") != socket.gethostname():
        return None
    return _birth(int(facts.get("pid", 0))).get("born") == facts.get("born", -1.0)


def _take(file: IO[Any], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no record locks of this kind
        return _ask_the_file(path)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _refusal(path, _read(path)) from None
    except OSError:  # this file system has no locks
        _ask_the_file(path)


def _ask_the_file(path: Path) -> None:
    facts = _read(path)
    if not facts:
        return
    here = facts.get("host") == socket.gethostname()
    if not here or _birth(int(facts.get("pid", 0))).get("born") == facts.get("born", -1.0):
        raise _refusal(path, facts, "" if here else f" If that process is gone, delete {path}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _birth(pid: int) -> dict[str, float]:
    """When that process began: a number that was given to another since is distinguished by it."""
    import psutil

    try:
        return {"born": psutil.Process(pid).create_time()}
    except (psutil.Error, ValueError):
        return {}


def _refusal(path: Path, facts: dict[str, Any], more: str = "") -> ConfigError:
    who = "another process"
    if facts:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(facts.get("since", 0))))
        who = f"process {facts.get('pid')} on {facts.get('host')}, since {since},"
    return ConfigError(
        f"{path.parent} is being written by {who} and two runs in one folder would mix their steps. Wait for it, end "
        f"it, or give this run another run.run_name.{more}"
    )
