"""How large a model is, and what training it takes, computed without loading it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..config.schema import ModelConfig

_NAMED = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
# Computed at a time, by the chunk (`model.head`), and their copies in float32: logits, log-softmax and its gradient.
LOGITS_AT_ONCE, LOGITS_COPIES = 1 << 24, 3
LOGITS_KEPT = 1 << 26  # probabilities of the first chunks stay for the backward pass


@dataclass(frozen=True)
class Sizes:
    """Of a model. vocabulary and context: 0 = unknown."""

    parameters: float
    vocabulary: int
    context: int


def sizes_of(model: ModelConfig) -> Sizes | None:
    """From `make`, a local folder's config.json, or the number of parameters in a hub name; None = unknown."""
    if model.make:
        return _of_config(model.make)
    if not model.model_name_or_path:
        return None
    path = Path(model.model_name_or_path).expanduser() / "config.json"
    if path.is_file():
        return _of_config(json.loads(path.read_text()))
    named = _NAMED.findall(model.model_name_or_path.split("/")[-1])
    if not named:
        return None
    number, unit = named[-1]
    return Sizes(float(number) * (1e9 if unit.lower() == "b" else 1e6), 0, 0)


def _of_config(values: dict[str, Any]) -> Sizes | None:
    hidden, layers = values.get("hidden_size"), values.get("num_hidden_layers")
    if not hidden or not layers:
        return None
    heads = values.get("num_attention_heads") or 1
    shared = values.get("num_key_value_heads") or heads
    inner = values.get("intermediate_size") or 4 * hidden
    vocabulary = values.get("vocab_size") or 0
    layer = hidden * hidden * (2 + 2 * shared / heads) + 3 * hidden * inner
    tables = 1 if values.get("tie_word_embeddings") else 2
    return Sizes(layers * layer + tables * vocabulary * hidden, vocabulary, values.get("max_position_embeddings") or 0)


def training_bytes(config: Config, sizes: Sizes, reference: bool, micro_rows: int) -> dict[str, int]:
    """Bytes by part: a lower bound, as activations beside the logits are left out.

    What is trained is held in float32 whatever the model comes in (`training.precision`).
    """
    model = config.model
    if model.use_peft:
        trained = 0.02 * sizes.parameters
        weights = sizes.parameters * _BYTES[model.dtype]
        parts = {"weights": weights, "gradients and AdamW": trained * 3 * _BYTES["float32"]}
    else:
        weights = sizes.parameters * _BYTES["float32"]
        parts = {"weights": weights, "gradients and AdamW": 3 * weights}
        if reference:
            parts["reference"] = weights
    if model.teacher_model_name_or_path:
        teacher = sizes_of(ModelConfig.model_validate({"model_name_or_path": model.teacher_model_name_or_path}))
        kind = model.teacher_model_init_kwargs.get("dtype", "auto")
        parts["teacher"] = 0 if teacher is None else teacher.parameters * _BYTES.get(str(kind), 4)
    rows = micro_rows * config.rollout.max_completion_length
    if sizes.vocabulary:
        every = rows * sizes.vocabulary
        parts["logits"] = 4 * (min(every, LOGITS_AT_ONCE) * LOGITS_COPIES + min(every, LOGITS_KEPT))
    return {name: int(size) for name, size in parts.items()}


def checkpoint_bytes(config: Config) -> int | None:
    """Of one checkpoint, or with save_steps 0 of the model that is saved at the end; None = unknown. A lower bound."""
    model = config.model
    stored = _stored_parameters(Path(model.model_name_or_path).expanduser()) if model.model_name_or_path else 0
    if not stored:
        sizes = sizes_of(model)
        if sizes is None:
            return None
        stored = int(sizes.parameters)
    trained = stored // 100 if model.use_peft else stored
    return trained * _BYTES["float32"] * (3 if config.run.save_steps else 1)


def _stored_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers; 0 = there are none that can be read."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, _LARGEST_HEADER)))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0
    return total


def available_bytes() -> int | None:
    """This machine's memory; None where an accelerator is present, whose memory only its driver knows."""
    if shutil.which("nvidia-smi") or not hasattr(os, "sysconf"):
        return None
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"
