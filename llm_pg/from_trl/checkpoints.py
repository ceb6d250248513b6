"""Checkpoints where transformers looks for them: `<output_dir>/checkpoint-100` leads to the run's own."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-\d+")


def link_checkpoint(output_dir: Path, folder: Path, step: int) -> None:
    """Makes `checkpoint-<step>` in `output_dir` a link to the folder of a checkpoint, and takes links out that lead
    nowhere any more. What is there and is no link stays. A file system without links is left as it is."""
    with contextlib.suppress(OSError):
        for place in output_dir.glob("checkpoint-*"):
            if _NAME.fullmatch(place.name) and place.is_symlink() and not place.exists():
                place.unlink()
        place = output_dir / f"checkpoint-{step}"
        if place.is_symlink():
            place.unlink()
        if not place.exists():
            place.symlink_to(os.path.relpath(folder, output_dir), target_is_directory=True)
