"""The trainer's side of one run: start a supervisor, hand it the request, wait for its report.

The trainer may be large and threaded, so nothing of ours runs between fork and exec in it: the supervisor is a fresh
interpreter, and it alone forks.
"""

import contextlib
import marshal
import os
import select
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from llm_pg.processes import descendants
from llm_pg.sandbox import _cleanup
from llm_pg.sandbox.spec import Job, Level, Limits, Result, SandboxError
from llm_pg.sandbox.syscalls import architecture, filter_program

HERE = str(Path(__file__).parent)
_SHARED = str(Path(descendants.__file__).parent)
_START = "import sys; sys.path += sys.argv[1:]; import _supervisor; _supervisor.main()"
_PROGRAM = "main.py"
_LIBRARY_PATH = "LD_LIBRARY_PATH"
_GRACE_S = 30.0  # for starting and cleaning up on a machine that is busy training
_FIRST_FULLY_SCOPED_ABI = 6  # Landlock confines signals from here on


class RunningSandbox:
    """A started run. Call `finish` exactly once."""

    def __init__(self, job: Job, limits: Limits, level: Level, *, packages: bool = False, link: int = -1) -> None:
        """packages: the code may import what is installed beside this interpreter. link: a socket that becomes the
        program's descriptor 3. Raises SandboxError when nothing can be started, ValueError for a bad file name."""
        for name in job.files:
            if name != os.path.basename(name) or name in ("", ".", "..", _PROGRAM):
                raise ValueError(f"Files of a run have plain names other than {_PROGRAM}; got {name!r}.")
        self.limits = limits
        try:
            self.folder = tempfile.mkdtemp(prefix="llm-pg-run-")
            self.process = _start_supervisor(link)
        except OSError as error:
            self._remove()
            raise SandboxError(f"No supervisor could be started: {error}") from error
        try:
            self._send(_request(job, limits, level, self.folder, packages, link))
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """End the run now, unless it has ended; `finish` then tells what it did."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def finish(self) -> Result:
        """Wait for the end. Raises SandboxError when the sandbox, and not the code, failed."""
        try:
            report = self._receive(time.monotonic() + self.limits.wall_s + _GRACE_S)
        finally:
            self._end()
        if "failure" in report:
            raise SandboxError(f"The sandbox failed: {report['failure']}")
        return Result(
            status=report["status"],
            exit_code=report["exit_code"],
            signal=report["signal"],
            stdout=report["stdout"].decode(errors="replace"),
            stderr=report["stderr"].decode(errors="replace"),
            wall_s=report["wall_s"],
            cpu_s=report["cpu_s"],
            peak_mb=report["peak_kb"] / (1024 if sys.platform == "linux" else 1024 * 1024),
        )

    def _send(self, request: dict[str, Any]) -> None:
        payload = marshal.dumps(request)
        view = memoryview(len(payload).to_bytes(8, "big") + payload)
        assert self.process.stdin is not None
        try:
            while view:
                view = view[os.write(self.process.stdin.fileno(), view) :]
        except BrokenPipeError as error:
            raise SandboxError(f"The supervisor ended at its start: {self._last_words()}") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd, data = self.process.stdout.fileno(), bytearray()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "big"):
            if not poller.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise SandboxError("The supervisor gave no report in time.")
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                raise SandboxError(f"The supervisor ended without a report: {self._last_words()}")
            data += chunk
        return marshal.loads(data[8:])

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        words = (self.process.stderr.read() or b"").decode(errors="replace").strip()
        return f"exit code {self.process.returncode}, {words[-1000:]!r}"

    def _end(self) -> None:
        """Cut the lifeline, so that a supervisor that still runs ends its run and cleans up; then clean up after it."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError, AttributeError):
            _cleanup.empty(self.folder)
            _cleanup.remove_empty(self.folder)


def _start_supervisor(link: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [interpreter(), "-I", "-S", "-E", "-c", _START, HERE, _SHARED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=_library_path(),
        pass_fds=() if link < 0 else (link,),
        start_new_session=True,  # an interrupt at the terminal is the trainer's; the run ends by its lifeline
    )


def _request(job: Job, limits: Limits, level: Level, folder: str, packages: bool, link: int) -> dict[str, Any]:
    paths = readable_paths(packages)
    arch = architecture()
    confined = level.namespaces or level.landlock >= _FIRST_FULLY_SCOPED_ABI
    files = {_PROGRAM: job.code, **job.files}
    return {
        "level": {**asdict(level), "linux": sys.platform == "linux"},
        "limits": asdict(limits),
        "folder": folder,
        "files": {name: text.encode(errors="surrogatepass") for name, text in files.items()},
        "stdin": job.stdin.encode(errors="surrogatepass"),
        "link": link,
        "argv": [interpreter(), "-s", "-S", _PROGRAM],
        "env": _environment(folder, packages),
        "read": [*paths, "/dev/zero", "/dev/random", "/dev/urandom"],
        "execute": [interpreter(), *(path for path in paths if path in _library_folders())],
        "write": [folder, "/dev/null"],
        "filter": filter_program(arch, fork=limits.fork, signals=confined) if arch and level.seccomp else b"",
    }


def _environment(folder: str, packages: bool) -> dict[str, str]:
    """What the code sees: nothing of the trainer's, and a fixed hash seed, so that sets print in the same order."""
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MALLOC_ARENA_MAX": "2",  # an arena per thread would count against the address space
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **_library_path(),
    }
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join(package_folders())
    return environment


def _library_path() -> dict[str, str]:
    """Some interpreters do not find their own library without it."""
    return {_LIBRARY_PATH: os.environ[_LIBRARY_PATH]} if _LIBRARY_PATH in os.environ else {}


def _is_library_folder(path: str) -> bool:
    """Whether an entry of the library path is one by its name too: not the whole home that someone put there."""
    return os.path.isabs(path) and os.path.basename(os.path.normpath(path)).startswith("lib")


@cache
def interpreter() -> str:
    """The interpreter behind this one's virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def package_folders() -> tuple[str, ...]:
    """Where the packages of this environment are installed."""
    return tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


@cache
def _library_folders() -> tuple[str, ...]:
    own = os.path.join(sys.base_prefix, "lib")
    return tuple(dict.fromkeys((own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")))


@cache
def readable_paths(packages: bool = False) -> tuple[str, ...]:
    """What any run may read: the standard library, shared libraries, time zones; installed packages when asked."""
    stdlib = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    named = [path for path in os.environ.get(_LIBRARY_PATH, "").split(os.pathsep) if _is_library_folder(path)]
    system = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
    return tuple(
        dict.fromkeys((*_library_folders(), *stdlib, *named, *system, *(package_folders() if packages else ())))
    )
