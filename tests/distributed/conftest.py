"""Ranks of one run: two under torchrun, as the fault tests start them, or any number forked with all imports done."""

import json
import multiprocessing
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tiny_run
from tests.faults.conftest import Ended, launch, two_ranks

__all__ = ["launch", "two_ranks"]
GRACE = 60.0  # seconds that ranks have to end once one of them has failed


@pytest.fixture
def demonstrations(tmp_path: Path) -> str:
    """A file for a warm start."""
    path = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
