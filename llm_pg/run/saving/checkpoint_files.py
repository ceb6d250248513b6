"""Saving and resuming: safetensors and JSON, committed by a manifest that is written last.

A folder without a whole manifest is no checkpoint. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
FILES = {"weights.safetensors", "optimizer.safetensors", "numbers.json"}
IN_FLIGHT = "in_flight.safetensors"  # beside them where completions were sampled ahead
_FORMAT, _UNSIGNED_FORMAT = 3, 2  # of a manifest, with its own checksum and without
_CHECKSUM, _ZEROS = "checksum", "0" * 64
_NAME_OF_TRANSFORMERS = re.compile(r"checkpoint-\d+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or trusted."""


@dataclass
class RunState:
    """What a run needs to go on: trainable weights by name, optimiser moments, small numbers, and batches that were
    sampled ahead."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, Any]
    in_flight: dict[str, Tensor] = field(default_factory=dict)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def save(
    root: Path,
    state: RunState,
    identity: dict[str, Any],
    keep: int | None = None,
    protected: Collection[int] = (),
    write_model: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a checkpoint of `state` under `root` and drop the oldest beyond `keep`.

    Args:
        identity: what must be the same to go on (config, data fingerprint, versions); kept in the manifest.
        protected: steps that are kept however old they are.
        write_model: writes what `from_pretrained` reads beside the state, into the folder.

    Raises:
        CheckpointError: when a weight is not finite, or the disk has no room; older checkpoints stay.
    """
    bad = [name for name, value in state.weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"Step {state.step} was not saved: {len(bad)} of {len(state.weights)} weights hold NaN or inf "
            f"({bad[0]} first). The last good checkpoint stays."
        )
    folder, need = folder_of(root, state.step), size(state)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove(folder)
        check_room(root, need)
        folder.mkdir()
        for name, tensors in (("weights", state.weights), ("optimizer", state.optimizer)):
            held = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
            save_file(held, folder / f"{name}.safetensors", {"format": "pt"})  # so that transformers reads it
        if state.in_flight:
            save_file({k: v.contiguous().cpu() for k, v in state.in_flight.items()}, folder / IN_FLIGHT)
        (folder / "numbers.json").write_text(json.dumps({"step": state.step, **state.numbers}, indent=1))
        write_model(folder)
        _commit(folder, {"format": _FORMAT, "step": state.step, "identity": identity})
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(root).free if root.exists() else 0
        with contextlib.suppress(OSError):
            remove(folder)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"Step {state.step} was not saved: it needs {need:,} bytes at {folder}, where {free:,} are free ({why}). "
            "Older checkpoints stay."
        ) from None
    if keep is not None:
        for old in sorted(whole(root))[:-keep]:
            if old not in protected:
                remove(folder_of(root, old))
    return folder


def size(state: RunState) -> int:
    """Bytes of the tensors of a checkpoint, which are all but a few kilobytes of it."""
    parts = (state.weights, state.optimizer, state.in_flight)
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def check_room(root: Path, need: int) -> None:
    """CheckpointError when the disk under `root` has no room for `need` bytes."""
    place = next(p for p in (root, *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need * 1.05:
        raise CheckpointError(
            f"There is no room for a checkpoint: it needs {need:,} bytes at {root}, which has {free:,}."
        )


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: what a kill leaves behind is then no checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _commit(folder: Path, head: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    digests: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        facts = path.stat()  # a hard link is another name of the same file
        digests[facts.st_ino] = digests.get(facts.st_ino) or _sha256(path)
        files[path.name] = {"size": facts.st_size, "sha256": digests[facts.st_ino]}
    with (folder / MANIFEST).open("w") as file:
        file.write(manifest_text({**head, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)
    _sync(folder.parent)


def manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as text with a checksum of that text, in which the checksum itself counts as zeros."""
    text = json.dumps({**manifest, _CHECKSUM: _ZEROS}, indent=1)
    return text.replace(_ZEROS, hashlib.sha256(text.encode()).hexdigest())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where the text is not what was written. Manifests of format 2 have no checksum."""
    text = (folder / MANIFEST).read_bytes().decode()
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise ValueError("no object")
    given = manifest.get(_CHECKSUM)
    if given is None and manifest.get("format") != _UNSIGNED_FORMAT:
        raise ValueError("no checksum")
    if given is not None and manifest_text({k: v for k, v in manifest.items() if k != _CHECKSUM}) != text:
        raise ValueError("another checksum")
    return manifest


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problem(folder: Path) -> str | None:
    """Why this folder is no whole checkpoint; None when it is one."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return "it has no manifest, so it was not written to the end"
    except (OSError, ValueError, RecursionError):
        return "its manifest is not what was written"
    if not _well_formed(manifest):
        return "its manifest is of another format"
    return next((why for name, facts in manifest["files"].items() if (why := _damage(folder / name, facts))), None)


def _well_formed(manifest: Any) -> bool:
    """Our files, and those of the model, by plain names: a manifest cannot point outside its folder."""
    return (
        isinstance(manifest, dict)
        and manifest.get("format") in (_FORMAT, _UNSIGNED_FORMAT)
        and isinstance(manifest.get("identity"), dict)
        and isinstance(manifest.get("files"), dict)
        and set(manifest["files"]) >= FILES
        and all(Path(name).name == name for name in manifest["files"])
        and all(isinstance(facts, dict) and {"size", "sha256"} <= set(facts) for facts in manifest["files"].values())
    )


def _damage(path: Path, facts: dict[str, Any]) -> str | None:
    if not path.is_file() or path.is_symlink():
        return f"{path.name} is missing"
    if path.stat().st_size != facts["size"]:
        return f"{path.name} has {path.stat().st_size} bytes where {facts['size']} were written"
    if _sha256(path) != facts["sha256"]:
        return f"{path.name} does not have the sha256 that was written"
    return None


def whole(root: Path) -> list[int]:
    """Steps of the folders that have a manifest (not yet verified)."""
    return [int(p.name[5:]) for p in folders(root) if (p / MANIFEST).exists()]


def folders(root: Path) -> list[Path]:
    """All folders named as checkpoints, whole or not, in the order of their steps."""
    return sorted((p for p in root.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def set_aside(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, which a run is going to do again: they would be taken for its newest, and
    make its own the oldest, which are dropped. Their new places."""
    aside = []
    for folder in folders(root):
        if int(folder.name[5:]) > step and (folder / MANIFEST).exists():
            place = folder.with_name(f"{folder.name}.replaced")
            if place.exists():
                shutil.rmtree(place)
            aside.append(folder.rename(place))
    return aside


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest verified checkpoint, and one warning for each newer folder that had to be passed over."""
    warnings: list[str] = []
    for folder in reversed(folders(root)):
        why = problem(folder)
        if why is None:
            return folder, warnings
        warnings.append(f"Checkpoint {folder} is passed over: {why}.")
    return None, warnings


def load(folder: Path) -> tuple[RunState, dict[str, Any]]:
    """The state and identity of a verified checkpoint. Raises CheckpointError with what is wrong."""
    why = problem(folder)
    if why is not None:
        raise CheckpointError(f"Checkpoint {folder} cannot be used: {why}.")
    try:
        numbers = json.loads((folder / "numbers.json").read_text())
        state = RunState(
            int(numbers.pop("step")),
            load_file(folder / "weights.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            numbers,
            load_file(folder / IN_FLIGHT) if (folder / IN_FLIGHT).exists() else {},
        )
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # The hashes were right, so somebody wrote other content and a manifest for it.
        raise CheckpointError(
            f"Checkpoint {folder} cannot be used: its files are not safetensors and JSON of this format "
            f"({type(error).__name__}: {error}). Nothing of it was executed."
        ) from None
    return state, _read_manifest(folder)["identity"]


def link_checkpoint(output_dir: Path, folder: Path, step: int) -> None:
    """Makes `checkpoint-<step>` in `output_dir`, where transformers looks for it, a link to the folder of a checkpoint.

    Links there that lead nowhere any more are removed. What is there and is no link stays. A file system without links
    is left as it is.
    """
    with contextlib.suppress(OSError):
        for place in output_dir.glob("checkpoint-*"):
            if _NAME_OF_TRANSFORMERS.fullmatch(place.name) and place.is_symlink() and not place.exists():
                place.unlink()
        place = output_dir / f"checkpoint-{step}"
        if place.is_symlink():
            place.unlink()
        if not place.exists():
            place.symlink_to(os.path.relpath(folder, output_dir), target_is_directory=True)
