"""One run: set up, start, watch, end, report. Its own process, single-threaded, alone with the code it watches.

It reads one request from standard input and writes one report to standard output, both a length and a marshalled dict
(both ends are ours; marshal needs no import, and starting an interpreter is most of what a run costs). Standard input
stays open as a lifeline: when it closes, the trainer is gone, and the run is ended and cleaned up at once.
"""

from __future__ import annotations

import _signal  # built in; `signal` imports enum, which takes longer than all the rest
import fcntl
import marshal
import os
import resource
import select
import time

import _cleanup  # type: ignore[import-not-found]  # beside this file: the package itself is not imported here
import _kernel  # type: ignore[import-not-found]
import descendants  # type: ignore[import-not-found]  # of llm_pg/processes

TYPE_CHECKING = False  # `typing` itself would take as long to import as all of this takes to run
if TYPE_CHECKING:
    from typing import Any, NoReturn

_SIGKILL, _SIGTERM = 9, 15
_LOOK_S = 0.02
_SLACK_TASKS = 256  # the trainer may start threads of its own under the same user id during the run
_OPEN_FILES = 64
_STACK = 8 << 20
_HIGH = 100  # the program's descriptors are gathered up here before they become 0, 1, 2 and 3
_CHUNK = 1 << 16

_asked_to_stop: list[int] = []  # by SIGTERM, from what ends the trainer's reward workers: as when the lifeline closes


def main() -> None:
    """Serve the one request."""
    _signal.signal(_SIGTERM, lambda number, frame: _asked_to_stop.append(number))
    request = marshal.loads(_read_frame(0))
    try:
        report = _serve(request)
    except Exception as error:  # noqa: BLE001  the trainer raises it
        report = {"failure": f"{type(error).__name__}: {error}"}
    payload = marshal.dumps(report)
    payload = len(payload).to_bytes(8, "big") + payload
    try:
        while payload:
            payload = payload[os.write(1, payload) :]
    except BrokenPipeError:
        pass  # the trainer is gone: nobody to tell, and everything is cleaned up
    os._exit(0)  # spares taking the interpreter down


def _read_frame(fd: int) -> bytes:
    data = b""
    while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "big"):
        chunk = os.read(fd, 16 * _CHUNK)
        if not chunk:
            raise SystemExit("The request was cut short.")
        data += chunk
    return data[8:]


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    level, limits, folder = request["level"], request["limits"], request["folder"]
    if level["linux"]:
        descendants.become_subreaper()
    if level["uid"] is not None:
        uid = level["uid"] + os.getpid()
        os.chown(folder, uid, uid)
        _kernel.become_user(uid)
    if level["namespaces"]:
        _kernel.enter_namespaces(folder, limits["disk_mb"], limits["files"] + len(request["files"]) + 1)
    try:
        for name, content in request["files"].items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        return _Run(request).watch()
    finally:
        if level["namespaces"]:
            _kernel.leave_mount(folder)
        else:
            _cleanup.empty(folder)
        _cleanup.remove_empty(folder)


class _Run:
    """The program, from its start to the death of its last descendant."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.limits, self.level, self.folder = request["limits"], request["level"], request["folder"]
        self.own_files = len(request["files"])
        self.own_bytes = sum(map(len, request["files"].values())) + len(request["stdin"]) + (self.own_files + 1 << 12)
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        status, status_end = os.pipe()
        descriptors = [_readable(request["stdin"]), out_end, err_end]
        if request["link"] >= 0:
            os.set_inheritable(request["link"], False)
            descriptors.append(request["link"])
        max_tasks = _max_tasks(self.limits["tasks"]) if self.level["linux"] else None
        self.pid = os.fork()
        if self.pid == 0:
            _become_program(request, descriptors, status_end, max_tasks)
        for fd in (*descriptors, status_end):
            os.close(fd)
        failure = os.read(status, _CHUNK)  # nothing and the end of the pipe once the interpreter is started
        if failure:
            os.waitpid(self.pid, 0)
            raise OSError(failure.decode(errors="replace"))
        self.out, self.err = out, err
        self.kept = {out: bytearray(), err: bytearray()}
        self.end: tuple[int, int, resource.struct_rusage] | None = None
        self.started = time.monotonic()

    def watch(self) -> dict[str, Any]:
        ended_by = self._wait()
        wall_s = time.monotonic() - self.started
        # The leader is not reaped yet, so the group's number is still its own; a zombie does not mind being killed.
        # The filter keeps every descendant in the group, and the kernel signals a group between forks, not during one.
        _kill_group(self.pid)
        _, status, usage = self.end or os.wait4(self.pid, 0)
        if self.level["linux"]:
            descendants.kill()  # whatever left the process group, which only code without a filter can
        for fd in self.kept:
            os.set_blocking(fd, False)
            while ended_by is None and (more := self._read(fd)) is not None:
                ended_by = None if more else "output"
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        cpu_s = usage.ru_utime + usage.ru_stime
        # The kernel's limit counts ticks and usage counts time: on a busy virtual machine they differ much.
        if ended_by is None and number == _SIGKILL and cpu_s > 0.5 * self.limits["cpu_s"]:
            ended_by = "cpu"
        exit_code = os.WEXITSTATUS(status) if ended_by is None and number is None else None
        own = "signal" if number is not None else "error" if exit_code else "ok"
        return {
            "status": ended_by or own,
            "exit_code": exit_code,
            "signal": number if ended_by is None else None,
            "stdout": bytes(self.kept[self.out]),
            "stderr": bytes(self.kept[self.err]),
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "peak_kb": usage.ru_maxrss,
        }

    def _wait(self) -> str | None:
        """Collect output until the program ends by itself (None) or is to be ended (by what)."""
        poller = select.poll()
        end = os.pidfd_open(self.pid) if self.level["linux"] else -1
        for fd in (0, *self.kept, *([end] if end >= 0 else [])):
            poller.register(fd, select.POLLIN)
        deadline = self.started + self.limits["wall_s"]
        next_look = self.started + _LOOK_S
        while (now := time.monotonic()) < deadline:
            if now >= next_look:
                if over := self._over_limit():
                    return over
                next_look = now + _LOOK_S
            ready = [fd for fd, _ in poller.poll(1000 * min(deadline - now, _LOOK_S))]
            for fd in self.kept:
                if fd in ready and (more := self._read(fd)) is not True:
                    if more is False:
                        return "output"
                    poller.unregister(fd)
            if 0 in ready or _asked_to_stop:
                return "stopped"
            if end in ready or (end < 0 and self._reap()):
                return None
        return "wall"

    def _reap(self) -> bool:
        """Where there is no descriptor for a process."""
        end = os.wait4(self.pid, os.WNOHANG)
        self.end = end if end[0] else None
        return self.end is not None

    def _read(self, fd: int) -> bool | None:
        """Take what is in the pipe. None: nothing is left. False: more than the limit has come."""
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return None
        if not chunk:
            return None
        kept, limit = self.kept[fd], 1024 * self.limits["output_kb"]
        kept += chunk[: limit - len(kept) + 1]
        within = len(kept) <= limit
        del kept[limit:]
        return within

    def _over_limit(self) -> str | None:
        """The limits that the kernel does not keep for us at every level."""
        if not self.level["linux"]:
            return None
        pids = [self.pid, *(descendants.of(self.pid) if self.limits["fork"] else ())]
        if sum(_num_threads(pid) for pid in pids) > self.limits["tasks"]:
            return "tasks"
        if self.level["namespaces"]:
            return None  # its file system has these limits
        max_files = self.limits["files"] + self.own_files
        num_bytes, num_files = _cleanup.usage(self.folder, max_files)
        num_bytes += _cleanup.unlinked_bytes(self.pid) - self.own_bytes
        return "disk" if num_bytes > self.limits["disk_mb"] << 20 or num_files > max_files else None


def _become_program(request: dict[str, Any], descriptors: list[int], status: int, max_tasks: int | None) -> NoReturn:
    """In the child: give everything up, then become the interpreter. A failure is reported through `status`."""
    try:
        level, limits, folder = request["level"], request["limits"], request["folder"]
        os.setsid()
        os.chdir(folder)
        status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        gathered = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in descriptors]
        for fd, source in enumerate(gathered):
            os.dup2(source, fd, inheritable=True)
        os.closerange(len(gathered), _HIGH)
        _limit_resources(limits, max_tasks, strict=level["linux"])
        if level["linux"]:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # when memory runs out, this goes before the trainer
            _kernel.drop_privileges()
            descendants.die_with_parent()
        if level["landlock"]:
            _kernel.landlock(level["landlock"], request["read"], request["execute"], request["write"])
        if level["seccomp"]:
            _kernel.filter_system_calls(request["filter"])
        os.execve(request["argv"][0], request["argv"], request["env"])
    except BaseException as error:  # noqa: BLE001  this is the forked child: nothing may go on from here
        os.write(status, f"{type(error).__name__}: {error}".encode())
    os._exit(127)


def _limit_resources(limits: dict[str, Any], max_tasks: int | None, *, strict: bool) -> None:
    cpu_s = max(1, -int(-limits["cpu_s"] // 1))
    wanted = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_FSIZE": min(limits["file_mb"], limits["disk_mb"]) << 20,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_STACK": _STACK,
        "RLIMIT_AS": limits["memory_mb"] << 20,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    if max_tasks is not None:
        wanted["RLIMIT_NPROC"] = max_tasks
    for name, value in wanted.items():
        if hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (OSError, ValueError):
                if strict:  # other systems know some names only; there, no promise is made
                    raise


def _readable(data: bytes) -> int:
    """A descriptor from which the program reads `data`, and which it cannot write."""
    if hasattr(os, "memfd_create"):
        writable = os.memfd_create("stdin")
        path = f"/proc/self/fd/{writable}"
    else:
        import tempfile

        writable, path = tempfile.mkstemp()
    with open(writable, "wb") as file:
        file.write(data)
        file.flush()
        descriptor = os.open(path, os.O_RDONLY)
    if not path.startswith("/proc/"):
        os.unlink(path)
    return descriptor


def _max_tasks(tasks: int) -> int:
    """RLIMIT_NPROC counts all tasks of the user id on the machine, so those there already come on top."""
    uid, others = os.getuid(), 0
    if uid == 0:
        return tasks  # the kernel does not hold root to it; _over_limit looks
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                others += _num_threads(int(name))
        except FileNotFoundError:
            continue  # ended while we looked
    return tasks + others + (_SLACK_TASKS if others > 1 else 0)


def _num_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, _SIGKILL)
    except (PermissionError, ProcessLookupError):
        return  # nobody is left in it, or dead ones only
