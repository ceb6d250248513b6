"""S6 and S7: files made to be executed are refused with the reason; secrets appear nowhere."""

import hashlib
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config import ConfigError, load_config
from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import character_tokenizer, load_model, load_tokenizer
from llm_pg.run.logs.redact import HIDDEN, Redactor, is_secret_name
from llm_pg.run.saving import checkpoint_files
from llm_pg.run.saving.checkpoint_files import CheckpointError, RunState
from tests.faults.tiny_run import LIGHT, SIZES

pytestmark = pytest.mark.faults


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Other content, with a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(checkpoint_files.manifest_text(manifest))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "numbers.json"])
def test_a_pickle_with_a_right_hash_is_refused_and_not_executed(name: str, tmp_path: Path) -> None:
    folder = checkpoint_files.save(tmp_path, RunState(1, {"w": torch.zeros(2)}, {"m": torch.zeros(2)}, {}), {})
    marker = tmp_path / "executed"
    rewrite(folder, name, pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match="not safetensors and JSON"):
        checkpoint_files.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../outside": {"size": 1, "sha256": ""}}),
        lambda m: m["files"].pop("numbers.json"),
        lambda m: m["files"].update({"numbers.json": "a text"}),
        lambda m: m.update(files=[]),
        lambda m: m.update(identity=None),
    ],
)
def test_a_manifest_of_another_form_is_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = checkpoint_files.save(tmp_path, RunState(1, {"w": torch.zeros(2)}, {"m": torch.zeros(2)}, {}), {})
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(checkpoint_files.manifest_text(manifest))
    with pytest.raises(CheckpointError, match="manifest is of another format"):
        checkpoint_files.load(folder)


def test_a_model_folder_with_pickled_weights_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker, tokenizer = tmp_path / "executed", character_tokenizer()
    load_model(ModelConfig(make=SIZES), tokenizer, seed=0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), tokenizer, seed=0)
    assert not marker.exists()


def test_a_model_that_brings_its_own_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    config = ModelConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"trust_remote_code|custom code"):
        load_model(config, character_tokenizer(), seed=0)
    with pytest.raises(ConfigError):
        load_tokenizer(config)
    assert not marker.exists()


def test_yaml_that_makes_objects_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "c.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="Cannot read the value"):
        load_config(None, [f"seed=!!python/object/apply:os.system ['touch {marker}']"])
    with pytest.raises(ConfigError, match="run_name"):
        load_config(None, [f"run_name=/!!python/object/apply:os.system ['touch {marker}']"])
    assert not marker.exists()


def test_secrets_of_environment_config_and_urls_are_in_nothing_that_a_run_writes_or_prints(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """A reward function raises with a token and a URL in its message, so the run ends with a crash bundle."""
    nested = "nested-secret-value"
    changes = {
        "task_options": {
            "client": {"api_key": nested, "url": "https://me:url-secret-value@host/x?token=query-secret-value"}
        },
        "report_to": ["tensorboard"],
        "save_steps": 1,
    }
    env = {"SERVICE_TOKEN": "environment-secret-value"}
    stopped = tiny("stopped", env=env, changes={**changes, "strict": True}, reward=f"{LIGHT}:complains")
    assert stopped.status != 0
    assert (tmp_path / "stopped" / "crash" / "step-000001" / "error.txt").exists()
    done = tiny("done", env=env, changes={**changes, "max_steps": 1})
    assert done.status == 0, done.output
    assert HIDDEN in (tmp_path / "done" / "config.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "stopped.log"]
    assert len(files) > 8
    for path in files:
        for secret in (nested, "environment-secret-value", "url-secret-value", "query-secret-value"):
            assert secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "name, secret",
    [("api_key", True), ("hf_token", True), ("WANDB_API_KEY", True), ("password", True), ("eos_token", False),
     ("max_tokens", False), ("tokenizer", False), ("prompt_column", False), ("pad_token", False)],
)  # fmt: skip
def test_names_of_secrets_are_told_from_words_of_a_vocabulary(name: str, secret: bool) -> None:
    if name == "max_tokens":
        assert Redactor().tree({name: 5}) == {name: 5}
    else:
        assert is_secret_name(name) is secret


def test_all_texts_of_a_mapping_whose_name_means_a_secret_are_hidden_wherever_they_appear() -> None:
    settings = {"judge": {"credentials": {"login": "somebody", "parts": ["first-part", 7]}, "model": "m"}}
    clean = Redactor(settings)
    hidden = {"login": HIDDEN, "parts": [HIDDEN, 7]}
    assert clean.tree(settings) == {"judge": {"credentials": hidden, "model": "m"}}
    assert clean.text("refused somebody") == f"refused {HIDDEN}"


@pytest.mark.parametrize(
    "text, clean",
    [
        ("at https://me:pass@word@host/x", f"at https://{HIDDEN}@host/x"),
        ("?a=1&api_key=abc&b=2", f"?a=1&api_key={HIDDEN}&b=2"),
        ("what??Token=abc 'x'", f"what??Token={HIDDEN} 'x'"),
        ("mail a@b, is 1 < 2? yes=no", "mail a@b, is 1 < 2? yes=no"),
    ],
)
def test_what_is_secret_in_a_url_is_hidden_and_other_text_is_kept(text: str, clean: str) -> None:
    assert Redactor().text(text) == clean


@pytest.mark.parametrize("piece", ["?", "a", "?k", "://", "?token", "x@"])
def test_what_a_broken_policy_repeats_is_searched_in_time_that_grows_with_its_length(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    clean, begin = Redactor(), time.process_time()
    assert clean.text(text) == text
    assert time.process_time() - begin < 1.0
