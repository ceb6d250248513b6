"""L1 and W9: a tracker or a judge that is gone. The run goes on, says so once, and a missing score is never a 0."""

import http.server
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.rewards.tally import RewardError
from llm_pg.run.logs import trackers
from llm_pg.run.logs.redact import Redactor
from llm_pg.run.logs.tracker_kinds import Kind, TrackedRun
from llm_pg.run.logs.trackers import Trackers
from tests.faults.conftest import lines
from tests.faults.tiny_run import LIGHT, make
from tests.seams import Steps

pytestmark = pytest.mark.faults


class Tracker(Kind):
    """A tracker that breaks, and its kind."""

    def __init__(self, **broken: Callable[[], None]) -> None:
        super().__init__("one")
        self.broken, self.logged = broken, []

    def begin(self, run: TrackedRun) -> Any:
        self.broken.get("start", lambda: None)()
        return self

    def store_init_configuration(self, settings: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        self.broken.get("log", lambda: None)()
        self.logged.append(step)

    def finish(self) -> None:
        self.broken.get("finish", lambda: None)()


def followed(tracker: Tracker, warnings: list[str], clean: Redactor) -> Trackers:
    run = TrackedRun("p", "r", Path("r"), "g")
    return Trackers(["one"], run, say=print, warn=warnings.append, clean=clean, kinds={"one": tracker})


def fails() -> None:
    raise ConnectionError("no network, key environment-secret")


def exits() -> None:
    raise SystemExit(1)


def hangs() -> None:
    time.sleep(1e6)


@pytest.mark.parametrize("when", ["start", "log", "finish"])
@pytest.mark.parametrize("how", [fails, exits, hangs])
def test_a_tracker_that_breaks_is_one_warning_and_no_delay(
    when: str, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "START_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "END_SECONDS", 0.4)
    warnings: list[str] = []
    secrets = Redactor({"api_key": "environment-secret"})
    tracking = followed(Tracker(**{when: how}), warnings, secrets)
    begin = time.monotonic()
    tracking.start({"a": {"b": None}})
    for step in range(5):
        tracking.log({"x": 1.0}, step)
    assert time.monotonic() - begin < 0.2
    tracking.finish()
    tracking.finish()
    assert time.monotonic() - begin < 2
    assert len(warnings) == 1
    assert "Nothing more is sent to one" in warnings[0]
    assert "environment-secret" not in warnings[0]


def test_a_tracker_that_works_gets_every_step() -> None:
    tracker, warnings = Tracker(), []
    tracking = followed(tracker, warnings, Redactor())
    tracking.start({})
    for step in range(5):
        tracking.log({"x": 1.0}, step)
    tracking.finish()
    assert tracker.logged == [0, 1, 2, 3, 4]
    assert warnings == []


@pytest.mark.parametrize("case", ["no key", "no network", "unwritable folder"])
def test_a_run_goes_on_without_wandb(case: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The key is of the right form; nothing listens at the address."""
    env = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "WANDB_MODE": "", "WANDB_SILENT": "true"}
    if case != "no key":
        env |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_DIR": "/proc/none"}
    report = ["tensorboard"] if case == "unwritable folder" else ["wandb"]
    if case == "unwritable folder":
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "tensorboard").write_text("a file where tensorboard wants its folder")
    begin = time.monotonic()
    done = tiny("r", env=env, changes={"report_to": report, "reward_in_process": True})
    assert done.status == 0, done.output
    assert time.monotonic() - begin < 60
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]
    assert done.output.count("Nothing more is sent to") == 1, done.output


def test_a_run_goes_on_when_wandb_is_killed_in_the_middle_of_it(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """wandb itself, offline, its service process killed at step 3."""
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    changes = {"report_to": ["wandb"], "reward_in_process": True}
    done = tiny("r", env=env, changes=changes, fault="kill wandb", at=3)
    assert done.status == 0, done.output
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]
    assert done.output.count("Nothing more is sent to wandb") == 1, done.output


class Judge(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"0.5")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.fake
def test_a_judge_that_goes_down_gives_no_score_and_never_a_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up for two steps of three, then closed: counted by name, weight 0; over the limit the run stops."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}")
    changes = {"max_steps": 3, "max_unscorable": 1.0, "reward_in_process": True}
    trainer = make({"out": str(tmp_path), "name": "r", "changes": changes, "reward": f"{LIGHT}:judge"})

    def closes(step: int) -> None:
        if step == 3:
            server.shutdown()
            server.server_close()

    trainer.add_callback(Steps(before=closes))
    trainer.train()
    assert [line["unscorable"] for line in lines(tmp_path / "r")] == [0.0, 0.0, 1.0]
    assert [line["reward"] for line in lines(tmp_path / "r")] == [0.5, 0.5, None]
    rows = (tmp_path / "r" / "completions" / "step-000003.jsonl").read_text().splitlines()
    assert {json.loads(row)["reward"] for row in rows} == {None}
    assert "Reward function judge: {'URLError': 16}" in capsys.readouterr().out
    strict = {**changes, "max_unscorable": 0.2, "eval_on_start": False}
    with pytest.raises(RewardError, match="judge could not score"):
        make({"out": str(tmp_path), "name": "s", "changes": strict, "reward": f"{LIGHT}:judge"}).train()
