"""The compiled kernels against torch, and decoding by them against the model's own forward."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llm_pg.kernels import build
from llm_pg.kernels.build import library
from llm_pg.kernels.decoding import Heads, Kernels
from llm_pg.kernels.products import ADDED, FLOAT, ROUNDED, PackedWeight, packs
from llm_pg.kernels.products import HALF as INTO_HALF
from llm_pg.model.attention import products_in
from llm_pg.sampling import native
from llm_pg.sampling.compiled import CompiledDecoder
from llm_pg.sampling.decoding import SharedDecoder
from llm_pg.sampling.lean import LeanDecoder
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import draw, stream_key, uniform

HALF = torch.bfloat16


@pytest.fixture
def kernels() -> Kernels:
    found = library()
    if found is None:
        pytest.skip("there is no C++ compiler that makes the kernels")
    return Kernels(found)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor], heads: int, kv_heads: int
) -> Tensor:
    """Of one new token a row, row by row in float64: its key and value come last."""
    rows, d = len(qkv), cos.shape[1]
    x = qkv.double().view(rows, heads + 2 * kv_heads, d)
    turned = x * cos.double().unsqueeze(1) + torch.cat(
        [-x[..., d // 2 :], x[..., : d // 2]], -1
    ) * sin.double().unsqueeze(1)
    outs = []
    for r in range(rows):
        for h in range(heads):
            kv = h * kv_heads // heads
            key = torch.cat([keys[r][kv].double(), turned[r, heads + kv].unsqueeze(0)])
            value = torch.cat([values[r][kv].double(), x[r, heads + kv_heads + kv].unsqueeze(0)])
            outs.append((key @ turned[r, h] * d**-0.5).softmax(0) @ value)
    return torch.stack(outs).view(rows, heads * d).float()


def blocks(keys: Tensor) -> Tensor:
    return keys.unflatten(2, (-1, 16)).transpose(3, 4).contiguous()


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 4, 16), (6, 2, 64), (5, 1, 36), (2, 1, 128)])
@pytest.mark.parametrize("half", [False, True])
def test_attention_of_uneven_rows_in_any_slots_is_that_of_each_row_alone(
    heads: int, kv_heads: int, d: int, half: bool, kernels: Kernels
) -> None:
    """Three prompts of other lengths, rows of one prompt apart and together, completions of 0 to 40 tokens."""
    width, capacity, lengths, rows = 48, 64, (48, 1, 17), 21
    prompt = (rand(3, kv_heads, width, d, seed=1), rand(3, kv_heads, width, d, seed=2))
    own = (rand(rows, kv_heads, capacity, d, seed=3), rand(rows, kv_heads, capacity, d, seed=4))
    place = torch.tensor([0] * 11 + [1, 2, 1] + [2] * 7)
    slot = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    depth = torch.arange(rows) * 2
    qkv, cos, sin = rand(rows, (heads + 2 * kv_heads) * d, seed=6), rand(rows, d, seed=7), rand(rows, d, seed=8)
    before = torch.tensor(lengths)[place]
    keys, values = (
        [torch.cat([x[place[r], :, : before[r]], y[slot[r], :, : depth[r]]], 1) for r in range(rows)]
        for x, y in zip(prompt, own, strict=True)
    )
    expected = attention(qkv, cos, sin, keys, values, heads, kv_heads)
    to = torch.zeros((rows, heads * d), dtype=HALF if half else torch.float32)
    where = torch.stack([slot, place, before, depth])
    sizes = Heads(rows, heads, kv_heads, d, width, capacity)
    stored = (blocks(own[0]), own[1].clone())
    signed = torch.cat([-sin[:, : d // 2], sin[:, d // 2 :]], 1)
    kernels.attend(
        qkv, (cos, signed), (None, None, 0.0), d**-0.5, (blocks(prompt[0]), prompt[1]), stored, where, sizes, to,
        rounded=False,
    )  # fmt: skip
    bound = 1e-2 if half else 2e-6
    torch.testing.assert_close(to.float(), expected, atol=bound, rtol=bound)
    written = stored[1][slot, :, depth].reshape(rows, -1)
    torch.testing.assert_close(written, qkv[:, -kv_heads * d :], atol=0, rtol=0)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 70, 9), (5, 64, 16), (64, 200, 33), (13, 1366, 64)])
def test_a_product_in_bfloat16_has_a_result_in_float32_and_may_be_added(rows: int, n: int, k: int) -> None:
    x, weights, biases = rand(rows, k).to(HALF), [rand(n, k, seed=1), rand(30, k, seed=2).to(HALF)], (rand(n), None)
    if not packs(HALF, weights):
        pytest.skip("this processor does not compute in bfloat16")
    given = torch.nn.functional.pad(x, (0, k % 2))
    bias = torch.cat([rand(n).to(HALF), torch.zeros(30)]).double()
    expected = x.double() @ torch.cat([w.to(HALF) for w in weights]).double().T + bias
    product = PackedWeight(weights, biases)
    out = product(given, FLOAT)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    rounded = product(given, ROUNDED)
    assert torch.equal(rounded, out.to(HALF).float())
    assert torch.equal(product(given, INTO_HALF), out.to(HALF))
    torch.testing.assert_close(product(given, ADDED, torch.ones(rows, n + 30)), rounded + 1, atol=0, rtol=0)
    for row in range(rows):  # whatever is beside it
        assert torch.equal(product(given[row : row + 1], FLOAT)[0], out[row])


@pytest.mark.parametrize("n", [7, 64, 683])
def test_norms_and_gates_are_those_of_torch_in_either_type(n: int, kernels: Kernels) -> None:
    x, weight = rand(9, n) * 3, rand(n, seed=1)
    expected = torch.nn.functional.rms_norm(x, (n,), weight, 1e-5)
    torch.testing.assert_close(kernels.norm(x, weight, 1e-5, torch.empty(9, n)), expected, atol=2e-6, rtol=2e-6)
    half = kernels.norm(x, weight, 1e-5, torch.empty((9, n + n % 2), dtype=HALF))
    torch.testing.assert_close(half[:, :n], expected.to(HALF), atol=1e-2, rtol=1e-2)
    assert not half[:, n:].any()
    both = torch.cat([rand(9, n, seed=2) * 40, rand(9, n, seed=3)], 1)  # beyond the range of exp
    expected = torch.nn.functional.silu(both[:, :n]) * both[:, n:]
    plain = kernels.gated(both, torch.empty(9, n), rounded=False)
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=2e-6)
    rounded = kernels.gated(both, torch.empty(9, n), rounded=True)
    torch.testing.assert_close(
        rounded, torch.nn.functional.silu(both[:, :n]).to(HALF) * both[:, n:], atol=1e-6, rtol=1e-2
    )


@pytest.mark.parametrize("vocabulary", [5, 256, 5000, 49_152])
def test_a_compiled_draw_is_that_of_one_sum_over_the_vocabulary(vocabulary: int, kernels: Kernels) -> None:
    """By the whole distribution function in float64; numbers that another rounding could move are few and left out."""
    logits = rand(64, vocabulary) * 3
    logits[:, 3] = -torch.inf
    numbers = uniform(stream_key(3), torch.arange(64))
    cdf = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cdf, numbers.unsqueeze(1), right=True).squeeze(1)
    near = (cdf - numbers.unsqueeze(1)).abs().min(1).values < 1e-6
    tokens, logp = kernels.draw(logits, 0.7, numbers)
    assert torch.equal(tokens[~near], expected[~near])
    assert (~near).sum() > 50
    torch.testing.assert_close(
        logp,
        (logits.double() / 0.7).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1).float(),
        atol=2e-6,
        rtol=1e-6,
    )
    best, _ = kernels.draw(logits, 0.7, None)
    assert torch.equal(best, logits.argmax(-1))
    assert torch.equal(draw(logits / 0.7, numbers)[~near], expected[~near])


def test_no_draw_takes_a_token_without_probability_or_one_that_is_not_there(kernels: Kernels) -> None:
    logits = torch.full((4, 9000), -torch.inf)
    logits[:, 700] = 0.0
    numbers = torch.tensor([0.0, 0.3, 1 - 2.0**-53, 0.999999], dtype=torch.float64)
    for drawn in (kernels.draw(logits, 1.0, numbers)[0], draw(logits, numbers)):
        assert drawn.tolist() == [700] * 4
    for broken in (kernels.draw(torch.full((4, 9000), torch.nan), 1.0, numbers), kernels.draw(logits * 0, 1.0, None)):
        assert ((broken[0] >= 0) & (broken[0] < 9000)).all()
        assert broken[1].isnan().all()


def test_a_draw_does_not_hang_on_the_other_rows_or_the_threads(kernels: Kernels) -> None:
    logits, numbers = rand(7, 9001), uniform(stream_key(4), torch.arange(7))
    whole = kernels.draw(logits, 1.0, numbers)
    alone = [kernels.draw(logits[i : i + 1], 1.0, numbers[i : i + 1]) for i in range(7)]
    assert torch.equal(whole[0], torch.cat([tokens for tokens, _ in alone]))
    assert torch.equal(whole[1], torch.cat([logp for _, logp in alone]))


def logits_of(decoder: Any, prompts: list[tuple[int, ...]]) -> list[Tensor]:
    """Prompts, steps beyond the first memory, rows that leave before the first step and later, a row that enters."""
    taken = torch.zeros(len(prompts), dtype=torch.int64)
    out = [decoder.prefill(prompts)]
    decoder.keep(torch.tensor([0, 2, 3, 4]))
    taken = taken[:4]
    for t in range(70):
        if t == 30:
            decoder.keep(torch.tensor([0, 1, 3]))
            taken = taken[[0, 1, 3]]
        if t == 40:
            out.append(decoder.refill(torch.tensor([1]), [(5, 6, 7, 8)]))
            taken[1] = 0
        out.append(decoder.step(torch.arange(len(taken)) + t % 50 + 3, taken.clone()).clone())
        taken += 1
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [None, HALF])
@torch.no_grad()
def test_decoding_by_kernels_gives_the_logits_of_the_plain_layers(
    family: str, dtype: torch.dtype | None, make_model: Callable[..., Any], kernels: Kernels
) -> None:
    model = make_model(family).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter += 0.3 * rand(*parameter.shape, seed=1)
    prompts = [(3, 4, 5)] * 2 + [tuple(range(3, 40))] * 2 + [(9,)]
    with products_in(dtype, model):
        plain = logits_of(SharedDecoder(model, LeanDecoder(model), refills=True), prompts)
        fast = logits_of(CompiledDecoder(model, kernels), prompts)
    scale = max(float(x.abs().max()) for x in plain)
    bound = (3e-2 if dtype else 2e-6) * scale
    assert max(float((x.float() - y.float()).abs().max()) for x, y in zip(fast, plain, strict=True)) < bound


OTHERS: dict[str, dict[str, Any]] = {
    "soft caps and windows": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 16},
    "windows": {"model_type": "mistral", "sliding_window": 8},
    "alibi": {"model_type": "bloom", "n_head": 4, "n_layer": 2},
    "sinks": {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "half of the channels rotated": {"model_type": "stablelm", "partial_rotary_factor": 0.5},
    "a mixture of experts": {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    "a hybrid": {"model_type": "qwen3_next", "head_dim": 8},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_the_kernels_do_not_compute_is_decoded_without_them(what: str, tokenizer: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 99, **OTHERS[what]}, pad_token_id=0, eos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert not NativeSampler(model, tokenizer, [1]).choice.compiled


def test_a_stream_in_bfloat16_is_decoded_without_the_kernels(make_model: Callable[..., Any], tokenizer: Any) -> None:
    sampler = NativeSampler(make_model("llama").to(HALF), tokenizer, [1])
    assert (sampler.choice.name, sampler.choice.compiled) == ("lean", False)


def test_a_model_that_leaves_the_cpu_or_float32_after_the_trial_is_decoded_without_the_kernels(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, params = make_model("llama"), SamplingParams(max_completion_length=5)
    sampler = NativeSampler(model, tokenizer, [1])
    model.to(HALF)
    moved = sampler.sample([[3, 4, 5]], 4, params, torch.arange(4))
    expected = NativeSampler(model, tokenizer, [1], compiled=False).sample([[3, 4, 5]], 4, params, torch.arange(4))
    assert torch.equal(moved.tokens_BT, expected.tokens_BT)


def test_a_sampler_takes_the_kernels_where_they_are_and_none_where_it_is_told(
    make_model: Callable[..., Any], tokenizer: Any, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = make_model("llama"), SamplingParams(max_completion_length=30)
    keys = stream_key(0, torch.arange(12))
    fast, plain = (NativeSampler(model, tokenizer, [1], compiled=on) for on in (True, False))
    assert (fast.choice.compiled, plain.choice.compiled) == (True, False)
    one, other = (s.sample([[3, 4, 5], [6], [7, 8]], 4, params, keys) for s in (fast, plain))
    assert torch.equal(one.tokens_BT, other.tokens_BT)
    torch.testing.assert_close(one.logp_BT, other.logp_BT, atol=2e-6, rtol=2e-6)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not NativeSampler(model, tokenizer, [1]).choice.compiled


@pytest.mark.parametrize(
    ("compiler", "words"), [("no-such-compiler", "there is no C++ compiler"), ("false", "no compiler made them")]
)
def test_without_kernels_the_log_says_why_once(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false" if name == "false" else None)
    library.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "llm_pg.kernels"):
            assert library() is None
            assert library() is None
    finally:
        library.cache_clear()
    assert [words in message for message in caplog.messages] == [True]


def test_a_c_compiler_in_cxx_takes_no_kernels_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles C++ and links no C++ runtime, so that its library cannot be loaded. A process that finds $CXX changed
    (PEFT does that) takes the library that is there."""
    if not (shutil.which("gcc") and shutil.which("c++")):
        pytest.skip("there is no C++ compiler that makes the kernels")
    source = tmp_path / "kernels.cpp"
    source.write_text('#include <vector>\nextern "C" long f(long n) { return std::vector<long>(n, 7).at(n - 1); }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "SOURCES", (source,))
    made = []
    for compiler in ("gcc", "c++"):
        monkeypatch.setenv("CXX", compiler)
        library.cache_clear()
        try:
            found = library()
        finally:
            library.cache_clear()
        assert found is not None
        assert found.f(3) == 7
        made.append(found._name)
    assert made[0] == made[1]


def test_the_kernels_are_switched_off_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "off")
    library.cache_clear()
    try:
        assert library() is None
    finally:
        library.cache_clear()
