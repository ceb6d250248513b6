"""Tools of MCP servers, by the official client (the package mcp, 2.x).

A server is connected to once and serves all episodes of the run, so that its tools should keep nothing between calls.
Its client lives in a thread with an event loop of its own; a tool of it looks like an async function.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from ..config import ConfigError, nearest

CONNECT_SECONDS = 60.0
SETTINGS = ("command", "args", "env", "cwd", "url")


class McpServers:
    """Clients of several servers.

    Args:
        servers: by name, {command, args, env, cwd} of one that is started here, or {url} of one that runs.

    Raises:
        ConfigError: the package is missing, or a server cannot be reached.
    """

    def __init__(self, servers: Mapping[str, Mapping[str, Any]]) -> None:
        for name, settings in servers.items():
            _check(name, settings)
        self.servers = servers
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._clients: dict[str, Any] = {}
        self._stop: asyncio.Event | None = None
        self._ended: list[Future[None]] = []

    def tools(self) -> list[tuple[dict[str, Any], Callable[..., Awaitable[str]]]]:
        """Schema and function of each tool, server by server."""
        self._connect()
        found = []
        for name, client in self._clients.items():
            for tool in self._wait(client.list_tools()).tools:
                function = {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": dict(tool.input_schema),
                }
                found.append(({"type": "function", "function": function}, self._function(name, tool.name)))
        return found

    def _function(self, server: str, tool: str) -> Callable[..., Awaitable[str]]:
        async def call(**arguments: Any) -> str:
            self._connect()
            assert self._loop is not None
            answer = self._clients[server].call_tool(tool, arguments)
            return _text(await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(answer, self._loop)))

        call.__name__ = call.__qualname__ = tool
        return call

    def _connect(self) -> None:
        if self._loop is not None:
            return
        _require()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp-servers", daemon=True)
        self._thread.start()
        self._stop = asyncio.Event()
        for name, settings in self.servers.items():
            ready: Future[Any] = Future()
            self._ended.append(asyncio.run_coroutine_threadsafe(self._serve(settings, ready), self._loop))
            try:
                self._clients[name] = ready.result(CONNECT_SECONDS)
            except Exception as error:  # noqa: BLE001 - of the client, the transport or the server
                self.close()
                raise ConfigError(
                    f"The MCP server {name!r} ({settings.get('command') or settings['url']}) cannot be reached: "
                    f"{_innermost(error)}. Try its command or its url by hand."
                ) from None

    async def _serve(self, settings: Mapping[str, Any], ready: Future[Any]) -> None:
        """Holds a connection until `close`; it is opened and closed in one task, as the client wants it."""
        from mcp import Client, StdioServerParameters, stdio_client

        if "url" in settings:
            server = settings["url"]
        else:  # in a notebook sys.stderr is an object that no process can write to
            server = stdio_client(StdioServerParameters(**settings), sys.__stderr__ or sys.stderr)
        assert self._stop is not None
        try:
            async with Client(server) as client:
                ready.set_result(client)
                await self._stop.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CONNECT_SECONDS)

    def close(self) -> None:
        """Ends the servers that were started here. A later call starts them again."""
        if self._loop is None or self._thread is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        for ended in self._ended:
            ended.exception(CONNECT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONNECT_SECONDS)
        self._loop.close()
        self._loop, self._thread, self._stop = None, None, None
        self._clients, self._ended = {}, []


def _check(name: str, settings: Any) -> None:
    if not isinstance(settings, Mapping) or ("command" in settings) == ("url" in settings):
        raise ConfigError(
            f"rollout.mcp_servers has {name!r}: {settings!r}. A server has a command (with args, env and cwd), by "
            "which it is started here, or a url where it runs."
        )
    for word in settings:
        if word not in SETTINGS:
            raise ConfigError(f"The MCP server {name!r} has no setting {word!r}.{nearest(word, SETTINGS)}")


def _require() -> None:
    try:
        from mcp import Client  # noqa: F401
    except ImportError:
        raise ConfigError(
            "rollout.mcp_servers needs the official client: pip install 'llm-policy-gradient[mcp]' (mcp 2.x)."
        ) from None


def _text(result: Any) -> str:
    """What a tool answered. Raises RuntimeError where that is a failure, or more than text."""
    kinds = [block.type for block in result.content if block.type != "text"]
    if kinds:
        raise RuntimeError(f"The tool answered with {', '.join(kinds)}; only text can be read.")
    text = "\n".join(block.text for block in result.content)
    if result.is_error:
        raise RuntimeError(text)
    return text


def _innermost(error: BaseException) -> str:
    """The first cause in a group of errors."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"
