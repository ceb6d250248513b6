"""A step of two ranks is a handful of messages, however many tensors a model has."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from llm_pg.distributed import BUCKET_BYTES
from llm_pg.distributed.data_parallel import buckets

MOST = 12  # a step, at half a billion parameters


def half_a_billion() -> list[torch.nn.Parameter]:
    """Parameters in the shapes of Qwen2.5-0.5B, float32, without their numbers."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4_864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(config, dtype=torch.float32).parameters())


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.empty(size, dtype=dtype, device="meta")) for size in sizes]


def test_buckets_hold_every_parameter_once_in_order_and_keep_to_their_size() -> None:
    model = half_a_billion()
    assert sum(p.numel() for p in model) == 494_032_768
    found = buckets(model)
    assert [id(p) for bucket in found for p in bucket] == [id(p) for p in model]
    assert max(sum(p.numel() * p.element_size() for p in bucket) for bucket in found) <= BUCKET_BYTES
    assert len(found) == 2


def test_a_bucket_holds_one_type_and_a_parameter_that_is_larger_is_alone() -> None:
    wide, half = parameters(2, 9, 3, 4), parameters(5, 5, dtype=torch.bfloat16)
    mixed = [wide[0], half[0], wide[1], half[1], wide[2], wide[3]]
    found = buckets(mixed, most_bytes=28)
    assert [[p.numel() for p in bucket] for bucket in found] == [[2], [5, 5], [9], [3, 4]]


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_plus_plus", "ppo"])
def test_a_step_of_two_ranks_is_at_most_a_dozen_messages(algorithm: str, ranks: Callable[..., Any]) -> None:
    """The gradients of the small model that runs here are one message; those of the large one are counted for it."""
    changes = {"max_steps": 2, "reward_in_process": True, "engine": "native", "noise_steps": 0}
    ended = ranks("r", algorithm=algorithm, changes=changes, count_collectives=True)
    assert ended.status == 0, ended.output
    counts = [int(number) for number in re.findall(r"collectives (\d+)", ended.output)]
    assert len(counts) == 4  # two steps on two ranks
    assert max(counts) + len(buckets(half_a_billion())) - 1 <= MOST
