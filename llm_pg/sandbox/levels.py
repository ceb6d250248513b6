"""Which protection this machine gives, found by running a program that tries to get out."""

import os
import stat
import sys
import tempfile
from dataclasses import replace
from functools import cache

from llm_pg.sandbox import _kernel, launch
from llm_pg.sandbox.spec import Job, Level, Limits, SandboxError
from llm_pg.sandbox.syscalls import architecture

_OWN_UIDS = 1_900_000_000  # of a range that no distribution assigns; a run takes this plus its process number
_MAX_PIDS = 4_194_304
_NEWEST_ABI = 6  # what _kernel knows how to ask for

_TRIAL = """
import os, socket, threading
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
secret, trainer = input(), int(input())
held = {
    "read": refused(open, secret), "write": refused(open, secret, "a"), "chmod": refused(os.chmod, secret, 0o600),
    "create": refused(open, os.path.dirname(secret) + "/planted", "w"), "proc": refused(os.listdir, "/proc"),
    "socket": refused(socket.socket), "fork": refused(os.fork), "signal": refused(os.kill, trainer, 0),
}
with open("own", "w") as own:
    thread = threading.Thread(target=own.write, args=("x",))
    thread.start()
    thread.join()
print("contained" if all(held.values()) else [name for name in held if not held[name]])
"""


def level(*, namespaces: bool = True, max_landlock: int = _NEWEST_ABI) -> Level:
    """The highest level that works here. The answer is kept for the life of the process.

    namespaces: False leaves them out, as on systems that forbid them. max_landlock: use no newer ABI than this.
    """
    return tried_level(namespaces, max_landlock)


@cache
def tried_level(namespaces: bool, max_landlock: int) -> Level:
    if sys.platform != "linux":
        return Level(reason=f"{sys.platform} has no Landlock")
    if architecture() is None:
        return Level(reason="the system call filter knows 64-bit x86 and arm only")
    abi = min(_kernel.landlock_abi(), max_landlock)
    if abi < 1:
        return Level(reason="the kernel has no Landlock, or it is switched off")
    reasons = [] if namespaces else ["namespaces left out"]
    for with_namespaces in (True, False) if namespaces else (False,):
        for uid in (_OWN_UIDS, None) if _can_switch_user() else (None,):
            found = Level(abi, True, with_namespaces, uid)
            problem = _try(found)
            if problem is None:
                return replace(found, reason="; ".join(reasons))
            own_user = "and a user id per run" * (uid is not None)
            tried = ["with" if with_namespaces else "without", "namespaces", own_user]
            reasons.append(f"{' '.join(tried).strip()}: {problem}")
    return Level(reason="; ".join(reasons))


def _try(found: Level) -> str | None:
    """Why a level does not hold, or None."""
    with tempfile.TemporaryDirectory(prefix="llm-pg-trial-") as folder:
        os.chmod(folder, 0o755)  # so that it is the sandbox that refuses, and not these modes
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        os.chmod(secret, 0o666)
        try:
            result = launch.RunningSandbox(Job(_TRIAL, f"{secret}\n{os.getpid()}\n"), Limits(), found).finish()
        except SandboxError as error:
            return str(error)
    if result.stdout == "contained\n":
        return None
    return f"a trial run ended with {result.status!r}, {result.stdout[-200:]!r}, {result.stderr[-300:]!r}"


def _can_switch_user() -> bool:
    """Root may run code as a user id of its own if that id is mapped here and can reach the interpreter."""
    if os.geteuid() != 0:
        return False
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            spans = [tuple(map(int, line.split())) for line in file]
        if not any(first <= _OWN_UIDS and first + count > _OWN_UIDS + _MAX_PIDS for first, _, count in spans):
            return False
    return all(open_to_all(path) for path in (launch.interpreter(), *launch.readable_paths()) if os.path.exists(path))


def open_to_all(path: str) -> bool:
    """Whether the modes of a path and of all folders above it let any user read it."""
    path = os.path.realpath(path)
    if not os.stat(path).st_mode & stat.S_IROTH:
        return False
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
    return True
