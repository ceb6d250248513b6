"""Small runs in processes of their own, and what they left behind."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tiny_run

SCRIPT = Path(__file__).with_name("tiny_run.py")
TIMED = ("seconds", "tokens_per_second", "train_tokens_per_second", "mfu", "memory")


@dataclass
class Ended:
    """A process that ended: its exit status (minus a signal's number), and all it printed."""

    status: int
    output: str


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Ended]:
    """tiny(name, env=None, **options): a run of `tiny_run` in a process of its own.

    It is forked from a server that has imported all and started no thread, so it costs no seconds of imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.tiny_run"])

    def run(name: str, env: dict[str, str] | None = None, **options: Any) -> Ended:
        given = {"out": str(tmp_path), "name": name, **options}
        log = tmp_path / f"{name}.log"
        child = context.Process(target=tiny_run.logged, args=(given, {"OMP_NUM_THREADS": "1", **(env or {})}, str(log)))
        child.start()
        child.join(200)
        if child.exitcode is None:
            child.kill()
            child.join()
        assert child.exitcode is not None
        return Ended(child.exitcode, log.read_text())

    return run


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Two processes under torchrun, with gloo on the CPU, just started."""

    def start(name: str, env: dict[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
        given = json.dumps({"out": str(tmp_path), "name": name, **options})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        more = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        return subprocess.Popen(
            [*command, str(SCRIPT), given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **more},
        )

    return start


@pytest.fixture
def two_ranks(launch: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., Ended]:
    """The same, to its end."""

    def run(name: str, env: dict[str, str] | None = None, **options: Any) -> Ended:
        process = launch(name, env, **options)
        output, _ = process.communicate(timeout=200)
        return Ended(process.returncode, output)

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
