"""`llm-pg watch`: who is let in, what is served, and a page that follows a real run of another process."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_browser import Browser, needs_browser

from llm_pg.config import ConfigError
from llm_pg.run.saving.lock import FolderLock
from llm_pg.watch.server import WatchServer
from llm_pg.watch.state import Watched, kind_of

MakeRun = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
TINY_RUN = ROOT / "tests" / "faults" / "tiny_run.py"


@contextmanager
def served(*folders: Path, host: str = "127.0.0.1", token: str | None = None) -> Iterator[WatchServer]:
    watched = Watched(folders)
    with WatchServer(watched, host, 0, token) as server:
        threads = [threading.Thread(target=each) for each in (server.serve_forever, watched.follow)]
        for thread in threads:
            thread.start()
        yield server
        watched.stop()
        server.shutdown()
        for thread in threads:
            thread.join()


def ask(server: WatchServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_the_page_its_newer_part_and_its_completions_are_served_and_nothing_else(make_run: MakeRun) -> None:
    run = make_run(steps=3)
    (run / "rewards.log").write_text("what a reward function printed")
    with served(run) as server:
        status, headers, page = ask(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert headers["Cache-Control"] == "no-store"
        assert "connect-src" in page
        now = ask(server, "/now")[2]
        assert '"rows":[]' in now
        assert '"rows":[]' not in page
        assert len(json.loads(ask(server, "/completions")[2])["rows"]) == 12
        assert ask(server, "/", "HEAD")[2] == ""
        outside = ["/rewards.log", "/config.yaml", "/../config.yaml", "/%2e%2e/config.yaml", f"/{run}/config.yaml"]
        outside += ["//etc/passwd", "/now/../../config.yaml", "/report.html", "/completions/step-000001.jsonl"]
        for path in outside:
            status, _, text = ask(server, path)
            assert (status, text) == (404, "There is nothing at this address."), path
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert ask(server, "/", method)[0] == 405
        assert ask(server, "/", "BREW")[0] == 501


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_site_whose_name_was_made_to_lead_here_is_refused(make_run: MakeRun, name: str) -> None:
    with served(make_run(steps=1)) as server:
        for path in ("/", "/now", "/events", "/completions"):
            assert ask(server, path, Host=name)[0] == 403
        for own in ("localhost", "localhost:9000", "127.0.0.1:9000", "[::1]:9000"):  # another port: ssh forwards it
            assert ask(server, "/now", Host=own)[0] == 200


def test_any_address_but_the_loopback_needs_a_token_and_every_request_brings_it(make_run: MakeRun) -> None:
    run = make_run(steps=1)
    with pytest.raises(ValueError, match="needs a token"):
        WatchServer(Watched([run]), "0.0.0.0", 0, None)
    with served(run, host="0.0.0.0", token="the-token") as server:
        for path in ("/", "/now", "/events", "/completions", "/elsewhere"):
            for query in ("", "?token=", "?token=the-toke", "?token=the-token2", "?token=%ff", "?other=the-token"):
                status, _, text = ask(server, path + query)
                assert status == 403, path + query
                assert "first" not in text  # the run's name
        assert ask(server, "/now?token=the-token")[0] == 200
        assert ask(server, "/now?token=the-token", Host="10.1.2.3:80")[0] == 200
        assert ask(server, "/now?token=the-token", Host=socket.gethostname())[0] == 200
        assert ask(server, "/now?token=the-token", Host="evil.example")[0] == 403


def test_secrets_of_settings_environment_and_completions_are_not_served(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abc-environment")
    from report_rows import token_row

    spelled = ["abc", "-envir", "onment"]
    run = make_run("first", 2, lambda step: [token_row(step, 0, 0, spelled, prompt="at https://me:pass-word@host/x")])
    config = (run / "config.yaml").read_text()
    assert "task_options: {}" in config
    (run / "config.yaml").write_text(config.replace("task_options: {}", "task_options: {api_key: abc-settings}"))
    (run / "sessions.jsonl").write_text(json.dumps({"command": "llm-pg train key=abc-environment"}) + "\n")
    with served(run) as server:
        texts = [ask(server, path)[2] for path in ("/", "/now", "/completions")]
    for secret in ("abc-environment", "abc-settings", "pass-word", '"-envir"'):
        assert not [text for text in texts if secret in text], secret
    assert "llm-pg train key=[hidden]" in texts[0]


class Stream:
    """The events of a server, as they come."""

    def __init__(self, server: WatchServer) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        self.connection.request("GET", "/events")
        self.answer = self.connection.getresponse()

    def next(self) -> dict[str, Any]:
        while True:
            line = self.answer.readline().decode()
            assert line, "the stream ended"
            if line.startswith("data: {"):
                return dict(json.loads(line[6:]))

    def until(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            if true(state := self.next()):
                return state


def test_streams_hear_of_a_run_that_begins_goes_on_is_resumed_and_ends(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "later"
    with served(folder) as server:
        streams = [Stream(server) for _ in range(3)]
        assert [stream.next()["head"] for stream in streams] == ["Waiting for the run to begin."] * 3
        assert "Waiting for the run to begin" in ask(server, "/")[2]
        run = make_run("later", 4)
        (run / "summary.json").unlink()
        (run / "sessions.jsonl").write_text("{}\n")
        with FolderLock(run):
            states = [s.until(lambda state: state["text"].startswith("step 4 of 4, reward 0.8")) for s in streams]
            assert {(state["head"], state["completions"]) for state in states} == {("The run goes on.", 4)}
            lines = (run / "metrics.jsonl").read_text()
            (run / "metrics.jsonl").write_text(lines[: len(lines) * 3 // 4 - 20])  # its third line is half written
            assert streams[0].until(lambda state: "step 2 of 4" in state["text"])
            assert ask(server, "/now")[0] == 200
            before = server.watched.state.begun
            (run / "sessions.jsonl").write_text("{}\n{}\n")
            assert streams[0].until(lambda state: state["begun"] != before)
        gone = streams[0].until(lambda state: "killed" in state["head"])
        assert gone["begun"] != before
        (run / "ended.json").write_text('{"how": "told to"}')
        assert streams[0].until(lambda state: state["head"] == "The run ended early.")
        (run / "summary.json").write_text("{}")
        assert streams[0].until(lambda state: state["head"] == "The run has ended.")


def test_a_lock_that_a_killed_process_left_behind_is_no_running_run(make_run: MakeRun) -> None:
    run = make_run(steps=1)
    (run / "summary.json").unlink()
    facts = {"host": socket.gethostname(), "pid": 2**22 + 1, "born": 1.0}
    (run / ".lock").write_text(json.dumps(facts))
    assert kind_of(run) == "gone"
    (run / ".lock").write_text(json.dumps({**facts, "host": "elsewhere"}))
    assert kind_of(run) == "elsewhere"
    (run / ".lock").write_text(json.dumps({**facts, "pid": os.getpid()}))  # its number was given to another since
    assert kind_of(run) == "gone"


def test_a_run_that_cannot_be_read_for_a_moment_is_said_and_then_read(make_run: MakeRun) -> None:
    run = make_run(steps=1)
    whole = (run / "before.json").read_text()
    with served(run) as server:
        (run / "before.json").write_text('{"greedy": {"mean": 0.5}}')
        server.watched.look()
        assert ask(server, "/now")[0] == 503
        (run / "before.json").write_text(whole)
        server.watched.look()
        assert ask(server, "/now")[0] == 200


def test_a_port_that_is_taken_is_bad_input(make_run: MakeRun) -> None:
    watched = Watched([make_run(steps=1)])
    with WatchServer(watched, "127.0.0.1", 0, None) as server, pytest.raises(ConfigError, match="--port 0"):
        WatchServer(watched, "127.0.0.1", server.server_port, None)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`llm-pg watch` in a process of its own, and the address that it prints."""
    given = [sys.executable, "-m", "llm_pg", "watch", *words]
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        found = re.search(r"Page: (\S+)", said)
        assert found, said
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly_on_a_signal_while_a_browser_listens(make_run: MakeRun, number: int) -> None:
    with command(str(make_run(steps=1)), "--port", "0", "--token") as (process, address):
        host, port, token = re.fullmatch(r"http://([\d.]+):(\d+)/\?token=(\S{32})", address).groups()  # type: ignore[union-attr]
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", f"/events?token={token}")
        answer = connection.getresponse()
        assert answer.readline() == b"event: state\n"
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read().strip() == "Stopped watching."
        assert process.wait(10) == 0


@needs_browser
def test_a_browser_follows_a_real_run_from_before_its_beginning_to_its_end(browser: Browser, tmp_path: Path) -> None:
    """Zoom and the completion that is being read survive what is sent anew; the network is asked for nothing else."""
    changes = {"max_steps": 30, "report_seconds": 0, "log_completions": 1, "num_eval_prompts": 4, "eval_on_start": True}
    options = {"out": str(tmp_path), "name": "r", "fault": "slow steps", "at": 0, "changes": changes}
    text = "return document.getElementById(arguments[0])?.textContent ?? ''"

    def wait_for(true: Callable[[], Any], seconds: float = 60.0) -> Any:
        until = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < until, browser.js("return document.body.innerText.slice(0, 2000)")
            time.sleep(0.1)
        return found

    with command(str(tmp_path / "r"), "--port", "0") as (_, address):
        browser.size(1280, 900)
        browser.log("browser")
        browser.requests()
        browser.open(address)
        assert "Waiting for the run to begin" in browser.js("return document.body.textContent")
        run = subprocess.Popen([sys.executable, str(TINY_RUN), json.dumps(options)], env=environment())
        try:
            wait_for(lambda: "step 4 of 30" in browser.js(text, "age"))
            wait_for(lambda: browser.js("return document.querySelectorAll('.chart').length") > 8)
            assert browser.js(text, "live").startswith("The run goes on. step ")
            assert wait_for(lambda: browser.js("return document.querySelectorAll('#list .row').length")) > 0
            figure = "[...document.querySelectorAll('figure')].find(f => /^Entropy/.test(f.textContent.trim()))"
            wait_for(lambda: browser.js(f"return /step [6-9]$/.test({figure}?.querySelector('svg').ariaLabel)"))
            browser.js(f"{figure}.querySelector('svg').focus()")
            browser.press("+")
            wait_for(lambda: "Show the completions of" in browser.js("return document.body.textContent"))
            reading = browser.js("return document.querySelector('#detail h3').textContent")
            before = browser.js(text, "age")
            wait_for(lambda: browser.js(text, "age").split(",")[0] != before.split(",")[0])
            wait_for(lambda: browser.js(f"return !{figure}.querySelector('.whole').hidden"))
            assert browser.js(f"return document.activeElement === {figure}.querySelector('svg')")
            assert browser.js("return document.querySelector('#detail h3').textContent") == reading
            wait_for(lambda: browser.js(text, "live").startswith("The run has ended."))
            assert run.wait(30) == 0
        finally:
            run.kill()
            run.wait()
        wait_for(lambda: browser.js("return /greedy/.test(document.querySelector('#outcome tbody')?.textContent)"))
        ends = "return [...document.querySelectorAll('.chart')].some(e => /^Entropy.*step 30\\b/.test(e.ariaLabel))"
        wait_for(lambda: browser.js(ends))
        asked = {re.sub(r"\?.*", "", url).removeprefix(address) for url in browser.requests()}
        assert asked <= {"", "now", "events", "completions"} | {url for url in asked if url.startswith("data:")}
        assert [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"] == []
