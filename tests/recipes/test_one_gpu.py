"""The command for a machine with one GPU, whole at tiny sizes: on a CPU, and on the simulated accelerator."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import shipped
from tests.device import room
from tests.device.conftest import on_sim  # noqa: F401 - a fixture

FOLDER = shipped.folder("recipes") / "benchmarks"
CHECKS = ["native against generate", "fixed shapes, graphs", "flex against padded", "bfloat16", "LoRA", "resume"]
SPEEDS = ["decode, tiny, 8 rows", "decode, tiny, 16 rows", "update, tiny, 16 rows"]


def loaded() -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module("one_gpu")


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def simulated(path: str, *, device: str) -> dict[str, dict[str, Any]]:
    """Without TRL, whose trainer is not ours to mend."""
    from llm_pg.model import flex
    from llm_pg.run import inputs
    from llm_pg.sampling.static import batch

    one_gpu = loaded()
    one_gpu.common.DEVICE = torch.device(device)
    # Such tensors are of a class of their own and have no address.
    batch.stands_whole, batch.state_of, inputs.check_trainable = lambda _: True, lambda _: (), lambda _: None
    flex.attention_kernel = lambda kind: room.dense
    one_gpu.against_trl = lambda *_: {}
    one_gpu.main(["--tiny", "--json", path])
    return rows_of(Path(path))


def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    assert loaded().main(["--tiny", "--json", str(tmp_path / "out.json")]) == 0
    rows = rows_of(tmp_path / "out.json")
    assert list(rows) == [*CHECKS, *SPEEDS, "step against TRL, tiny", "quickstart"]
    assert {name for name, row in rows.items() if row["result"] != "ok"} == {"quickstart"}
    assert all(rows[name]["tokens_per_second"] > 0 for name in SPEEDS)
    assert 0 < rows[SPEEDS[-1]]["mfu"] < 2
    assert rows["resume"]["weight_gap"] == 0


def test_the_checks_and_the_measurements_run_on_an_accelerator(
    tmp_path: Path,
    on_sim: Callable[..., Any],  # noqa: F811
) -> None:
    rows = on_sim(simulated, str(tmp_path / "out.json"))
    assert {name: row.get("why") for name, row in rows.items() if row["result"] in ("failed", "wrong")} == {}
    assert all(rows[name]["result"] == "ok" for name in [*CHECKS, *SPEEDS])


def test_what_has_no_time_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part that fails or finds a wrong number ends none of the others."""
    one_gpu = loaded()

    def fails(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError("nothing to divide")

    def wrong(*_: Any) -> dict[str, Any]:
        raise one_gpu.WrongResult("another number")

    report = one_gpu.Report(tmp_path / "out.json", 100.0)
    report.run("fails", 0, fails)
    report.run("wrong", 0, wrong)
    report.run("long", 1000, lambda: {"number": 1})
    report.run("right", 0, lambda: {"number": 1})
    report.seconds = 1.0
    report.run("hangs", 0, lambda: time.sleep(60))
    rows = rows_of(tmp_path / "out.json")
    results = {"fails": "failed", "wrong": "wrong", "long": "skipped", "right": "ok", "hangs": "skipped"}
    assert {name: row["result"] for name, row in rows.items()} == results
    assert "nothing to divide" in rows["fails"]["why"]
    assert "1000 s" in rows["long"]["why"]
