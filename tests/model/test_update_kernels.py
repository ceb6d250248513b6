"""The compiled kernels of the update against torch's own operations in float64, and a whole update with and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_pg.kernels import update
from llm_pg.kernels.build import library
from llm_pg.model import fused, head
from llm_pg.model.calls import ByKernels
from llm_pg.model.distribution import SamplingParams
from llm_pg.model.segments import MaskedCalls, Segments
from tests.model.test_lean_layers import logp_and_gradient, moved
from tests.model.test_policy import policy_of

HALF = torch.bfloat16
ROUNDING = {torch.float32: 2e-6, HALF: 8e-3}  # relative: a bfloat16 has 8 bits


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("there is no C++ compiler that makes the kernels")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_alike(function: Callable[..., Any], peer: Callable[..., Any], inputs: list[Tensor], size: float) -> None:
    """Values and gradients of `function` are those of `peer` in float64, up to `size` of their largest."""
    given = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    outs = []
    for run, of in ((function, given), (peer, wide)):
        made = run(*of)
        made = made if isinstance(made, tuple) else (made,)
        sum((x.double() * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in made).backward()
        outs.append([*(x.detach() for x in made), *(x.grad for x in of)])
    for ours, theirs in zip(*outs, strict=True):
        assert float((ours.double() - theirs).abs().max()) <= size * float(theirs.abs().max())


def norm_of_sum(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 0.1) * weight


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rows", [1, 200])  # of several threads, and of several chunks of the sum over rows
def test_a_norm_of_a_sum_and_its_slopes_are_those_of_torch(dtype: torch.dtype, rows: int) -> None:
    inputs = [rand(rows, 500), rand(rows, 500, seed=1, dtype=dtype), rand(500, seed=2)]
    assert_alike(lambda *x: fused.AddNorm.apply(*x, 0.1, dtype), norm_of_sum, inputs, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_gated_unit_and_its_slopes_are_those_of_torch(dtype: torch.dtype) -> None:
    both = 4 * rand(70, 2 * 333, dtype=dtype)
    both[0, :4] = torch.tensor([90.0, -90.0, 0.0, -200.0])

    def peer(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    assert_alike(fused.SwiGlu.apply, peer, [both], 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_rotation_of_some_heads_and_its_slopes_are_those_of_torch(dtype: torch.dtype) -> None:
    angle = rand(60, 1, 24).abs()
    cos, sin = angle.cos(), torch.cat([-angle[..., :12], angle[..., 12:]], -1).sin()

    def peer(x: Tensor) -> tuple[Tensor, ...]:
        some = x[:, :3]
        turned = some * cos + torch.cat([some[..., 12:], some[..., :12]], -1) * sin
        return turned[:, :2], turned[:, 2:], x[:, 3:]

    x = rand(60, 5, 24, seed=1, dtype=dtype)
    assert_alike(lambda x: fused.Rotated.apply(x, cos, sin, 2, 1), peer, [x], ROUNDING[dtype])


GROUPS = Segments(  # two prompts with their completions, and a run alone; one completion longer than a block of keys
    [0, 21, 22, 60, 63, 80, 84], [21, 1, 38, 3, 17, 4, 5], [0, 0, 0, 0, 60, 60, 0], [0, 21, 21, 0, 3, 3, 0]
)
TOKENS = 89


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(N, heads, d), token by token."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    outs: list[Tensor] = [torch.empty(0)] * TOKENS
    for start, length, prefix, before in zip(*GROUPS.columns(), strict=True):
        for token in range(start, start + length):
            seen = [*range(prefix, prefix + before), *range(start, token + 1)]
            scores = torch.einsum("hd,nhd->hn", query[token], key[seen]) * 0.2
            outs[token] = torch.einsum("hn,nhd->hd", scores.softmax(-1), value[seen])
    return torch.stack(outs)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 64), (3, 3, 8), (5, 1, 100), (2, 2, 48)])
def test_attention_of_a_packed_row_and_its_slopes_are_those_of_each_token_alone(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int
) -> None:
    inputs = [rand(TOKENS, h, d, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]

    def ours(*given: Tensor) -> Tensor:
        way = MaskedCalls(GROUPS, torch.device("cpu"))
        out = way(*(x.transpose(0, 1).unsqueeze(0) for x in given), 0.2)
        assert any("ByKernels" in str(node) for node, _ in out.grad_fn.next_functions)
        return out[0]

    assert_alike(ours, attention, inputs, ROUNDING[dtype])


@pytest.mark.parametrize("alone", [False, True])
def test_the_numbers_of_attention_hang_neither_on_the_threads_nor_on_other_groups(alone: bool) -> None:
    """With many threads and few groups a thread takes a run, else a group; the first group is also computed alone."""
    inputs = [rand(TOKENS, h, 16, seed=i) for i, h in enumerate((4, 2, 2))]
    slope, found, first = rand(TOKENS, 4, 16, seed=9), [], 60  # tokens of the first group
    threads = torch.get_num_threads()
    try:
        for number in (1, 16):
            torch.set_num_threads(number)
            groups, n = (GROUPS.pick([0, 1, 2]), first) if alone and number == 16 else (GROUPS, TOKENS)
            given = [x[:n].clone().requires_grad_() for x in inputs]
            out = MaskedCalls(groups, torch.device("cpu"))(*(x.transpose(0, 1).unsqueeze(0) for x in given), 0.2)[0]
            slopes = torch.autograd.grad((out * slope[:n]).sum(), given)
            found.append([x.detach()[:first] for x in (out, *slopes)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))


def test_a_run_that_reads_a_part_of_another_is_left_to_torch() -> None:
    parts = Segments([0, 8], [8, 3], [0, 0], [0, 5])
    query, key, value = (rand(1, 2, 11, 8, seed=i).requires_grad_() for i in range(3))
    out = MaskedCalls(parts, torch.device("cpu"))(query, key, value, None)
    assert not any("ByKernels" in str(node) for node, _ in out.grad_fn.next_functions)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kept", [True, False])
def test_the_output_layers_softmax_and_its_slopes_are_those_of_torch(
    dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 7 * 700)  # rows of a chunk
    monkeypatch.setattr(head, "KEPT_NUMBERS", 10**9 if kept else 0)
    token = torch.randint(700, (30,), generator=torch.Generator().manual_seed(0))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        layer = torch.nn.Linear(64, 700, bias=False)
        del layer.weight
        layer.weight = weight
        params = SamplingParams(temperature=0.7)
        logp, nats = head.token_scores(hidden, layer, token, params, with_entropy=True, entropy_grad=False)
        with torch.no_grad():
            p = (hidden.double() @ weight.double().T / 0.7).log_softmax(-1)
            torch.testing.assert_close(nats.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-5)
        return logp

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T / 0.7).log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)

    inputs = [rand(30, 64, dtype=dtype), 0.3 * rand(700, 64, seed=1, dtype=dtype)]
    assert_alike(ours, peer, inputs, ROUNDING[dtype])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_update_by_the_kernels_has_the_gradient_of_one_without(
    family: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, called = policy_of(moved(make_model(family))), []
    original = ByKernels.forward
    monkeypatch.setattr(ByKernels, "forward", lambda *given: called.append(1) or original(*given))
    fast = logp_and_gradient(policy, is_lean=True)
    assert called
    monkeypatch.setattr(update, "_kernels", lambda: None)
    plain = logp_and_gradient(policy, is_lean=True)
    size = torch.stack([b.norm() for b in plain[1:]]).norm()
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-6, atol=2e-6)
    assert all(float((a - b).norm()) <= 1e-6 * float(size) for a, b in zip(fast[1:], plain[1:], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(fast[1:], plain[1:], strict=True))  # the kernels were on
