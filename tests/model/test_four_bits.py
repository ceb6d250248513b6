"""Weights in 4 bits below an adapter, by bitsandbytes, which runs on a CPU too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import load_model
from llm_pg.model.policy import Policy
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from tests.distributed.shard_worker import rollouts

bitsandbytes = pytest.importorskip("bitsandbytes")
PARAMS = SamplingParams(max_completion_length=5)


@pytest.fixture
def folder(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> str:
    model = make_model("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():  # so large that most of a gradient comes through them
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.mul_(10.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def adapter_gradient(model: Any, samples: bool, tokenizer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of one pass, after sampling or without it; and the log-probabilities."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
            elif "lora_A" in name:
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p).sin())
    if samples:
        NativeSampler(model, tokenizer, [1]).sample([(4, 5), (6,)], 2, PARAMS, torch.arange(4))
    policy = Policy(model, params=PARAMS, pad_id=0)
    logp_BT = policy.forward(rollouts(0)).logp_BT
    (logp_BT * torch.linspace(-1, 2, logp_BT.numel()).view_as(logp_BT)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, logp_BT.detach()


def test_the_gradient_through_4_bits_is_that_of_the_same_numbers_in_full_after_sampling_too(
    folder: str, tokenizer: Any
) -> None:
    """A layer that bitsandbytes packed for a CPU while sampling passed no gradient on to what is before it."""
    config = ModelConfig(model_name_or_path=folder, dtype="float32", load_in_4bit=True, use_peft=True, lora_r=4)
    four = load_model(config, tokenizer, seed=0)
    assert sum(p.dtype == torch.uint8 for p in four.parameters()) == 14  # seven in each of two layers
    whole = load_model(config.model_copy(update={"load_in_4bit": False}), tokenizer, seed=0)
    for name, layer in four.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            numbers = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            whole.get_submodule(name).weight.data.copy_(numbers)
    (expected, logp_BT), (found, logp_in_four_BT) = (
        adapter_gradient(whole, False, tokenizer),
        adapter_gradient(four, True, tokenizer),
    )
    assert (logp_BT - logp_in_four_BT).abs().max() < 0.05  # products of the 4 bits are in bfloat16
    assert found.keys() == expected.keys()
    assert len(found) == 28
    apart = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    assert apart / sum(float(value.square().sum()) for value in expected.values()) < 0.01**2
