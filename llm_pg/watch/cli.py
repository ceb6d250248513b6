"""The command `llm-pg watch`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..config import ConfigError

if TYPE_CHECKING:  # the server and the page's template cost time that a command line has not
    from .server import WatchServer
    from .state import Watched

PORT = 8765
TRIED_PORTS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve the page of runs and keep it up to date while they go on. Reads only; Ctrl-C ends it."
    parser.add_argument("runs", nargs="+", help="folders of runs, which may begin later")
    parser.add_argument("--port", type=int, help=f"0 = any free one; left out = the first free one from {PORT} on")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="listen at this address; any but the loopback's needs the token that is then printed (default 127.0.0.1: "
        "this machine only)",
    )
    parser.add_argument("--token", action="store_true", help="ask for a token on this machine too, where others use it")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 0."""
    from ..run.logs.redact import Redactor
    from .server import is_loopback
    from .state import Watched

    host = "127.0.0.1" if arguments.host == "localhost" else arguments.host
    Redactor().guard_process()
    watched = Watched([Path(run) for run in arguments.runs])
    token = secrets.token_urlsafe(24) if arguments.token or not is_loopback(host) else None
    with _listen(watched, host, arguments.port, token) as server:
        for line in lines(server):
            print(line, flush=True)
        threading.Thread(target=watched.follow, daemon=True).start()
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, _interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)
        watched.stop()
    print("\nStopped watching.")
    return 0


def lines(server: WatchServer) -> list[str]:
    """What is printed of a server that listens: the runs, the address, and how it is reached."""
    from .server import is_loopback
    from .state import HEADS, kind_of

    port = server.server_port
    here = is_loopback(server.host)
    name = server.host if here or server.host not in ("0.0.0.0", "::") else socket.gethostname()
    query = f"?token={server.token}" if server.token else ""
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/{query}"
    out = [f"{folder}: {HEADS[kind_of(folder)]}" for folder in server.watched.folders]
    out.append(f"Page: {address}")
    if here:
        forward = f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"
        out.append(f"From another machine: `{forward}` there, then the same address.")
    else:
        out.append("Whoever has this address can read the page, and it travels unencrypted: ssh forwarding is safer.")
    return [*out, "Ctrl-C ends it."]


def _listen(watched: Watched, host: str, port: int | None, token: str | None) -> WatchServer:
    from .server import WatchServer

    if port is not None:
        return WatchServer(watched, host, port, token)
    for number in range(PORT, PORT + TRIED_PORTS):
        with contextlib.suppress(ConfigError):
            return WatchServer(watched, host, number, token)
    return WatchServer(watched, host, 0, token)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
