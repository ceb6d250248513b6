"""Tools of a real MCP server that the test starts."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.environments.calls import ToolCall
from llm_pg.environments.mcp_servers import McpServers
from llm_pg.environments.running import ToolRunner
from llm_pg.environments.toolbox import Toolbox

SERVER = {"command": sys.executable, "args": [str(Path(__file__).with_name("mcp_server.py"))]}


def needs_mcp() -> None:
    mcp = pytest.importorskip("mcp")
    if not hasattr(mcp, "Client"):
        pytest.skip("mcp is older than 2.0")


def test_the_tools_of_a_server_are_shown_and_called_and_it_ends_with_the_run() -> None:
    needs_mcp()
    import os

    servers = {"numbers": {**SERVER, "env": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}}
    toolbox = Toolbox([], None, servers)
    product, refuses, _ = toolbox.schemas
    assert product["function"]["name"] == "product"
    assert product["function"]["description"] == "Multiplies two numbers."
    assert product["function"]["parameters"]["properties"]["left"]["type"] == "integer"
    assert refuses["function"]["parameters"]["required"] == ["word"]
    calls = [ToolCall("product", {"left": n, "right": 7}) for n in range(5)] + [
        ToolCall("refuses", {"word": "now"}),
        ToolCall("product", {"left": "x"}),
        ToolCall("draws", {"word": "cat"}),
    ]
    with ToolRunner(toolbox.tools, timeout=20.0) as runner:
        for _ in range(2):  # closed between, and started again by the first call
            results = runner.run(calls, [None] * len(calls))
            assert [result.text for result in results[:5]] == ["0", "7", "14", "21", "28"]
            assert [result.failed for result in results] == [False] * 5 + [True] * 3
            assert "refuses" in results[5].text
            assert results[7].text == "{'error': 'The tool answered with image; only text can be read.'}"
            toolbox.close()
    assert toolbox.servers is not None
    assert toolbox.servers._loop is None


def test_a_server_that_runs_somewhere_is_reached_by_its_url() -> None:
    needs_mcp()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = str(Path(__file__).with_name("mcp_server.py"))
    server = subprocess.Popen([sys.executable, file, str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        toolbox = Toolbox([], None, {"there": {"url": f"http://127.0.0.1:{port}/mcp"}})
        with ToolRunner(toolbox.tools, timeout=20.0) as runner:
            assert runner.run([ToolCall("product", {"left": 6, "right": 7})], [None])[0].text == "42"
        toolbox.close()
        assert server.poll() is None  # it is somebody else's
    finally:
        server.terminate()
        server.wait()
    with pytest.raises(ConfigError, match=rf"MCP server 'there' \(http://127.0.0.1:{port}/mcp\) cannot be reached"):
        McpServers({"there": {"url": f"http://127.0.0.1:{port}/mcp"}}).tools()


def test_a_server_that_does_not_start_is_named() -> None:
    needs_mcp()
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=r"MCP server 'gone' \(/nowhere/at/all\) cannot be reached"):
        McpServers({"gone": {"command": "/nowhere/at/all"}}).tools()
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"args": ["x"]}, "a command .* or a url"),
        ({"command": "x", "url": "y"}, "a command .* or a url"),
        ({"command": "x", "arg": ["y"]}, "Did you mean 'args'"),
        ("http://x", "a command .* or a url"),
    ],
)
def test_wrong_settings_of_a_server_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        McpServers({"a": settings})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"llm-policy-gradient\[mcp\]"):
        McpServers({"a": {"command": "x"}}).tools()
