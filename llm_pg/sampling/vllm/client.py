"""One server over HTTP. Everything that another try or another server may mend is `Unreachable`."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from ...distributed.network import UNREACHABLE_S, watch
from .errors import EngineError, TimedOut, Unreachable

HEALTH_TIMEOUT = 5.0  # seconds
CONNECT_TIMEOUT = 15.0  # seconds; a server that is only busy takes a connection at once, its system does that


class _Watched(http.client.HTTPConnection):
    """Ends soon where the server's machine is gone, however long an answer may take."""

    def connect(self) -> None:
        allowed = self.timeout
        if allowed is not None:
            self.timeout = min(allowed, CONNECT_TIMEOUT)
        super().connect()
        self.sock.settimeout(allowed)
        watch(self.sock, UNREACHABLE_S)


class _WatchedTls(_Watched, http.client.HTTPSConnection):
    """The same for https."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Watched, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_WatchedTls, request)


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Http, _Https)  # servers are in the same network


class Client:
    """Calls to the server at `url`, each with `timeout` seconds. VLLM_API_KEY of the environment is sent along."""

    def __init__(self, url: str, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"vllm_urls has {url!r}: a server's address begins with http:// or https://.")
        self.url, self.timeout = url.rstrip("/"), timeout

    def get(self, path: str, timeout: float | None = None) -> Any:
        return self._call(urllib.request.Request(self.url + path), timeout or self.timeout)

    def post(self, path: str, body: dict[str, Any], *, reads: bool = True) -> Any:
        """The answer as JSON; None with reads=False, where the server answers in words."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return self._call(request, self.timeout, reads=reads)

    def health(self) -> None:
        """Unreachable unless it says within seconds that it is well, as a server does that is only slow."""
        self.get("/health", min(self.timeout, HEALTH_TIMEOUT))

    def is_well(self) -> bool:
        try:
            self.health()
        except Unreachable:
            return False
        return True

    def _call(self, request: urllib.request.Request, timeout: float, *, reads: bool = True) -> Any:
        key = os.environ.get("VLLM_API_KEY")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with _DIRECT.open(request, timeout=timeout) as answer:
                data = answer.read()
        except urllib.error.HTTPError as error:
            reported = " ".join(error.read(2000).decode(errors="replace").split())
            text = f"{self.url} answered {error.code} to {request.selector}: {reported[:500]}"
            if error.code >= 500 or error.code in (408, 429):
                raise Unreachable(text) from None
            raise EngineError(_refused(text, error.code, request.selector)) from None
        except TimeoutError:
            raise TimedOut(f"{self.url} did not answer {request.selector} within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):  # before it took the connection
                raise TimedOut(f"{self.url} took no connection within {min(timeout, CONNECT_TIMEOUT):g} s") from None
            raise Unreachable(f"{self.url} {request.selector}: {error or type(error).__name__}") from None
        try:
            return json.loads(data) if data and reads else None
        except json.JSONDecodeError:
            raise Unreachable(f"{self.url} answered {request.selector} with what is no JSON: {data[:80]!r}") from None


def _refused(text: str, code: int, path: str) -> str:
    if path == "/collective_rpc" and code == 404:
        return f"{text}. Start the server with VLLM_SERVER_DEV_MODE=1: without it vLLM has no call that loads weights."
    return f"{text}. The server refuses the request itself, so no other try can help."
