"""Programs that try to get out of the sandbox, and the world they would change. Standard library only.

Also a program itself, so that the list can be run by an interpreter and a user that have no pytest:

    python escape_attempts.py                     # every attack at every level this user can have, as a JSON report
    python escape_attempts.py "first Landlock"    # at this level only
"""

import contextlib
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECRET = "correct-horse-battery-staple"

PREFIX = """
import ctypes, os, socket, sys, time
world = dict(line.split("=", 1) for line in sys.stdin.read().splitlines())
libc = ctypes.CDLL(None, use_errno=True)
trainer = int(world["trainer"])
def attempt(what, action, *arguments):
    try:
        value = action(*arguments)
    except Exception as error:
        print("held:", what, type(error).__name__, flush=True)
        return None
    print("ESCAPED:", what, repr(value)[:80], flush=True)
    return value
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@dataclass(frozen=True)
class Attack:
    """code runs after PREFIX. ends: the statuses that are right. limits: beside those of `QUICK`. control: without a
    sandbox it does escape, as a test of the attack itself shows."""

    name: str
    code: str
    ends: tuple[str, ...] = ("ok",)
    limits: dict[str, Any] = field(default_factory=dict)
    control: bool = False


QUICK = {"wall_s": 20.0, "cpu_s": 2.0, "memory_mb": 256, "disk_mb": 8, "file_mb": 8, "files": 200, "tasks": 16}
FORKS = {"fork": True}

# Processes that try to outlive the run. Each prints its number, so that the test can look for it.
_LINGER = "exec('while True: time.sleep(0.05)')"

ATTACKS = (
    # Leaving processes behind
    Attack(
        "a grandchild in a session of its own",
        f"""
if os.fork() == 0:
    attempt("setsid", os.setsid)
    if os.fork() == 0:
        {_LINGER}
    os._exit(0)
""",
        limits=FORKS,
    ),
    Attack(
        "a daemon by two forks that ignores signals and closes its files",
        f"""
import signal
if os.fork() == 0:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    attempt("new group", os.setpgid, 0, 0)
    if os.fork() == 0:
        os.closerange(0, 100)
        {_LINGER}
    os._exit(0)
""",
        limits=FORKS,
    ),
    Attack(
        "mayflies: each process forks its successor and dies",
        """
end = time.time() + 3
while time.time() < end:
    if os.fork():
        os._exit(0)
""",
        ends=("ok", "wall"),
        limits={**FORKS, "wall_s": 0.4},
    ),
    Attack(
        "a fork bomb",
        """
end = time.time() + 0.6
for generation in range(9):
    try:
        os.fork()
    except OSError:
        pass
while time.time() < end:
    time.sleep(0.01)
""",
        ends=("tasks", "ok"),  # ok where the kernel refuses the forks
        limits=FORKS,
    ),
    Attack(
        "a fork where none is allowed",
        """
attempt("fork", os.fork)
attempt("vfork through posix_spawn", os.posix_spawn, sys.executable, [sys.executable, "-c", "pass"], {})
""",
    ),
    Attack(
        "a thread bomb",
        """
import threading
threading.stack_size(1 << 16)
started = 0
try:
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
time.sleep(0.3)
print("ESCAPED: threads", started) if started > 900 else os._exit(0)
""",
        ends=("tasks", "ok"),
    ),
    # Reading
    Attack(
        "read a secret file",
        """
attempt("open", lambda: open(world["secret"]).read())
attempt("list its folder", os.listdir, world["folder"])
attempt("execute it", os.execv, world["secret"], ["secret"])
""",
        control=True,
    ),
    Attack(
        "read the trainer through /proc",
        """
for name in ("environ", "cmdline", "maps", "mem", "fd/0", "cwd/secret", "root/etc/passwd"):
    attempt(name, lambda: open(f"/proc/{trainer}/{name}", "rb").read(64))
    attempt("parent's " + name, lambda: open(f"/proc/{os.getppid()}/{name}", "rb").read(64))
""",
        control=True,
    ),
    Attack(
        "read the tests of another run",
        """
import glob, tempfile
for root in (os.path.dirname(os.getcwd()), "/tmp", "/var/tmp"):
    attempt("list " + root, os.listdir, root)
attempt("read the other run's file", lambda: open(world["other_run"]).read())
""",
        control=True,
    ),
    Attack(
        "inherited descriptors",
        """
for fd in range(3, 1024):
    try:
        os.fstat(fd)
    except OSError:
        continue
    print("ESCAPED: inherited", fd)
""",
    ),
    Attack(
        "inherited environment",
        """
import json
mine = {"HOME", "TMPDIR", "LANG", "LC_CTYPE", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS",
        "LD_LIBRARY_PATH", "PYTHONUTF8", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE"}
for name in set(os.environ) - mine:
    print("ESCAPED: inherited", name, os.environ[name])
""",
    ),
    # Writing
    Attack(
        "write outside the folder",
        """
attempt("create", open, world["folder"] + "/planted", "w")
attempt("append", open, world["secret"], "a")
attempt("truncate", open, world["secret"], "w")
attempt("truncate by path", os.truncate, world["secret"], 0)
attempt("mkdir", os.mkdir, world["folder"] + "/planted-folder")
attempt("rename", os.rename, world["secret"], world["secret"] + "2")
attempt("remove", os.remove, world["secret"])
""",
        control=True,
    ),
    Attack(
        "change a file's mode, owner, times and attributes",
        """
attempt("chmod", os.chmod, world["secret"], 0o777)
attempt("chown", os.chown, world["secret"], os.getuid(), os.getgid())
attempt("utime", os.utime, world["secret"], (1, 1))
attempt("xattr", os.setxattr, world["secret"], "user.planted", b"1")
library = os.open(os.__file__, os.O_RDONLY)
attempt("fchmod of the standard library", os.fchmod, library, 0o777)
attempt("futimes of the standard library", os.utime, library, (1, 1))
import fcntl
attempt("flock", fcntl.flock, library, fcntl.LOCK_EX)
""",
    ),
    Attack(
        "links out of the folder",
        """
attempt("symlink", os.symlink, world["secret"], "link")
attempt("read it", lambda: open("link").read())
attempt("hard link", os.link, world["secret"], "hard")
attempt("symlink to a folder", os.symlink, world["folder"], "up")
attempt("write through it", lambda: open("up/planted", "w"))
""",
        control=True,
    ),
    Attack(
        "descriptor file systems",
        """
for path in ("/proc/self/root" + world["secret"], "/proc/thread-self/root/etc/passwd", "/dev/fd/../environ",
             f"/proc/{trainer}/fd/0", f"/proc/{trainer}/fd/1", f"/proc/{os.getppid()}/fd/0", "/proc/1/fd/0"):
    attempt(path, open, path)
    attempt(path + " to write", open, path, "w")
os.dup2(0, 9)
attempt("write own stdin", os.write, 0, b"x")
attempt("own place in the memory killer's list", open, "/proc/self/oom_score_adj", "w")
""",
    ),
    Attack(
        "change directory or root, then open",
        """
os.chdir(world["folder"])
attempt("relative", lambda: open("secret").read())
os.chdir("/")
attempt("etc/passwd", lambda: open("etc/passwd").read())
attempt("chroot", os.chroot, ".")
folder = None
try:
    folder = os.open(world["folder"], os.O_PATH)
except OSError:
    pass
if folder is not None:
    attempt("openat", lambda: os.read(os.open("secret", os.O_RDONLY, dir_fd=folder), 64))
""",
        control=True,
    ),
    Attack(
        "shared memory",
        """
attempt("/dev/shm", open, "/dev/shm/planted-by-sandbox-test", "w")
attempt("System V", lambda: checked(libc.shmget(0x5EC4E7, 4096, 0o1600)))
attempt("message queue", lambda: checked(libc.mq_open(b"/planted-by-sandbox-test", 0o102, 0o600, None)))
attempt("memfd", os.memfd_create, "hidden")
""",
    ),
    # The network
    Attack(
        "TCP to a local port",
        """
attempt("connect", socket.create_connection, ("127.0.0.1", int(world["tcp"])), 1)
attempt("listen", socket.create_server, ("127.0.0.1", 0))
""",
        control=True,
    ),
    Attack(
        "UDP",
        """
attempt("send", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(world["udp"]))))
attempt("IPv6", socket.socket, socket.AF_INET6, socket.SOCK_DGRAM)
attempt("netlink", socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)
attempt("packets", socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
""",
        control=True,
    ),
    Attack(
        "unix sockets",
        """
def connect(address, kind=socket.SOCK_STREAM):
    socket.socket(socket.AF_UNIX, kind).connect(address)
attempt("abstract", connect, "\\0" + world["abstract"])
attempt("by path", connect, world["unix"])
attempt("datagram pair", socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
one, _ = socket.socketpair()
attempt("reconnected pair", one.connect, "\\0" + world["abstract"])
""",
        control=True,
    ),
    Attack(
        "io_uring, bpf, perf, keyrings, userfaultfd",
        """
for name, number in (("io_uring", 425), ("bpf", 321 if os.uname().machine == "x86_64" else 280),
                     ("perf", 298 if os.uname().machine == "x86_64" else 241),
                     ("keyring", 250 if os.uname().machine == "x86_64" else 219),
                     ("userfaultfd", 323 if os.uname().machine == "x86_64" else 282)):
    attempt(name, call, number, 0, ctypes.create_string_buffer(256), 0, 0, 0)
""",
    ),
    Attack(
        "system calls of the 32-bit kinds",
        """
import mmap
if os.uname().machine == "x86_64":
    attempt("x32 socket", call, 0x40000000 | 41, 1, 1, 0)
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("53b867010000bb01000000b901000000ba00000000cd805bc3"))  # socket(1, 1, 0) by int 0x80
    result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    print("held: i386" if result < 0 else "ESCAPED: i386", result)
""",
        ends=("ok", "signal"),
    ),
    # Other processes
    Attack(
        "signal the trainer",
        """
import signal
attempt("kill", os.kill, trainer, signal.SIGKILL)
attempt("tgkill", call, 234 if os.uname().machine == "x86_64" else 131, trainer, trainer, signal.SIGKILL)
attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(trainer), signal.SIGKILL))
attempt("group", os.killpg, trainer, signal.SIGKILL)
pipe, _ = os.pipe()
import fcntl
attempt("owner of a descriptor", fcntl.fcntl, pipe, fcntl.F_SETOWN, trainer)
""",
        control=True,
    ),
    # Success is what the kernel reports even when there was nobody whom it let be signalled: the world tells.
    Attack(
        "signal the supervisor",
        """
for number in (9, 15, 19, 2):
    attempt(number, lambda: os.kill(os.getppid() or trainer, number))
""",
    ),
    Attack(
        "signal everybody",
        """
for number in (9, 15, 19):
    try:
        os.kill(-1, number)
    except OSError:
        pass
""",
        ends=("ok", "signal"),
    ),
    Attack(
        "trace the trainer, read and write its memory",
        """
attempt("attach", lambda: checked(libc.ptrace(16, trainer, 0, 0)))
attempt("seize", lambda: checked(libc.ptrace(0x4206, trainer, 0, 0)))
buffer = ctypes.create_string_buffer(16)
vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 16)
attempt("read memory", lambda: checked(libc.process_vm_readv(trainer, vector, 1, vector, 1, 0)))
attempt("take a descriptor", lambda: call(438, call(434, trainer, 0), 0, 0))
""",
    ),
    Attack(
        "limits, priority and processors",
        """
import resource
attempt("trainer's limits", resource.prlimit, trainer, resource.RLIMIT_FSIZE, (0, 0))
attempt("renice the trainer", os.setpriority, os.PRIO_PROCESS, trainer, 19)
attempt("renice the user", os.setpriority, os.PRIO_USER, os.getuid(), 19)
attempt("pin the trainer", os.sched_setaffinity, trainer, {0})
attempt("schedule the trainer", os.sched_setscheduler, trainer, os.SCHED_IDLE, os.sched_param(0))
attempt("own nice", os.nice, -5)
for name in ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    attempt("raise " + name, resource.setrlimit, kind, (hard + 1, hard + 1))
""",
    ),
    Attack(
        "new namespaces, mounts, another user",
        """
attempt("user namespace", lambda: checked(libc.unshare(0x10000000)))
attempt("network namespace", lambda: checked(libc.unshare(0x40000000)))
attempt("join", lambda: checked(libc.setns(0, 0)))
attempt("mount", lambda: checked(libc.mount(b"none", b".", b"tmpfs", 0, None)))
attempt("root", os.setuid, 0) if os.getuid() else attempt("another user", os.setuid, 12345)
attempt("clone into a namespace", call, 56 if os.uname().machine == "x86_64" else 220, 0x10000011, 0, 0, 0, 0)
attempt("host name", socket.sethostname, "planted")
attempt("outlive the supervisor", lambda: checked(libc.prctl(1, 0, 0, 0, 0)))
attempt("another program", os.execv, "/bin/sh", ["sh", "-c", "echo ESCAPED: a shell"])
""",
    ),
    # Using up
    Attack("200 MB on stdout", "for _ in range(200): os.write(1, b'x' * (1 << 20))\n", ends=("output",)),
    Attack("200 MB on stderr", "for _ in range(200): os.write(2, b'x' * (1 << 20))\n", ends=("output",)),
    Attack(
        "a file of 300 MB",
        """
with open("big", "wb") as file:
    for _ in range(300):
        file.write(bytes(1 << 20))
print("ESCAPED: 300 MB")
""",
        ends=("error", "disk"),
    ),
    Attack(
        "many files",
        """
for number in range(100_000):
    open(f"file-{number}", "w").close()
print("ESCAPED: 100,000 files")
""",
        ends=("error", "disk"),
    ),
    Attack(
        "folders in folders",
        """
for _ in range(20_000):
    os.mkdir("d", 0o700)
    os.chdir("d")
print("ESCAPED: 20,000 levels")
""",
        ends=("error", "disk"),
    ),
    Attack(
        "open files that no folder shows",
        """
kept = []
for number in range(40):
    kept.append(open("hidden", "wb", buffering=0))
    os.unlink("hidden")
    for _ in range(7):
        kept[-1].write(bytes(1 << 20))
    time.sleep(0.005)
print("ESCAPED: 280 MB")
""",
        ends=("error", "disk"),
    ),
    Attack("1 GB of memory", "block = bytearray(1 << 30)\nprint('ESCAPED: 1 GB')\n", ends=("error",)),
    Attack("a loop without end", "while True: pass\n", ends=("cpu",), limits={"cpu_s": 1.0}),
    Attack("a sleep without end", "time.sleep(1e6)\n", ends=("wall",), limits={"wall_s": 0.4}),
    Attack(
        "deaf to every signal, with its output closed",
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
os.close(1); os.close(2)
while True: time.sleep(1)
""",
        ends=("wall",),
        limits={"wall_s": 0.4},
    ),
    Attack("a crash of the interpreter", "ctypes.string_at(0)\n", ends=("signal",)),
)


class World:
    """What the attacks aim at. It belongs to the user who runs the tests, as a trainer does."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "outside"
        self.folder.mkdir(mode=0o777)
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o666)
        self.other_run = root / "llm-pg-run-other"
        self.other_run.mkdir(mode=0o755)
        (self.other_run / "tests.json").write_text(SECRET)
        self._start_trainer()
        self.before = self.look()
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract, self.unix = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.abstract_name = f"llm-pg-{os.getpid()}-{id(self)}"
        self.abstract.bind("\0" + self.abstract_name)
        self.unix_path = root / "socket"
        self.unix.bind(str(self.unix_path))
        self.unix_path.chmod(0o777)
        for listener in (self.abstract, self.unix):
            listener.listen()
        for end in (self.tcp, self.udp, self.abstract, self.unix):
            end.setblocking(False)

    def _start_trainer(self) -> None:
        self.trainer = subprocess.Popen(
            ["/bin/sleep", "600"],
            env={"TOKEN": SECRET},
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def close(self) -> None:
        self.trainer.kill()
        self.trainer.communicate()
        for end in (self.tcp, self.udp, self.abstract, self.unix):
            end.close()

    def address(self) -> str:
        """The attack's standard input."""
        facts = {
            "trainer": self.trainer.pid,
            "secret": self.secret,
            "folder": self.folder,
            "other_run": self.other_run / "tests.json",
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "abstract": self.abstract_name,
            "unix": self.unix_path,
        }
        return "".join(f"{name}={value}\n" for name, value in facts.items())

    def look(self) -> dict[str, Any]:
        """Everything that an attack must leave as it was."""
        shared = [name for place in ("/dev/shm", "/dev/mqueue") if os.path.isdir(place) for name in os.listdir(place)]
        return {
            "secret": self._look_at_secret(),
            "folder": sorted(os.listdir(self.folder)),
            "library": os.stat(os.__file__)[:9],
            **self._look_at_trainer(),
            "own priority": os.getpriority(os.PRIO_PROCESS, 0),
            "planted": [name for name in shared if "planted" in name],
            "System V": "5ec4e7" in _read("/proc/sysvipc/shm") or str(0x5EC4E7) in _read("/proc/sysvipc/shm"),
            "host": socket.gethostname(),
        }

    def _look_at_secret(self) -> tuple[Any, ...]:
        try:
            facts = os.stat(self.secret)
        except FileNotFoundError:
            return ("gone",)
        return self.secret.read_text(), stat.filemode(facts.st_mode), facts.st_uid, facts.st_mtime_ns

    def _look_at_trainer(self) -> dict[str, Any]:
        pid = self.trainer.pid
        if self.trainer.poll() is not None:
            return {"trainer state": "ended"}
        return {
            "trainer state": _state(pid),
            "trainer limits": [resource.prlimit(pid, kind) for kind in range(16)],
            "trainer priority": (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid)),
            "trainer policy": os.sched_getscheduler(pid),
        }

    def contacts(self) -> list[str]:
        """Who of the listeners was reached."""
        reached = []
        for name, accept in (("tcp", self.tcp.accept), ("abstract", self.abstract.accept), ("unix", self.unix.accept)):
            with contextlib.suppress(BlockingIOError):
                accept()[0].close()
                reached.append(name)
        with contextlib.suppress(BlockingIOError):
            self.udp.recv(16)
            reached.append("udp")
        return reached


def _state(pid: int) -> str:
    """Of the trainer: asleep or running are the same; stopped, traced or dead are not."""
    try:
        state = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]
    except IndexError:
        return "gone"
    return "alive" if state in "SRD" else state


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""


def left_over(folder: str) -> list[str]:
    """Processes that run, or work in, the folder of a run; and such folders."""
    found = [name for name in os.listdir(folder) if name.startswith("llm-pg-")]
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/cwd").startswith(folder + "/llm-pg-run-"):
                    found.append(f"process {name}")
    return found


@dataclass(frozen=True)
class Outcome:
    """What an attack achieved: nothing, if `escapes`, `changes`, `contacts` and `left` are empty."""

    name: str
    status: str
    seconds: float
    escapes: list[str]
    changes: list[str]
    contacts: list[str]
    left: list[str]
    output: str

    @property
    def held(self) -> bool:
        return not (self.escapes or self.changes or self.contacts or self.left)


def carry_out(attack: Attack, level: Any, world: World, runs: str) -> Outcome:
    """Run one attack at a level, and look what became of the world. runs: the folder for the runs' folders."""
    from llm_pg import sandbox

    limits = sandbox.Limits(**{**QUICK, **attack.limits})
    started = time.monotonic()
    with runs_in(runs):
        result = sandbox.run(PREFIX + attack.code, world.address(), limits=limits, level=level, allow_uncontained=True)
    seconds = time.monotonic() - started
    after = world.look()
    output = result.stdout[:5000] + result.stderr[-2000:]
    escapes = [line for line in output.splitlines() if line.startswith("ESCAPED")]
    if SECRET in output:
        escapes.append("the secret was printed")
    changes = [f"{name}: {world.before[name]} -> {after[name]}" for name in after if after[name] != world.before[name]]
    return Outcome(
        attack.name, result.status, seconds, escapes, changes, world.contacts(), left_over(runs), output[-3000:]
    )


@contextlib.contextmanager
def runs_in(folder: str) -> Iterator[None]:
    """Let the runs' folders be made in `folder`."""
    before = tempfile.tempdir
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def levels() -> dict[str, Any]:
    """The levels to attack, by name: the highest, without namespaces, and with the first Landlock alone."""
    from llm_pg import sandbox

    return {
        "namespaces": sandbox.level(),
        "Landlock": sandbox.level(namespaces=False),
        "first Landlock": sandbox.level(namespaces=False, max_landlock=1),
    }


def main() -> None:
    report: dict[str, Any] = {"user": os.getuid(), "python": sys.version.split()[0], "outcomes": []}
    with tempfile.TemporaryDirectory() as root:
        runs = os.path.join(root, "runs")
        os.mkdir(runs, mode=0o755)
        os.chmod(root, 0o755)
        os.chmod(runs, 0o1777)
        world = World(Path(root))
        try:
            for name, level in levels().items():
                wanted = level.contained and name in (sys.argv[1:] or levels())
                for attack in ATTACKS if wanted else ():
                    outcome = asdict(carry_out(attack, level, world, runs))
                    right = outcome["status"] in attack.ends
                    report["outcomes"].append({"level": name, "facts": str(level), "right_end": right, **outcome})
        finally:
            world.close()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
