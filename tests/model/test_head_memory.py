"""What the output layer keeps for the backward pass: never the logits of a batch."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_pg.config import Config
from llm_pg.doctor import sizes
from llm_pg.model import head
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import policy_of, rollouts

NUM_TOKENS, HIDDEN, VOCABULARY = 600, 8, 50_000  # 120 MB of logits in float32, in two chunks


@contextlib.contextmanager
def kept() -> Iterator[dict[int, torch.Tensor]]:
    """The tensors that a forward pass saves, by their address."""
    found: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def num_bytes(found: dict[int, torch.Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params, options",
    [
        (SamplingParams(temperature=0.7), {"with_entropy": True, "entropy_grad": False}),
        (SamplingParams(top_k=40), {"with_entropy": False, "entropy_grad": False}),
        (SamplingParams(), {"with_entropy": True, "entropy_grad": True}),
    ],
)
def test_no_copy_of_the_logits_is_kept_beyond_what_there_is_memory_for(
    dtype: torch.dtype, params: SamplingParams, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT_NUMBERS", 0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    layer = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    token = torch.randint(VOCABULARY, (NUM_TOKENS,))
    with kept() as found:
        logp, nats = head.token_scores(hidden, layer, token, params, **options)
    inputs = sum(x.untyped_storage().nbytes() for x in (hidden, layer.weight, token))
    assert num_bytes(found) <= 1.2 * inputs < 0.05 * NUM_TOKENS * VOCABULARY * 4
    (logp + nats).sum().backward()
    assert layer.weight.grad is not None


def test_what_fits_into_one_chunk_is_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side, so that the test above can fail: a chunk of 600 rows keeps one copy of the probabilities."""
    monkeypatch.setattr(head, "CHUNK_NUMBERS", NUM_TOKENS * VOCABULARY)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    layer = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    token = torch.randint(VOCABULARY, (NUM_TOKENS,))
    with kept() as found:
        head.token_scores(hidden, layer, token, SamplingParams(), with_entropy=True, entropy_grad=False)
    logits = NUM_TOKENS * VOCABULARY * 4
    assert logits < num_bytes(found) < 1.1 * logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_the_same_to_the_last_bit_however_many_chunks_are_kept(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, HIDDEN, generator=g).to(dtype).requires_grad_()
    layer = torch.nn.Linear(HIDDEN, 100, bias=False, dtype=dtype)
    token, slope = torch.randint(100, (50,), generator=g), torch.randn(50, generator=g)
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 8 * 100)
    computed, found = [], []
    original = head._logits
    monkeypatch.setattr(head, "_logits", lambda *args: computed.append(len(args[0])) or original(*args))
    for rows in (0, 24, 64):
        monkeypatch.setattr(head, "KEPT_NUMBERS", rows * 100)
        computed.clear()
        logp, _ = head.token_scores(hidden, layer, token, SamplingParams(), with_entropy=False, entropy_grad=False)
        found.append([logp.detach(), *torch.autograd.grad((logp * slope).sum(), (hidden, layer.weight))])
        assert sum(computed) == 50 + 50 - min(rows, 50)  # once forward, and again what was not kept
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_policy_keeps_nothing_as_wide_as_the_vocabulary(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 4 * 99)
    monkeypatch.setattr(head, "KEPT_NUMBERS", 0)
    model, batch = make_model("qwen2"), rollouts(4, 4)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with kept() as found:
        policy_of(model).forward(batch)
    wide = [x.shape for address, x in found.items() if address not in own and model.config.vocab_size in x.shape]
    assert not wide


def test_a_chunk_on_cuda_follows_from_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for gib, rows in ((80, 2208), (24, 662), (2, 110)):  # of 151,936 logits; never fewer than on a CPU
        device = types.SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        assert head.chunk_numbers(cuda) // 151_936 == rows
        if gib > 2:
            assert head.chunk_numbers(cuda) * head.BYTES_A_LOGIT <= device.total_memory / 32
    assert head.chunk_numbers(torch.device("cpu")) == head.CHUNK_NUMBERS


def test_the_memory_told_before_a_run_counts_the_logits_of_a_chunk() -> None:
    """A step of 32 × 2,048 tokens over 151,936 words would need 119 GB for logits that never stand whole."""
    assert (sizes.LOGITS_AT_ONCE, sizes.LOGITS_KEPT) == (head.CHUNK_NUMBERS, head.KEPT_NUMBERS)
    config = Config.model_validate({"rollout": {"max_completion_length": 2048}})
    parts = sizes.training_bytes(config, sizes.Sizes(5e8, 151_936, 0), False, 32)
    assert parts["logits"] == (3 * 64 + 256) * 2**20
