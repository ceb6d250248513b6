"""Saving and resuming: safetensors and JSON, committed by a manifest that is written last.

A folder without a whole manifest is no checkpoint. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or trusted."""


@dataclass
class State:
    """What a run needs to go on: trainable weights by name, optimiser moments, and small numbers."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, Any]


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def save(root: Path, state: State, identity: dict[str, Any], keep: int | None = None) -> Path:
    """Write a checkpoint of `state` under `root` and drop the oldest beyond `keep`.

    Args:
        identity: what must be the same to go on (config, data fingerprint, versions); kept in the manifest.

    Raises:
        CheckpointError: when a weight is not finite, or the disk has no room; older checkpoints stay.
    """
    bad = [name for name, value in state.weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"Step {state.step} was not saved: {len(bad)} of {len(state.weights)} weights hold NaN or inf "
            f"({bad[0]} first). The last good checkpoint stays."
        )
    folder = folder_of(root, state.step)
    if folder.exists():
        shutil.rmtree(folder)
    need = sum(t.numel() * t.element_size() for part in (state.weights, state.optimizer) for t in part.values())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < need * 1.05:
        raise CheckpointError(
            f"Step {state.step} was not saved: it needs {need:,} bytes at {root}, which has {free:,} free."
        )
    folder.mkdir()
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in state.weights.items()}, folder / "weights.safetensors")
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in state.optimizer.items()}, folder / "optimizer.safetensors"
        )
        (folder / "numbers.json").write_text(json.dumps({"step": state.step, **state.numbers}, indent=1))
        _commit(folder, {"format": _FORMAT, "step": state.step, "identity": identity})
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        raise CheckpointError(
            f"Step {state.step} was not saved at {folder}: {error.strerror or error}. It needs {need:,} bytes and "
            f"{shutil.disk_usage(root).free:,} are free. Older checkpoints stay."
        ) from None
    if keep is not None:
        for old in sorted(whole(root))[:-keep]:
            shutil.rmtree(folder_of(root, old))
    return folder


def _commit(folder: Path, head: dict[str, Any]) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({**head, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problem(folder: Path) -> str | None:
    """Why this folder is no whole checkpoint; None when it is one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "it has no manifest, so it was not written to the end"
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return "its manifest cannot be read"
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != _FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        return "its manifest is of another format"
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes where {facts['size']} were written"
        if _sha256(path) != facts["sha256"]:
            return f"{name} does not have the sha256 that was written"
    return None


def whole(root: Path) -> list[int]:
    """Steps of the folders that have a manifest (not yet verified)."""
    return [int(p.name[5:]) for p in root.glob("step-*") if p.name[5:].isdigit() and (p / MANIFEST).exists()]


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest verified checkpoint, and one warning for each newer folder that had to be passed over."""
    warnings: list[str] = []
    folders = sorted(
        (p for p in root.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True
    )
    for folder in folders:
        why = problem(folder)
        if why is None:
            return folder, warnings
        warnings.append(f"Checkpoint {folder} is passed over: {why}.")
    return None, warnings


def load(folder: Path) -> tuple[State, dict[str, Any]]:
    """The state and identity of a verified checkpoint. Raises CheckpointError with what is wrong."""
    why = problem(folder)
    if why is not None:
        raise CheckpointError(f"Checkpoint {folder} cannot be used: {why}.")
    numbers = json.loads((folder / "numbers.json").read_text())
    identity = json.loads((folder / MANIFEST).read_text())["identity"]
    state = State(
        numbers.pop("step"),
        load_file(folder / "weights.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        numbers,
    )
    return state, identity


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors: '<parameter number>.<name>'."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put flat tensors of `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
