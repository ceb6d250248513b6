"""What a batch of sampling leaves in memory."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from llm_pg.model.linears import Copy
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams


def test_the_samplers_copies_of_weights_are_gone_when_its_batch_is_done(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """At once, so that the update does not begin with them: a cycle of references would leave them to the collector."""
    sampler = NativeSampler(make_model("llama"), tokenizer, [1])
    gc.collect()
    before = sum(type(x) is Copy for x in gc.get_objects())
    gc.disable()
    try:
        sampler.sample([(5, 6, 7), (8, 9)], 3, SamplingParams(max_completion_length=6), torch.arange(6))
        assert sum(type(x) is Copy for x in gc.get_objects()) == before
    finally:
        gc.enable()
