"""Log-probabilities in bfloat16: the sampler's, token by token in batches, are the trainer's over packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llm_pg.kernels.products import packs
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key

PROMPTS = [[3, 9, 14, 27, 5, 61, 8, 40, 11, 2, 33, 17, 6, 29, 50, 12, 4, 45, 36], [7, 21, 13], [18, 1, 30, 44]]
GROUP = 4
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "queries share keys": ("llama", {"num_key_value_heads": 1}),
    "biases": ("qwen2", {}),
    "norms of heads": ("qwen3", {"head_dim": 24}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd widths": ("llama", {"intermediate_size": 83}),
}


def make(kind: str, **more: Any) -> Any:
    name, others = KINDS[kind]
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **others, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def both(model: Any, tokenizer: Any, at_once: int | None = None, **params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities by the sampler and by the policy, and which are of tokens."""
    given = SamplingParams(max_completion_length=40, **params)
    policy = Policy(model, params=given, tokenizer=tokenizer, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    sampler = NativeSampler(model, tokenizer, [0], at_once, dtype=torch.bfloat16)
    keys_B = stream_key(0, 1, torch.arange(len(PROMPTS)).unsqueeze(1), torch.arange(GROUP)).flatten()
    done = sampler.sample(PROMPTS, GROUP, given, keys_B)
    rows = len(PROMPTS) * GROUP
    rollouts = TextRollouts.of_scored_text(
        mask_BT=done.mask_BT, logp_BT=done.logp_BT, tokens_BT=done.tokens_BT, truncated_B=done.truncated_B,
        group_B=torch.arange(len(PROMPTS)).repeat_interleave(GROUP), reward_B=torch.rand(rows),
        prompt_ids_B=[tuple(PROMPTS[i // GROUP]) for i in range(rows)],
    )  # fmt: skip
    trained = policy.logp(rollouts, 10**6)
    assert torch.equal(trained, policy.logp(rollouts, 2))  # in passes of other rows
    return done.logp_BT, trained, done.mask_BT


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_every_log_probability_is_the_trainers_to_the_last_bit(kind: str, tokenizer: Any) -> None:
    """Rounding to bfloat16 makes one different bit large, so near would not do: each token is 0.01 nats off then."""
    model = make(kind)
    sampled, trained, mask = both(model, tokenizer)
    assert int(mask.sum()) > 200
    assert torch.equal(sampled[mask], trained[mask]) or not packs(torch.bfloat16, [torch.ones(1)])
    torch.testing.assert_close(sampled[mask], trained[mask], atol=0.2, rtol=0)


def test_also_with_lora_on_every_layer(tokenizer: Any) -> None:
    model = get_peft_model(make("biases"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    sampled, trained, mask = both(model, tokenizer)
    assert torch.equal(sampled[mask], trained[mask]) or not packs(torch.bfloat16, [torch.ones(1)])
    torch.testing.assert_close(sampled[mask], trained[mask], atol=0.2, rtol=0)


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"greedy": True}])
def test_also_at_another_temperature_and_where_rows_enter_as_others_end(params: dict[str, Any], tokenizer: Any) -> None:
    model = make("biases")
    sampled, trained, mask = both(model, tokenizer, 5, **params)
    assert torch.equal(sampled[mask], trained[mask]) or not packs(torch.bfloat16, [torch.ones(1)])
    torch.testing.assert_close(sampled[mask], trained[mask], atol=0.2, rtol=0)
