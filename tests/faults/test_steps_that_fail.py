"""R8 to R12: other settings, signals, exceptions and numbers that are none, each in a real run."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_pg.config import ConfigError
from llm_pg.run.guard import FiniteCheck, RunStopped
from llm_pg.run.saving import checkpoint_files
from tests.faults.conftest import lines, weights
from tests.faults.tiny_run import inject, make
from tests.seams import Steps

pytestmark = pytest.mark.faults
IN_PROCESS = {"reward_in_process": True}


def whole_run(tmp_path: Path) -> Path:
    make({"out": str(tmp_path), "name": "whole", "changes": IN_PROCESS}).train()
    return tmp_path / "whole"


@pytest.mark.parametrize("name", ["sigterm", "sigint"])
def test_a_signal_lets_the_step_end_saves_it_and_a_resume_goes_on(
    name: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Exit status 128 + signal, as a shell has it; one line on how to go on, and no traceback."""
    ended = tiny("cut", fault=name, at=3, changes=IN_PROCESS)
    number = signal.SIGTERM if name == "sigterm" else signal.SIGINT
    assert ended.status == 128 + number, ended.output
    assert "Traceback" not in ended.output
    assert f"{number.name}: ended after step 3 of 6; its state is saved" in ended.output
    assert (
        checkpoint_files.newest(tmp_path / "cut" / "checkpoints")[0] == tmp_path / "cut" / "checkpoints" / "step-000003"
    )
    make({"out": str(tmp_path), "name": "cut", "changes": IN_PROCESS}).train(resume=True)
    assert lines(whole_run(tmp_path)) == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_a_second_sigint_ends_at_once(tiny: Callable[..., Any]) -> None:
    """The step that it comes in sleeps for a minute after it."""
    ended = tiny("cut", fault="twice", at=2, changes=IN_PROCESS)
    assert ended.status == -signal.SIGINT
    assert "A second one ends at once" in ended.output


def test_an_exception_in_a_step_keeps_the_batch_and_the_state_before_it(tmp_path: Path) -> None:
    trainer = make({"out": str(tmp_path), "name": "cut", "changes": IN_PROCESS})
    inject(trainer, "raise", 4)
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    bundle = tmp_path / "cut" / "crash" / "step-000004"
    assert "injected: the loss is broken" in (bundle / "error.txt").read_text()
    rows = [json.loads(line) for line in (bundle / "completions.jsonl").read_text().splitlines()]
    tensors = load_file(bundle / "batch.safetensors")
    assert len(rows) == 16 == len(tensors["tokens"])
    assert [row["ids"] for row in rows] == [
        ids[mask.bool()].tolist() for ids, mask in zip(tensors["tokens"], tensors["mask"], strict=True)
    ]
    make({"out": str(tmp_path), "name": "cut", "changes": IN_PROCESS}).train(resume=True)
    assert lines(whole_run(tmp_path)) == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_a_loss_that_stays_nan_stops_the_run_after_five_steps_and_is_logged_as_nan(tmp_path: Path) -> None:
    trainer = make({"out": str(tmp_path), "name": "r", "changes": {**IN_PROCESS, "max_steps": 12, "beta": 0.05}})
    inject(trainer, "nan", 3)
    before: dict[int, Any] = {}

    def watched(step: int) -> None:
        before[step] = [p.detach().clone() for p in trainer.model.parameters()]

    trainer.add_callback(Steps(before=watched))
    with pytest.raises(RunStopped, match="5 optimiser steps in a row were skipped, the last in step 7"):
        trainer.train()
    found = lines(tmp_path / "r")
    assert [line["skipped_updates"] for line in found] == [0, 0, 1, 1, 1, 1, 1]
    assert found[2]["grad_norm"] is None
    assert {"grad_norm", "policy_loss"} <= set(found[2]["nan"])
    assert all((a == b).all() for a, b in zip(before[3], trainer.model.parameters(), strict=True))
    assert checkpoint_files.newest(tmp_path / "r" / "checkpoints")[0] is not None


def test_skips_that_are_not_in_a_row_stop_nothing() -> None:
    check = FiniteCheck(limit=3)
    for step in range(10):
        check.observe([False, False, True], step)
    with pytest.raises(RunStopped, match="step 12"):
        check.observe([False, False, False], 12)


def test_other_settings_are_refused_with_a_table_and_can_be_overridden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {**IN_PROCESS, "save_steps": 2, "max_steps": 2}
    make({"out": str(tmp_path), "name": "r", "changes": saved}).train()
    other = {**saved, "learning_rate": 0.5, "num_generations": 8, "max_steps": 4, "lr_scheduler_type": "constant"}
    given = {"out": str(tmp_path), "name": "r", "changes": {**other, "seed": 1}}
    rows = [{"prompt": f"{a}*{b}=", "answer": "1"} for a in range(5) for b in range(5)]
    with pytest.raises(ConfigError) as refused:
        make({**given, "rows": rows}).train(resume=True)
    text = str(refused.value)
    for setting, then, now in (
        ("train.learning_rate", "0.01", "0.5"),
        ("rollout.num_generations", "4", "8"),
        ("run.seed", "0", "1"),
        ("train.max_steps", "2", "4"),
    ):
        assert any(line.split() == [setting, then, now] for line in text.splitlines()), text
    assert "\n  data " in text
    assert "--override" in text
    trainer = make({**given, "rows": rows})
    trainer.train(resume=True, override=True)
    assert [line["learning_rate"] for line in lines(tmp_path / "r")] == [0.01, 0.01, 0.5, 0.5]
    assert "Overridden: train.learning_rate: 0.01 then, 0.5 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "then, now",
    [
        ({}, {"weight_decay": 0.1}),
        ({"weight_decay": 0.1}, {}),
        ({}, {"curriculum": "pass_rate"}),
        ({"num_iterations": 2}, {"num_iterations": 2, "kl_target": 0.01}),
    ],
    ids=["decay, from now on", "decay no more", "a curriculum from now on", "a KL target from now on"],
)
def test_an_overridden_setting_leaves_each_weight_its_own_moments(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    """Weight decay puts the weights in two groups of the optimiser, and so in another order."""

    def moments(trainer: Any) -> dict[str, Any]:
        state = trainer.optimizer.state
        return {name: state[p]["exp_avg"].clone() for name, p in trainer.model.named_parameters()}

    given = {"out": str(tmp_path), "name": "r"}
    first = make({**given, "changes": {**IN_PROCESS, "save_steps": 2, "max_steps": 2, **then}})
    first.train()
    saved = moments(first)
    second = make({**given, "changes": {**IN_PROCESS, "max_steps": 3, **now}})
    found: dict[str, Any] = {}
    second.add_callback(Steps(before=lambda _: found.update(moments(second))))
    second.train(resume=True, override=True)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())


def test_a_damaged_checkpoint_that_was_named_stops_and_is_not_replaced_by_another(tmp_path: Path) -> None:
    changes = {**IN_PROCESS, "save_steps": 1, "max_steps": 2}
    make({"out": str(tmp_path), "name": "r", "changes": changes}).train()
    named = tmp_path / "r" / "checkpoints" / "step-000002"
    data = bytearray((named / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (named / "weights.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"step-000002 cannot be used: model.safetensors does not have the sha256"):
        make({"out": str(tmp_path), "name": "r", "changes": changes}).train(resume=str(named))
