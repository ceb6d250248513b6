"""Models, prompts and batches of the tests of static steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import stream_key

TEXTS = ["ab=", "a longer prompt, and more: ", "x", "12+30=", "ab=", "the sixth prompt "]
GROUP = 4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, two heads to a key": ("llama", {}),
    "llama, a key to a head": ("llama", {"num_key_value_heads": 4}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, norms on its heads": ("qwen3", {}),
    "gpt2, through its own layers": ("gpt2", {}),
}
PARAMS = {
    "plain": SamplingParams(),
    "truncated": SamplingParams(temperature=0.7, top_k=60, top_p=0.9, min_p=0.01),
    "greedy": SamplingParams(greedy=True),
}


def make(
    make_model: Callable[..., Any],
    tokenizer: Any,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[Any, list[int]]:
    """A model of which a part of the rows ends soon, by one of three tokens, and a part never."""
    model = make_model(name, **changes).to(dtype)
    ends = [tokenizer.eos_token_id, *(tokenizer(text)["input_ids"][0] for text in "et")]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "norm" in parameter_name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model.get_output_embeddings().weight[ends] *= 1.3
    return model, ends


def keys(num_prompts: int = len(TEXTS), seed: int = 5) -> torch.Tensor:
    return stream_key(seed, torch.arange(num_prompts).unsqueeze(1), torch.arange(GROUP)).reshape(-1)


def sample(sampler: NativeSampler, params: SamplingParams, limit: int = 90, texts: list[str] = TEXTS) -> Completions:
    ids = [sampler.tokenizer(text)["input_ids"] for text in texts]
    return sampler.sample(ids, GROUP, replace(params, max_completion_length=limit), keys(len(texts)))


def assert_same(ours: Completions, theirs: Completions, atol: float = 1e-5) -> None:
    for name in ("tokens_BT", "mask_BT", "truncated_B"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.logp_BT, theirs.logp_BT, atol=atol, rtol=0)
