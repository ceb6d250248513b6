"""The network between the machines of a run: the device that messages take, and what ends when it is gone.

torch's gloo takes the address that the machine's own name stands for. That is a loopback address where the name is in
/etc/hosts as most installers of Linux write it, and no other machine reaches that.

A machine that is gone, or a cable, sends nothing: a rank that waits for a message would wait for torch's limit (half an
hour). The system's own probes tell it apart from a rank that is only slow, whose system answers for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Mapping

import psutil
import torch.distributed as dist

INTERFACE = "GLOO_SOCKET_IFNAME"
UNREACHABLE_S = 60  # that a machine answers no probe until its connections end
_IDLE_S, _BETWEEN_S = 15, 5
_CONNECTIONS = "/dev/fd"
_THEIRS = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
_CAUSE = re.compile(r"\[((?:\d{1,3}\.){3}\d{1,3}|[0-9a-fA-F:]*)\][:\d$]*: ([^.\n]+)")
_CLOSED = re.compile(r"connection closed by peer \[(.*?)\]", re.IGNORECASE)


def choose_interface(environment: Mapping[str, str] = os.environ) -> str | None:
    """The network device by which this machine reaches the first of several; None where gloo needs no word.

    Args:
        environment: of a process that a launcher started. What it says of gloo's device already is left alone.
    """
    world, local = (environment.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    first = environment.get("MASTER_ADDR", "")
    if environment.get(INTERFACE) or world == local or not first:
        return None
    try:
        family, _, _, _, address = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the system only chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return None


def end_with_the_machine(seconds: float | None = None) -> int:
    """Makes the connections of this process end once the machine at the other end has answered nothing for a while.

    A rank that is only slow is no such case: its system answers.

    Args:
        seconds: of silence; None = `UNREACHABLE_S`.

    Returns:
        How many connections there were.
    """
    seconds, count = UNREACHABLE_S if seconds is None else seconds, 0
    if not hasattr(socket, "TCP_KEEPIDLE"):
        return 0
    for handle in _sockets():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(handle)) as connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            connection.getpeername()  # raises where it waits for others
            watch(connection, seconds)
            count += 1
    return count


def watch(connection: socket.socket, seconds: float) -> None:
    """Lets the system ask the other end's whether it is there, and end the connection after `seconds` of silence."""
    idle, between = max(1, min(_IDLE_S, int(seconds / 3))), max(1, min(_BETWEEN_S, int(seconds / 6)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, round((seconds - idle) / between)))
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of what was sent and not acknowledged
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def _sockets() -> list[int]:
    try:
        handles = [int(name) for name in os.listdir(_CONNECTIONS)]
    except OSError:
        return []
    found = []
    for handle in handles:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(handle).st_mode):
                found.append(handle)
    return found


def lost_connection(error: BaseException) -> str | None:
    """What became of the connection to another rank, where that is what `error` is about; else None.

    gloo raises a bare RuntimeError, with the source file in its text.
    """
    text = str(error)
    if not isinstance(error, _THEIRS) and not (type(error) is RuntimeError and "gloo/transport" in text):
        return None
    closed, named = _CLOSED.search(text), _CAUSE.search(text)
    if closed:
        return f"{closed[1].partition(']')[0]}: connection closed by the other end"
    if named:
        return f"{named[1]}: {named[2].strip().lower()}"
    return text.partition("\n")[0][:300]
