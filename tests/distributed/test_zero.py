"""DeepSpeed's ZeRO on two gloo ranks: moments, gradients and weights in parts train, save and resume as whole ones do.

Its extension for the CPU is compiled at the first start, which takes a minute.
"""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import character_tokenizer, load_model
from tests.conftest import FAMILIES
from tests.distributed.sameness import CHANGES, bits, distance, forget_the_last, same_ends, same_steps
from tests.faults.conftest import lines
from tests.faults.tiny_run import SIZES, make
from tests.sampling.fake_vllm import FakeVllm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]

# Else AdamW makes whole steps of gradients that are rounding, as an adapter's first are.
CALM = {**CHANGES, "adam_epsilon": 1e-3}


def env(stage: int) -> dict[str, str]:
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return {**asked, "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize("stage, lora", [(1, False), (2, False), (2, True), (3, False), (3, True)])
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
    parts_are = "weights, gradients and moments" if stage == 3 else "gradients and moments"
    assert f"DeepSpeed: {parts_are} in parts over 2 ranks" in ended.output
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


@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_goes_on_from_the_checkpoint_of_parts(
    stage: int, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    ended = two_ranks("parts", changes=CHANGES, env=env(stage))
    assert ended.status == 0, ended.output
    make({"out": str(tmp_path), "name": "one", "changes": CHANGES}).train()
    same_steps(tmp_path / "one", tmp_path / "parts")
    forget_the_last(tmp_path / "parts")
    make({"out": str(tmp_path), "name": "parts", "changes": CHANGES}).train(resume=True)
    same_steps(tmp_path / "one", tmp_path / "parts")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_nan_on_one_rank_skips_the_step_on_both_under_zero(
    stage: int, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    for run, asked in (("whole", {}), ("parts", env(stage))):
        ended = two_ranks(run, changes=CALM, fault="nan on the second rank once", at=2, env=asked)
        assert ended.status == 0, ended.output
    assert [line["skipped_updates"] for line in lines(tmp_path / "parts")] == [
        line["skipped_updates"] for line in lines(tmp_path / "whole")
    ]
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_warm_start_comes_before_the_parts(
    stage: int, two_ranks: Callable[..., Any], demonstrations: str, tmp_path: Path
) -> None:
    changes = {**CHANGES, "max_steps": 2, "warm_start_steps": 3, "warm_start_data_files": demonstrations}
    for run, asked in (("whole", {}), ("parts", env(stage))):
        ended = two_ranks(run, changes=changes, env=asked)
        assert ended.status == 0, ended.output
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert bits(whole / "start" / "model.safetensors") == bits(parts / "start" / "model.safetensors")
    same_steps(whole, parts)


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_that_are_sampled_ahead_of_train_as_whole_moments_do(
    stage: int, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """The engine of each rank's own process gets whole weights; what was in flight is in the checkpoint."""
    changes = {**CALM, "max_staleness": 1}
    for run, asked in (("whole", {}), ("parts", env(stage))):
        ended = two_ranks(run, changes=changes, env=asked)
        assert ended.status == 0, ended.output
    whole, parts, model = tmp_path / "whole", tmp_path / "parts", Path("model") / "model.safetensors"
    assert [line["staleness"] for line in lines(parts)] == [0, 1, 1, 1]
    same_steps(whole, parts)
    first = bits(parts / model)
    forget_the_last(parts)
    ended = two_ranks("parts", changes=changes, env=asked, resume=True)
    assert ended.status == 0, ended.output
    assert bits(parts / model) == first


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_weights_of_other_families_in_parts_train_as_whole_ones_do(
    family: str, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Tied embeddings; windows and soft caps, which are padded; biases and learned positions. With checkpointing."""
    changes = {**CALM, "max_steps": 2, "gradient_checkpointing": True}
    for run, asked in (("whole", {}), ("parts", env(3))):
        ended = two_ranks(run, changes=changes, sizes=FAMILIES[family], env=asked)
        assert ended.status == 0, ended.output
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same_steps(whole, parts)
    model = Path("model") / "model.safetensors"
    assert distance(parts / model, whole / model) < 1e-6


def test_a_run_of_weights_in_parts_ends_with_its_best_model(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    best = {"eval_steps": 1, "eval_on_start": True, "load_best_model_at_end": True}
    ended = two_ranks("r", changes={**CHANGES, **best, "max_steps": 2}, env=env(3))
    assert ended.status == 0, ended.output
    assert json.loads((tmp_path / "r" / "best" / "best.json").read_text())["step"] == 0
    assert distance(tmp_path / "r" / "model" / "model.safetensors", tmp_path / "r" / "best" / "model.safetensors") == 0


@pytest.mark.fake
def test_servers_follow_weights_in_parts(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """A stand-in for vLLM at each rank: every batch is checked there against the weights gathered for it."""
    tokenizer = character_tokenizer()
    model = load_model(ModelConfig(make=SIZES), tokenizer, seed=0)  # type: ignore[call-arg]
    servers = [FakeVllm(copy.deepcopy(model), tokenizer) for _ in range(2)]
    changes = {**CALM, "engine": "vllm", "vllm_urls": [server.url for server in servers]}
    ended = two_ranks("r", changes=changes, env=env(3))
    for server in servers:
        server.stop()
    assert ended.status == 0, ended.output
    assert [server.count("/collective_rpc") for server in servers] == [5, 5]  # the start, updates 1 to 4
    assert max(line["sampler_gap"] for line in lines(tmp_path / "r")) < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_in_parts_balance_the_experts_that_one_rank_balances(
    stage: int, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """The load-balancing loss under ZeRO, cut into passes of one row: counts of all ranks, then each rank's part."""
    sizes = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes.update(router_aux_loss_coef=1.0, initializer_range=0.5, num_key_value_heads=2)
    changes = {**CALM, "max_steps": 3, "save_steps": 0, "per_device_train_batch_size": 1}
    make({"out": str(tmp_path), "name": "one", "sizes": sizes, "changes": changes}).train()
    both = two_ranks("two", sizes=sizes, changes=changes, env=env(stage))
    assert both.status == 0, both.output
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("reward", "grad_norm", "aux_loss", "policy_loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name
    assert a["aux_loss"] > 0
