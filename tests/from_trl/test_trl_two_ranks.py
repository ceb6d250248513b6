"""Callbacks on two gloo ranks: both see the same run, and what one asks for happens on both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.faults
def test_two_ranks_hear_the_same_events_and_stop_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "two_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["is_first"], second["is_first"]) == (True, False)
    assert first["events"] == second["events"]
    assert first["rows"] == 4 * 2 * 2  # completions of a pass × passes of a step × ranks
    assert (first["steps"], [event[0] for event in first["events"]]) == (3, [1, "evaluate", 2, "save", 3, 3])
    # asked for by the callback, and that of the last step
    assert {path.name for path in (tmp_path / "r" / "checkpoints").glob("step-*")} == {"step-000002", "step-000003"}
