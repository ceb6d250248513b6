"""Whole runs of a trainer on an accelerator: the metrics and weights of the CPU's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.device import room
from tests.device.room import Done
from tests.device.test_updates import assert_same
from tests.environments import partners

RUNS: dict[str, dict[str, Any]] = {
    "dynamic sampling": {"dynamic_sampling_max_rounds": 2, "temperature": 0.2},
    "an environment": {
        "reward": None, "environment": f"{partners.__name__}:Echo", "max_turns": 3, "max_turn_length": 4,
        "max_completion_length": 24, "stop": list("abcdefghijklmnopqrstuvwxyz0123456789"),
        "rows": [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)],
    },
    "a reference and an evaluation": {"beta": 0.05, "num_eval_prompts": 4, "eval_num_samples": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_there_is_that_of_the_cpu(name: str, tmp_path: Path, on_sim: Callable[..., Done]) -> None:
    done = on_sim(room.run, str(tmp_path / "there"), **RUNS[name])
    here = room.run(str(tmp_path / "here"), device="cpu", **RUNS[name])
    assert (done.numbers.pop("device"), here.numbers.pop("device")) == ("sim", "cpu")
    assert_same(here, done)


def test_a_run_that_is_resumed_there_ends_as_one_that_was_not_stopped(
    tmp_path: Path, on_sim: Callable[..., Done]
) -> None:
    whole = on_sim(room.run, str(tmp_path / "whole"))
    on_sim(room.run, str(tmp_path / "cut"), stop_after=2)
    cut = on_sim(room.run, str(tmp_path / "cut"), resume=True)
    assert whole.numbers.keys() == cut.numbers.keys()
    for name, value in whole.numbers.items():
        assert np.array_equal(cut.numbers[name], value), name
