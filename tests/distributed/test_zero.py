"""DeepSpeed's ZeRO on two gloo ranks: moments and gradients in parts train, save and resume as whole ones do.

Its extension for the CPU is compiled at the first start, which takes a minute.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.sameness import CHANGES, bits, distance, forget_the_last, same_ends, same_steps
from tests.faults.conftest import lines
from tests.faults.tiny_run import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]

# Else AdamW makes whole steps of gradients that are rounding, as an adapter's first are.
CALM = {**CHANGES, "adam_epsilon": 1e-3}


def env(stage: int) -> dict[str, str]:
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return {**asked, "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize("stage, lora", [(1, False), (2, False), (2, True)])
def test_parts_train_save_and_resume_as_whole_moments_do(
    stage: int, lora: bool, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Four runs on two ranks: DDP; ZeRO; ZeRO again from its own step 2 and from that of DDP. Ranks need other numbers
    of micro-batches, gradients are clipped, and weight decay makes two groups of parameters."""
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    changes = {**CALM, "weight_decay": 0.1, "max_grad_norm": 0.05}
    for run, asked in (("whole", {}), ("parts", env(stage))):
        ended = two_ranks(run, changes=changes, lora=lora, env=asked)
        assert ended.status == 0, ended.output
    assert "DeepSpeed: gradients and moments in parts over 2 ranks" in ended.output
    whole, parts, model = tmp_path / "whole", tmp_path / "parts", Path("model") / name
    same_steps(whole, parts)
    assert max(line["grad_norm"] for line in lines(parts)) > 0.05
    same_ends(parts, whole, str(model))
    first = bits(parts / model)
    for run in (parts, whole):
        forget_the_last(run)
        ended = two_ranks(run.name, changes=changes, lora=lora, env=env(stage), resume=True)
        assert ended.status == 0, ended.output
    assert bits(parts / model) == first
    assert distance(whole / model, parts / model) < 1e-6


def test_one_process_goes_on_from_the_checkpoint_of_parts(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    ended = two_ranks("parts", changes=CHANGES, env=env(2))
    assert ended.status == 0, ended.output
    make({"out": str(tmp_path), "name": "one", "changes": CHANGES}).train()
    same_steps(tmp_path / "one", tmp_path / "parts")
    forget_the_last(tmp_path / "parts")
    make({"out": str(tmp_path), "name": "parts", "changes": CHANGES}).train(resume=True)
    same_steps(tmp_path / "one", tmp_path / "parts")


def test_a_nan_on_one_rank_skips_the_step_on_both_under_zero(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    for run, asked in (("whole", {}), ("parts", env(2))):
        ended = two_ranks(run, changes=CALM, fault="nan on the second rank once", at=2, env=asked)
        assert ended.status == 0, ended.output
    assert [line["skipped_updates"] for line in lines(tmp_path / "parts")] == [
        line["skipped_updates"] for line in lines(tmp_path / "whole")
    ]
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_a_warm_start_comes_before_the_parts(
    two_ranks: Callable[..., Any], demonstrations: str, tmp_path: Path
) -> None:
    changes = {**CHANGES, "max_steps": 2, "warm_start_steps": 3, "warm_start_data_files": demonstrations}
    for run, asked in (("whole", {}), ("parts", env(2))):
        ended = two_ranks(run, changes=changes, env=asked)
        assert ended.status == 0, ended.output
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert bits(whole / "start" / "model.safetensors") == bits(parts / "start" / "model.safetensors")
    same_steps(whole, parts)
