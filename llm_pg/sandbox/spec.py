"""The words of the sandbox: limits of a run, the level of protection in force, the result, the errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "error", "signal", "wall", "cpu", "output", "disk", "tasks", "stopped"]


class SandboxError(RuntimeError):
    """The sandbox itself failed, so nothing is known about the code: the score is None, never 0."""


class SandboxRefused(SandboxError):
    """This machine cannot contain the code, and nobody allowed it to run uncontained."""


@dataclass(frozen=True)
class Limits:
    """What one run may use. Every limit is enforced from outside the code that runs.

    wall_s: seconds from the start of the interpreter to the kill.
    cpu_s: seconds of processor time for each process, rounded up to whole seconds.
    memory_mb: address space of each process, in MiB.
    output_kb: bytes kept of stdout and of stderr, in KiB each; one byte more ends the run.
    file_mb: size of one file, in MiB.
    disk_mb, files: size and number of all files in the run's folder. A hard limit where a private file system can be
        mounted (namespaces); else looked at every 20 ms, so that a fast writer gets past it for that long.
    tasks: threads and processes at once.
    fork: whether the code may start processes at all. Off, the kernel refuses, and there is nothing to hunt down.
    """

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    output_kb: int = 1024
    file_mb: int = 16
    disk_mb: int = 64
    files: int = 1000
    tasks: int = 32
    fork: bool = False

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s", "memory_mb", "output_kb", "file_mb", "disk_mb", "files", "tasks"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Limits.{name} must be positive and finite; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Level:
    """What holds the code, as found by trying it (`sandbox.level()`), not by reading version numbers.

    landlock: the ABI of Landlock in use, 0 for none. ABI 4 adds TCP, 6 adds signals and abstract sockets; below, the
        system call filter alone holds these.
    seccomp: whether the filter of system calls is in force.
    namespaces: whether each run has its own user, pid, network, ipc, uts and mount namespaces.
    uid: the first of the user ids that runs switch to when started by root; None when they keep the caller's.
    reason: why this level and not a higher one; empty at the highest.
    """

    landlock: int = 0
    seccomp: bool = False
    namespaces: bool = False
    uid: int | None = None
    reason: str = ""

    @property
    def contained(self) -> bool:
        """Whether hostile code may run at this level: Landlock and the filter are the least."""
        return self.landlock >= 1 and self.seccomp

    def __str__(self) -> str:
        if not self.contained:
            return f"none: resource limits only ({self.reason})"
        parts = [f"Landlock ABI {self.landlock}", "system call filter"]
        if self.namespaces:
            parts.append("user, pid, network, ipc, uts and mount namespaces")
        if self.uid is not None:
            parts.append("a user id per run")
        return " + ".join(parts) + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Job:
    """One program to run: its source, its standard input, and files to lay beside it (plain names)."""

    code: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a program did. Nothing in here is a verdict: `status` and `exit_code` are the program's own words.

    status: "ok" exit code 0; "error" another; "signal" killed by one that was not ours; "stopped" by the trainer; else
        the limit that ended it.
    stdout, stderr: decoded as UTF-8, bad bytes replaced, cut at the limit.
    wall_s, cpu_s: seconds; peak_mb: largest resident size of one process, in MiB.
    """

    status: Status
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    peak_mb: float
