"""The server of `llm-pg watch`: four addresses, read-only, for this machine unless a token is asked for."""

from __future__ import annotations

import base64
import gzip
import hashlib
import ipaddress
import json
import logging
import re
import secrets
import socket
import socketserver
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..config import ConfigError
from .state import Watched, waiting_page

log = logging.getLogger("llm_pg.watch")
BEAT_S = 15.0  # between two signs of life in a stream of events
REQUEST_S = 30.0  # for a request to arrive whole
MOST_STREAMS = 64
LEAST_COMPRESSED = 10_000  # bytes
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class WatchServer(ThreadingHTTPServer):
    """Serves what `watched` shows.

    Args:
        watched: the runs. host: address to listen at. port: 0 = a free one.
        token: that every request must bring; None = none. Any address but the loopback needs one.

    Raises:
        ConfigError: the address cannot be listened at.
    """

    daemon_threads = True

    def __init__(self, watched: Watched, host: str, port: int, token: str | None) -> None:
        if token is None and not is_loopback(host):
            raise ValueError("an address other than the loopback needs a token")
        self.watched, self.host, self.token = watched, host, token
        self.streams = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Cannot listen at {host}, port {port}: {error}. Give another --port, or --port 0 for a free one."
            ) from None

    def server_bind(self) -> None:
        # HTTPServer would ask for the host's name in the network, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("A connection from %s ended.", client_address[0], exc_info=True)

    def allows_host(self, header: str | None) -> bool:
        """Whether a request names this machine as a person would. A page of another site that made its own name lead
        here (DNS rebinding) names itself."""
        name = re.sub(r":\d+$", "", header or "").strip("[]").lower()
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            own = {socket.gethostname().lower(), self.host.lower()} if self.token else set()
            return name in {"localhost", *own}
        return address.is_loopback or self.token is not None

    def allows_token(self, given: str) -> bool:
        return self.token is None or secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llm-pg", ""
    timeout = REQUEST_S
    server: WatchServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self.server.allows_host(self.headers.get("Host")):
            return self._text(403, "This server answers to its address and to localhost, and to no other name.")
        token = parse_qs(address.query).get("token", [""])[0]
        if not self.server.allows_token(token):
            return self._text(403, "The token is missing or wrong: open the address that `llm-pg watch` printed.")
        watched = self.server.watched
        try:
            match address.path:
                case "/":
                    self._page(watched.page())
                case "/now":
                    self._page(watched.now())
                case "/completions":
                    rows = watched.completions()
                    self._send(404 if rows is None else 200, rows or b"{}", "application/json")
                case "/events":
                    self._events()
                case _:
                    self._text(404, "There is nothing at this address.")
        except (ConfigError, OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise  # the browser is gone
            self._text(503, f"The run cannot be read at this moment ({type(error).__name__}). Load the page again.")
            log.warning("The page could not be made.", exc_info=True)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # what the request carries is not read
        self._text(405, "This server is read-only.")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _page(self, page: bytes | None) -> None:
        if page is None:
            text = waiting_page()
            policy = f"default-src 'none'; connect-src 'self'; {_hashes(text)}; frame-ancestors 'none'"
            self._send(200, text.encode(), "text/html; charset=utf-8", policy)
        else:  # it names its own script and style
            self._send(200, page, "text/html; charset=utf-8", "frame-ancestors 'none'")

    def _text(self, code: int, text: str) -> None:
        self._send(code, text.encode(), "text/plain; charset=utf-8", "default-src 'none'; frame-ancestors 'none'")

    def _send(self, code: int, body: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(code)
        if len(body) > LEAST_COMPRESSED and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 5)
            self.send_header("Content-Encoding", "gzip")
        for name, value in {**HEADERS, "Content-Security-Policy": policy, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _events(self) -> None:
        """The state now and whenever it changes, as server-sent events, until browser or server leave."""
        server, watched = self.server, self.server.watched
        if server.streams >= MOST_STREAMS:
            return self._text(503, "Too many pages are open.")
        self.close_connection = True
        self.send_response(200)
        for name, value in {
            **HEADERS,
            "Content-Type": "text/event-stream; charset=utf-8",
            "Connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        server.streams += 1
        try:
            sent = -1
            while not watched.stopped.is_set():
                state = watched.state
                if state.version != sent:
                    self.wfile.write(f"event: state\ndata: {json.dumps(state.as_json())}\n\n".encode())
                    sent = state.version
                else:
                    self.wfile.write(b"event: beat\ndata: 0\n\n")
                self.wfile.flush()
                watched.wait_for_another(sent, BEAT_S)
        finally:
            server.streams -= 1

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.client_address[0], re.sub(r"\?\S*", "", format % args))  # a token stays out of logs


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def _hashes(page: str) -> str:
    """The policy under which the script and the style of a page, and no others, run."""
    parts = []
    for element in ("script", "style"):
        found = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        parts.append(f"{element}-src 'sha256-{digest}'")
    return "; ".join(parts)
