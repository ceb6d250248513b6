"""Small runs in processes of their own, and what they left behind."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("tiny_run.py")
TIMED = ("seconds", "tokens_per_second", "memory")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """tiny(name, ranks=1, **options): runs `tiny_run.py` to its end in tmp_path/name."""

    def run(name: str, ranks: int = 1, env: dict[str, str] | None = None, **options: Any) -> Any:
        given = json.dumps({"out": str(tmp_path), "name": name, **options})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(SCRIPT), given]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(**(env or {})))

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what a clock or the machine says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in found]


def weights(folder: Path) -> dict[str, str]:
    """sha256 of the files of weights of the trained model."""
    files = sorted((folder / "model").glob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
