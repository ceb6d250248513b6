"""A checkpoint is whole or it is no checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from llm_pg.run.saving import checkpoint_files
from llm_pg.run.saving.checkpoint_files import CheckpointError, RunState

pytestmark = pytest.mark.faults


def state(step: int, value: float = 1.0) -> RunState:
    return RunState(step, {"w": torch.full((4, 3), value)}, {"0.exp_avg": torch.zeros(4, 3)}, {"algorithm": {"x": 0.1}})


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = RunState(7, {"w": torch.randn(5)}, {"0.step": torch.tensor(7.0)}, {"number": 0.1 + 0.2})
    folder = checkpoint_files.save(tmp_path, saved, {"config": {"a": 1}})
    loaded, identity = checkpoint_files.load(folder)
    assert loaded.step == 7
    assert torch.equal(loaded.weights["w"], saved.weights["w"])
    assert loaded.numbers["number"] == 0.1 + 0.2
    assert identity == {"config": {"a": 1}}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "numbers.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_any_damage_is_caught_and_the_older_one_is_used(name: str, damage: str, tmp_path: Path) -> None:
    old = checkpoint_files.save(tmp_path, state(1), {})
    new = checkpoint_files.save(tmp_path, state(2), {})
    path = new / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        # in the manifest, a digit of a hash: another valid JSON
        at = data.index(b'"sha256": "') + 12 if name == "manifest.json" else len(data) - 3
        data[at] = ord("0") if data[at] != ord("0") else ord("1")
        path.write_bytes(data)
    else:
        path.unlink()
    found, warnings = checkpoint_files.newest(tmp_path)
    assert found == old
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    with pytest.raises(CheckpointError, match="cannot be used"):
        checkpoint_files.load(new)


def test_a_save_that_was_killed_before_its_manifest_is_passed_over(tmp_path: Path) -> None:
    old = checkpoint_files.save(tmp_path, state(1), {})
    partial = checkpoint_files.folder_of(tmp_path, 2)
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    assert checkpoint_files.newest(tmp_path)[0] == old


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    good = checkpoint_files.save(tmp_path, state(1), {})
    with pytest.raises(CheckpointError, match="NaN or inf"):
        checkpoint_files.save(tmp_path, state(2, value=float("nan")), {})
    assert checkpoint_files.newest(tmp_path)[0] == good


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint_files.save(tmp_path, state(step), {}, keep=2)
    assert sorted(checkpoint_files.whole(tmp_path)) == [3, 4]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = checkpoint_files.save(tmp_path, state(1), {})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {
        "weights.safetensors",
        "optimizer.safetensors",
        "numbers.json",
    }
