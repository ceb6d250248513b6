"""The card, and the upload to a stand-in of the hub's HTTP on this machine."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.terminal import Terminal

pytestmark = pytest.mark.fake

ROWS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
SETTINGS = {
    "run_name": "r",
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_eval_prompts": 4,
    "use_cpu": True,
    "reward_in_process": True,
}


class Hub:
    """What a stand-in was asked: repositories with their files, and whether they are private."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuses = False
        self.commits: list[tuple[str, set[str]]] = []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, values: Any, status: int = 200) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"sha": "0" * 40, "id": "me/r", "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.tokens.add(self.headers.get("Authorization", ""))
            if state.refuses:
                return self.answer({"error": "You may not."}, 403)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                state.private[f"me/{asked['name']}"] = asked.get("visibility") == "private" or bool(
                    asked.get("private")
                )
                return self.answer({"url": f"{constants.ENDPOINT}/me/{asked['name']}"})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if "/commit/" in self.path:
                entries = [json.loads(line) for line in body.splitlines()]
                title = next(e["value"]["summary"] for e in entries if e["key"] == "header")
                state.commits.append((title, {e["value"]["path"] for e in entries if e["key"] == "file"}))
                for entry in entries:
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                url = f"{constants.ENDPOINT}/{repository}/commit/{'1' * 40}"
                return self.answer({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})
            return self.answer({"warnings": [], "errors": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    server.server_close()


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        args = GRPOConfig(str(tmp_path / "mine"), **{**SETTINGS, **changes})
        quiet = Terminal(quiet=True)
        return GRPOTrainer(make_model("llama"), digits, args, ROWS, processing_class=tokenizer, terminal=quiet)

    return make


def test_the_card_says_what_was_trained_by_what_and_with_which_result(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    made = trainer()
    summary = made.train()
    made.create_model_card(dataset_name="org/sums", tags=["maths"], model_name="Sums")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.datasets, card.data.model_name) == ("org/sums", "Sums")
    assert {"grpo", "maths", "reinforcement-learning"} <= set(card.data.tags)
    for when in ("before", "after"):
        mean, low, high = summary[f"pass_rate_{when}_interval"]
        assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in card.text
    assert "arXiv 2402.03300" in card.text
    assert "its line of `llm-pg prove`" in card.text


def test_nothing_is_uploaded_unless_it_is_asked_for(trainer: Callable[..., Any], hub: Hub) -> None:
    trainer().train()
    assert (hub.private, hub.files) == ({}, {})


def test_push_to_hub_uploads_the_model_and_its_card(trainer: Callable[..., Any], hub: Hub) -> None:
    made = trainer(push_to_hub=True, hub_token="hf_secret", hub_private_repo=True)
    made.train()
    assert hub.private == {"me/mine": True}
    assert made.hub_model_id == "me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(hub.files)
    assert hub.files["model.safetensors"] == (made.folder.model / "model.safetensors").read_bytes()
    assert hub.tokens == {"Bearer hf_secret"}
    assert not [p for p in made.folder.path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]


def test_a_hub_that_refuses_leaves_the_model_where_it_is(trainer: Callable[..., Any], hub: Hub) -> None:
    made = trainer(hub_token="hf_secret")
    made.train()
    hub.refuses = True
    with pytest.raises(ConfigError, match=r"The model was not uploaded: .*It is in .*model"):
        made.push_to_hub()
    assert (made.folder.model / "model.safetensors").exists()


OF_A_RUN = {"weights.safetensors", "optimizer.safetensors", "manifest.json"}  # what a run goes on with


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", []),
        ("every_save", []),
        ("checkpoint", ["last-checkpoint", "last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_checkpoints_are_uploaded_as_hub_strategy_says(
    trainer: Callable[..., Any], hub: Hub, strategy: str, folders: list[str]
) -> None:
    made = trainer(push_to_hub=True, hub_token="t", hub_strategy=strategy, save_steps=1, max_steps=2)
    made.train()
    models = [
        files for title, files in hub.commits if title.startswith("Training in progress") and "config.json" in files
    ]
    assert len(models) == (0 if strategy == "end" else 2)
    for files in models:
        assert {"model.safetensors", "tokenizer_config.json"} <= files
        assert not files & OF_A_RUN
    whole = [files for title, files in hub.commits if title.endswith("checkpoint")]
    assert [{name.split("/")[0] for name in files} for files in whole] == [{folder} for folder in folders]
    for files in whole:
        assert {name.split("/")[1] for name in files} >= OF_A_RUN
    assert hub.commits[-1][0] == "End of training"
    assert made.hub_model_id == "me/mine"


def test_an_upload_of_a_checkpoint_that_fails_does_not_end_the_run(trainer: Callable[..., Any], hub: Hub) -> None:
    made = trainer(push_to_hub=True, hub_token="t", save_steps=1, max_steps=2)
    hub.refuses = True
    with pytest.raises(ConfigError, match="The model was not uploaded"):
        made.train()
    assert made.state.global_step == 2
    assert (made.folder.model / "model.safetensors").exists()


def test_an_unknown_strategy_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"hub_strategy='every_safe' is refused: .*Did you mean 'every_save'"):
        GRPOConfig(hub_strategy="every_safe")
