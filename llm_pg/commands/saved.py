"""`llm-pg checkpoint verify` and `llm-pg merge`: what a run has saved."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, load_config
from .evaluate import load_saved


def verify(path: Path) -> int:
    """Print what each checkpoint under `path` is: a checkpoint, a folder of them, or a run. 1 where one is damaged."""
    from ..run.saving import checkpoint_files

    places = [path, path / "checkpoints"]
    found = (
        [path] if path.name.startswith("step-") else [f for place in places for f in checkpoint_files.folders(place)]
    )
    if not found:
        raise ConfigError(
            f"There is no checkpoint at {path}. Give a step-* folder, the folder of several, or a run's folder."
        )
    damaged = 0
    for folder in found:
        why = checkpoint_files.problem(folder)
        damaged += why is not None
        if why is None:
            manifest = json.loads((folder / checkpoint_files.MANIFEST).read_text())
            size = sum(facts["size"] for facts in manifest["files"].values())
            print(f"{folder}: whole, {len(manifest['files'])} files, {size:,} bytes, every sha256 as written")
        else:
            print(f"{folder}: DAMAGED: {why}")
    return int(damaged > 0)


def merge(path: Path, target: Path | None) -> Path:
    """The adapter that a run saved, merged into its model and saved as one model; returns where it is.

    path: a run's folder, whose config says which model it was trained on, or an adapter's own folder.

    Raises ConfigError where the merged model does not compute what the adapter does; no file of it is then at `target`.
    """
    from ..model.merging import save_merged

    adapter = path / "model" if (path / "model").exists() else path
    if not (adapter / "adapter_config.json").exists():
        raise ConfigError(
            f"There is no adapter at {adapter} (no adapter_config.json). Give the folder of a run with use_peft=true "
            "or a peft_config, or the folder of an adapter; a run without one has whole weights in model/ already."
        )
    config = load_config(path / "config.yaml") if (path / "config.yaml").exists() else Config()
    config.model = config.model.model_copy(update={"load_in_4bit": False})
    folder = target or path / "merged"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merging-") as place:
        model, tokenizer = load_saved(config, adapter)
        save_merged(model, tokenizer, Path(place), _prompts_of_run(path, tokenizer))
        for file in Path(place).iterdir():
            file.replace(folder / file.name)
    return folder


def _prompts_of_run(path: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts whose completions a run wrote down at its last step; none where it wrote none."""
    texts: dict[str, None] = {}
    for file in sorted((path / "completions").glob("step-*.jsonl"))[-1:]:
        texts.update(dict.fromkeys(json.loads(line)["prompt"] for line in file.read_text().splitlines()))
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
