"""Two network namespaces joined by a wire: two hosts with addresses, names and loopbacks of their own.

The wire is a veth pair, or, to delay packets where the kernel has no netem, a process that carries them between two tun
devices. Files are shared, as a folder is that all machines see.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NUMBER = itertools.count()


def refusal() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid():
        return "only root can make network namespaces"
    name = f"probe{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "network namespaces need the command ip (iproute2)"
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return None


class TwoHosts:
    """A context manager; `addresses` has those of the two hosts, 0 and 1.

    Args:
        folder: for the output of what runs there.
        delay: seconds that a packet takes from one to the other.
    """

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.folder, self.delay = folder, delay
        own = f"{os.getpid()}n{next(_NUMBER)}"
        self.names = (f"llmpg{own}a", f"llmpg{own}b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.device = "wire0"
        self._end = contextlib.ExitStack()

    def __enter__(self) -> TwoHosts:
        with contextlib.ExitStack() as stack:
            for name in self.names:
                _run("ip", "netns", "add", name)
                stack.callback(_run, "ip", "netns", "del", name)
                stack.callback(_to_all, name, signal.SIGKILL)
                stack.enter_context(_names_of(name))
            if self.delay:
                stack.enter_context(_relay(self.names, self.device, self.delay))
            else:
                one, two = (("name", self.device, "netns", name) for name in self.names)
                _run("ip", "link", "add", *one, "type", "veth", "peer", *two)
            for name, address in zip(self.names, self.addresses, strict=True):
                _run("ip", "-n", name, "link", "set", "lo", "up")
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", self.device)
                _run("ip", "-n", name, "link", "set", self.device, "up")
            self._end = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def start(
        self, host: int, command: Sequence[str], env: dict[str, str] | None = None, log: str | None = None
    ) -> subprocess.Popen[bytes]:
        """A process on a host; what it prints is in `folder/<log>`, by default host0.log or host1.log."""
        name = self.names[host]
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        with (self.folder / (log or f"host{host}.log")).open("wb") as file:
            return subprocess.Popen(
                [*inside, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def output(self, host: int) -> str:
        return (self.folder / f"host{host}.log").read_text()

    def cut(self, host: int = 1) -> None:
        """Takes the wire of a host away: no packet comes or goes, and neither host is notified."""
        _run("ip", "-n", self.names[host], "link", "set", self.device, "down")

    def mend(self, host: int = 1) -> None:
        _run("ip", "-n", self.names[host], "link", "set", self.device, "up")

    def signal(self, host: int, number: int) -> None:
        """To every process of a host."""
        _to_all(self.names[host], number)


def _to_all(name: str, number: int) -> None:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for process in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), number)


@contextlib.contextmanager
def _names_of(name: str) -> Iterator[None]:
    """The file of names that a host sees, in which its own is a loopback address, as Debian's installer writes it."""
    folder = Path("/etc/netns") / name
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    try:
        yield
    finally:
        (folder / "hosts").unlink()
        folder.rmdir()


@contextlib.contextmanager
def _relay(names: Sequence[str], device: str, delay: float) -> Iterator[None]:
    made = [f"t{os.getpid()}{end}" for end in "ab"]
    process = subprocess.Popen([sys.executable, __file__, str(delay), *made], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for name, link in zip(names, made, strict=True):
            _run("ip", "link", "set", link, "netns", name, "name", device)
        yield
    finally:
        process.kill()
        process.wait()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _tun(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle


def carry(delay: float, names: Sequence[str]) -> None:
    """Carries packets between two tun devices, each `delay` seconds late, for ever."""
    ends = [_tun(name) for name in names]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    print("ready", flush=True)
    under_way: list[tuple[float, int, int, bytes]] = []
    for number in itertools.count():
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(end, 65536):
                    heapq.heappush(under_way, (time.monotonic() + delay, number, other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            with contextlib.suppress(OSError):  # a device that is down takes none
                os.write(under_way[0][2], under_way[0][3])
            heapq.heappop(under_way)


if __name__ == "__main__":
    carry(float(sys.argv[1]), sys.argv[2:])
