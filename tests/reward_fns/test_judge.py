"""The judge, against a server that fails in every way a server can; through the reward workers, as in a run."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_pg.rewards import RewardError, Scorer
from reward_fns import registry
from reward_fns.judge import JudgeDownError, NoScoreError, check_judge, judge, read_score

pytestmark = pytest.mark.fake

pytest.importorskip("openai")

Answer = tuple[int, Any]


def said(text: Any, finish_reason: str = "stop") -> Answer:
    message = {"role": "assistant", "content": text}
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


class Server:
    """A server whose answers are a function of the request and of how many came before it."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda request, number: said("Fine.\nScore: 7")
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    server.requests.append({**request, "path": self.path, "key": self.headers["authorization"]})
                    number = len(server.requests)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                status, body = server.answer(request, number)
                with server.lock:
                    server.at_once -= 1
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def asked(server: Server, completion: str = "It is 4.", prompt: Any = "2 + 2?", **options: Any) -> float:
    given = {"model": "m", "rubric": "10 = right, {answer}.", "base_url": server.url, "answer": "4", "retries": 1}
    return asyncio.run(judge(completion, prompt, **{**given, **options}))


def test_the_score_is_scaled_and_the_judge_sees_rubric_task_answer_and_columns(server: Server) -> None:
    assert asked(server) == pytest.approx(0.7)
    assert asked(server, low=-10) == pytest.approx(17 / 20)
    request = server.requests[0]
    system, user = (message["content"] for message in request["messages"])
    assert "10 = right, 4." in system
    assert "from 0 to 10" in system
    assert ("2 + 2?" in user, "It is 4." in user, request["model"], request["temperature"]) == (True, True, "m", 0.0)
    assert request["path"] == "/v1/chat/completions"
    asked(server, prompt=[{"role": "user", "content": "2 + 2?"}], temperature=None, extra_body={"top_k": 1})
    assert server.requests[-1]["messages"][1]["content"].startswith("Task:\nuser: 2 + 2?")
    assert "temperature" not in server.requests[-1]
    assert server.requests[-1]["top_k"] == 1


def test_what_a_completion_says_in_braces_is_text(server: Server) -> None:
    asked(server, completion="{answer} {rubric} {0} {completion}")
    assert "{answer} {rubric} {0} {completion}" in server.requests[0]["messages"][1]["content"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "text, cut, why",
    [
        ("", False, "no line"),
        ("A fine answer, 8 out of 10.", False, "no line"),
        ("I would give it a score: 8 maybe", False, "no line"),
        ("Score: eight", False, "no line"),
        ("Score: N", False, "no line"),
        ("Score: 8\nScore: 3", False, "several"),
        ("Score: 11", False, "range"),
        ("Score: -1", False, "range"),
        ("Score: 7/20", False, "range"),
        ("Score: 7", True, "cut"),
        ("<think>Score: 7</think>", False, "no line"),
        ("<think>Score: 7", False, "no line"),
    ],
)
def test_what_is_no_score_in_its_form_is_a_failure_and_not_a_zero(text: str, cut: bool, why: str) -> None:
    with pytest.raises(NoScoreError, match=why):
        read_score(text, 0, 10, cut)


@pytest.mark.parametrize(
    "text, score",
    [
        ("Good.\nScore: 7", 7),
        ("Score: 7.5", 7.5),
        ("**Score: 7**", 7),
        ("**Score:** 7/10", 7),
        ("Score: 0.", 0),
        ("<think>Score: 2</think>\nScore: 9", 9),
        ("Score: 7\nSo:\nScore: 7", 7),
    ],
)
def test_a_score_in_its_form_is_read(text: str, score: float) -> None:
    assert read_score(text, 0, 10) == score


@pytest.mark.faults
@pytest.mark.parametrize(
    "answer, error, why",
    [
        ((404, {"error": {"message": "no such model"}}), JudgeDownError, "status 404.*no such model"),
        ((401, {"error": {"message": "bad key"}}), JudgeDownError, "status 401"),
        ((500, {"error": {"message": "boom"}}), JudgeDownError, "status 500"),
        ((429, {"error": {"message": "slow down"}}), JudgeDownError, "status 429"),
        ((200, b"{not json"), JudgeDownError, "cannot be asked"),
        ((200, {"id": "x", "choices": []}), NoScoreError, "without a text"),
        (said(None), NoScoreError, "without a text"),
        (said("Score: 7", "length"), NoScoreError, "cut"),
    ],
)
def test_each_failure_of_a_server_has_its_error(
    answer: Answer, error: type[Exception], why: str, server: Server
) -> None:
    server.answer = lambda request, number: answer
    with pytest.raises(error, match=why):
        asked(server)


@pytest.mark.faults
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_under_load_is_asked_again_after_a_pause(status: int, server: Server) -> None:
    server.answer = lambda request, number: (status, {}) if number < 3 else said("Score: 10")
    begin = time.monotonic()
    assert asked(server, retries=3) == 1.0
    assert len(server.requests) == 3
    assert time.monotonic() - begin > 0.5


@pytest.mark.faults
def test_a_server_that_is_not_there_or_too_slow_leaves_no_score(server: Server) -> None:
    with pytest.raises(JudgeDownError, match="cannot be asked: APIConnectionError"):
        asked(server, base_url="http://127.0.0.1:9/v1", retries=0)
    server.answer = lambda request, number: (time.sleep(2), said("Score: 7"))[1]
    begin = time.monotonic()
    with pytest.raises(JudgeDownError, match=r"no answer in 0\.3 s"):
        asked(server, seconds=0.3)
    assert time.monotonic() - begin < 1.5


def test_equal_requests_are_one_and_a_folder_keeps_answers_for_later_processes(server: Server, tmp_path: Path) -> None:
    async def several(count: int) -> list[float]:
        given = {"model": "m", "rubric": "r", "base_url": server.url, "cache": str(tmp_path / "kept")}
        return await asyncio.gather(*(judge("same", "p", **given) for _ in range(count)))

    assert asyncio.run(several(8)) == [0.7] * 8
    assert len(server.requests) == 1
    assert asyncio.run(several(2)) == [0.7] * 2  # another event loop remembers nothing
    assert len(server.requests) == 1
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text("{half")
    assert asyncio.run(several(1)) == [0.7]
    assert len(server.requests) == 2
    with_other_rubric = {"model": "m", "rubric": "other", "base_url": server.url, "cache": str(tmp_path / "kept")}
    asyncio.run(judge("same", "p", **with_other_rubric))
    assert len(server.requests) == 3


def test_so_many_requests_go_out_at_once_and_no_more(server: Server) -> None:
    server.answer = lambda request, number: (time.sleep(0.05), said("Score: 7"))[1]

    async def several() -> list[float]:
        given = {"model": "m", "rubric": "r", "base_url": server.url, "concurrency": 3}
        return await asyncio.gather(*(judge(f"text {place}", "p", **given) for place in range(12)))

    assert len(asyncio.run(several())) == 12
    assert 2 <= server.most_at_once <= 3


def test_the_key_comes_from_the_environment_and_nothing_is_asked_without_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    asked(server, api_key_env="MY_KEY")
    assert server.requests[0]["key"] == "Bearer secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        check_judge("m", "r")


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"rubric": " "}, "rubric"),
        ({"rubric": "{gold}"}, "names {gold}, which is no column: answer"),
        ({"model": ""}, "name of a model"),
        ({"low": 5, "high": 5}, "low < high"),
        ({"seconds": 0}, "seconds > 0"),
    ],
)
def test_settings_that_could_judge_nothing_are_refused_before_the_run(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_judge(**{"model": "m", "rubric": "r", "base_url": "http://x/v1", "answer": "4", **wrong})


def test_in_a_run_its_failures_are_counted_by_name_and_its_costs_are_metrics(server: Server) -> None:
    def answer(request: dict[str, Any], number: int) -> Answer:
        text = request["messages"][1]["content"]
        return (500, {}) if "down" in text else said("no idea" if "silent" in text else "Score: 10")

    server.answer = answer
    spec = {
        "function": "judge", "model": "m", "rubric": "r", "base_url": server.url, "retries": 0,
        "price_in": 1.0, "price_out": 10.0,
    }  # fmt: skip
    texts = ["good", "good", "silent", "down"]
    with Scorer([spec, "exact_match"], max_unscorable=0.5) as scorer:
        scores = scorer.grade(["p"] * 4, texts, [[0]] * 4, [{"answer": "good"}] * 4)
        assert scores.reward == [2.0, 2.0, None, None]  # a failed judge is no 0, whatever exact_match says
        assert scores.problems["judge"] == {"NoScoreError": 1, "JudgeDownError": 1}
        assert scores.metrics["judge/prompt_tokens"] == pytest.approx(100 / 2, rel=0.5)
        assert scores.metrics["judge/cost"] == pytest.approx(1e-6 * 300 * 0.5, rel=0.5)
        assert 0.0 < scores.metrics["judge/cached"] < 1.0
        with pytest.raises(RewardError, match="JudgeDownError"):
            scorer.grade(["p"] * 4, ["down"] * 4, [[0]] * 4, [{"answer": "good"}] * 4)


def test_what_it_promises_is_an_opinion() -> None:
    info = registry.rewards()["judge"].info
    assert (info.low, info.high, info.floor, info.checks, info.extra) == (0.0, 1.0, 1.0, "opinion", "judge")
    assert os.environ.get("OPENAI_API_KEY") is None
