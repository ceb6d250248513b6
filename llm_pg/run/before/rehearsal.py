"""What the end of a run needs, tried before its first step: all but the weights is saved once, and thrown away."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...config import ConfigError
from ...distributed.tensors import shape_of
from ...model.merging import rehearse_merge
from ..saving.folder import said_by_disk


def rehearse_end(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    merges: bool = False,
    prompts: Sequence[Sequence[int]] = (),
) -> None:
    """Saves the configs of the model and of its generation, adapters and the tokenizer, beside the run.

    Args:
        folder: of the run. merges: also save the model with its adapter merged in, and compare it on `prompts` (token
            ids; see `merging.save_merged`).

    Raises ConfigError where one of them cannot be saved, the merged model would not be what is trained, or the disk has
    no room for the model: all are found here, and not after the last step.
    """
    bodies = {"config": model.config}
    if getattr(model, "can_generate", lambda: False)():
        bodies["generation_config"] = model.generation_config
    if hasattr(model, "peft_config"):
        bodies["adapter"] = model
    bodies["tokenizer"] = tokenizer
    with tempfile.TemporaryDirectory(dir=folder, prefix=".rehearsal-") as place:
        for name, body in bodies.items():
            _try(name, body.save_pretrained, place)
    need, free = model_bytes(model, merges=merges), shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"There is no room for the trained model: it needs {need:,} bytes at {folder}, where {free:,} are free. "
            "Free some, or set run.output_dir elsewhere."
        )
    if merges:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".rehearsal-") as place:
            rehearse_merge(model, tokenizer, Path(place), prompts)


def _try(name: str, save: Callable[[str], Any], place: str) -> None:
    advice = {
        "generation_config": "A sampling setting without do_sample is the usual cause: set "
        "model.generation_config.do_sample = True, or put the settings that the message names back to None.",
        "tokenizer": "Give a tokenizer that AutoTokenizer.from_pretrained can read back.",
    }
    try:
        save(place)
    except Exception as error:
        if isinstance(error, OSError) or said_by_disk(error) is not None:
            raise  # the disk, of which the caller speaks
        # Whatever a library of the model's raises, the run would end with it.
        raise ConfigError(
            f"The model could not be saved at the end of the run: its {name} refuses ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}). {advice.get(name, 'Set what it names before the run.')}"
        ) from None


def model_bytes(model: Any, *, merges: bool = False) -> int:
    """Of what is written at the end: the adapter's weights where there is one, else all of them; merges: both."""
    own = hasattr(model, "peft_config") and not merges
    parameters = [p for p in model.parameters() if p.requires_grad or not own]
    return sum(math.prod(shape_of(p)) * p.element_size() for p in parameters)
