"""Small runs in processes of their own, and what they left behind."""

import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tiny_run

GRACE = 60.0  # seconds that ranks have to end once one of them has failed
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


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Ended]:
    """ranks(name, count=2, env=None, **options): a run of `tiny_run` on `count` gloo ranks, to its end.

    Nobody ends the others when one fails, as torchrun would: they must end by themselves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.tiny_run"])

    def run(name: str, count: int = 2, env: dict[str, str] | None = None, **options: Any) -> Ended:
        given = {"out": str(tmp_path), "name": name, **options}
        logs = [tmp_path / f"{name}-{rank}.log" for rank in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        more = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        children = []
        for rank, log in enumerate(logs):
            own = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()} | more
            children.append(context.Process(target=tiny_run.logged, args=(given, own, str(log))))
            children[-1].start()
        statuses = _ended(children, 200)
        return Ended(next((s for s in statuses if s), 0), "".join(log.read_text() for log in logs))

    return run


def _ended(children: list[Any], seconds: float) -> list[int]:
    """Exit statuses; a child that outlives its time, or the failure of another by `GRACE`, fails the test."""
    deadline = time.monotonic() + seconds
    while any(child.exitcode is None for child in children) and time.monotonic() < deadline:
        if any(child.exitcode for child in children):
            deadline = min(deadline, time.monotonic() + GRACE)
        children[0].join(0.05) if children[0].exitcode is None else time.sleep(0.05)
    late = [rank for rank, child in enumerate(children) if child.exitcode is None]
    for rank in late:
        children[rank].kill()
        children[rank].join()
    assert not late, f"ranks {late} did not end"
    return [int(child.exitcode) for child in children]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what a clock or the machine says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in found]


def weights(folder: Path) -> dict[str, str]:
    """sha256 of the files of weights of the trained model."""
    files = sorted((folder / "model").glob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
