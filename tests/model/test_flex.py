"""Packed completions that attend through flex_attention: the same numbers as a row a completion.

No GPU is needed. torch's uncompiled flex_attention refuses a backward pass on the CPU before it looks whether it has
one; it has, and `flex_on_cpu` lets it through, so that mask, caps and gradient are those of the library. What Triton
makes of them on a GPU is not seen here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from llm_pg.model import exact, flex
from llm_pg.model.exact import exact_way, packs_exactly
from llm_pg.model.flex import FlexBlocks
from llm_pg.model.packing import Packed
from llm_pg.model.segments import MaskedCalls, Segments
from llm_pg.rollouts import TextRollouts
from tests.conftest import TINY
from tests.model.test_packing import gradient, relative
from tests.model.test_policy import doubled, in_double, policy_of, rollouts

# Here it is meant to run uncompiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# Windows that bind and caps that bend; without the cap on the logits, which no layout has to do with.
WINDOWS = {"sliding_window": 6}
GEMMA2 = {**WINDOWS, "final_logit_softcapping": None, "attn_logit_softcapping": 0.5}
GEMMA3 = {"model_type": "gemma3_text", **TINY, "head_dim": 8, **WINDOWS}
MISTRAL = {"model_type": "mistral", **TINY, **WINDOWS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("llama", GEMMA3),
    "mistral": ("llama", MISTRAL),
}
SPECIAL = ("gemma2", "gemma3", "mistral")


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    with torch._dynamo.config.patch(recompile_limit=1000):  # each shape is traced by itself where nothing is compiled
        yield


def model_of(make_model: Callable[..., Any], name: str) -> Any:
    family, changes = FAMILIES[name]
    return make_model(family, **changes)


def flex_gradient(model: Any, batch: TextRollouts, way: Any = FlexBlocks, **options: Any) -> torch.Tensor:
    policy = policy_of(model)
    policy.layout.way = way
    return gradient(policy, batch, **options)


def conversation(batch: TextRollouts) -> TextRollouts:
    """Texts of others before the second and the third token of some rows."""
    inserted = [((1, (50, 51, 52)), (2, (60,))) if n > 2 else () for n in batch.length_B.tolist()]
    assert sum(bool(pieces) for pieces in inserted) > 3
    return dataclasses.replace(batch, inserted_B=inserted)


def some(names: Sequence[str], quick: Sequence[str]) -> list[Any]:
    """Parameters of which a few run by default."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(list(FAMILIES), ("llama", "qwen3", "gpt2", "gemma2", "gemma3")))
@pytest.mark.usefixtures("flex_on_cpu")
def test_the_gradient_is_that_of_a_row_a_completion(name: str, make_model: Callable[..., Any]) -> None:
    uneven = rollouts(num_prompts=5, group=4).rows(torch.tensor([0, 1, 2, 4, 8, 9, 12, 13, 14, 15, 17, 19]))
    kinds: list[Any] = [(lambda m: m, lambda b: b, 1e-5)]
    if name != "gemma2":  # soft caps are transformers' eager attention, which takes its softmax in float32
        kinds.append((doubled, in_double, 1e-10))
    for batch in (uneven, conversation(uneven)):
        for convert, prepare, bound in kinds:
            model = convert(model_of(make_model, name))
            expected = flex_gradient(model, prepare(batch), way=None)
            assert relative(flex_gradient(model, prepare(batch)), expected) < bound


@pytest.mark.usefixtures("flex_on_cpu")
def test_rows_and_prompts_of_one_token_attend_too(make_model: Callable[..., Any]) -> None:
    model, batch = doubled(make_model("qwen2")), in_double(rollouts(4, 3))
    short = dataclasses.replace(
        batch,
        mask_BT=batch.mask_BT & ((torch.arange(7) == 0) | (torch.arange(12) % 2 == 0).unsqueeze(1)),
        prompt_ids_B=[(7 + row // 3,) for row in range(12)],
    )
    for rows in (short, short.rows(torch.tensor([1]))):
        assert relative(flex_gradient(model, rows), flex_gradient(model, rows, way=None)) < 1e-10


@pytest.mark.usefixtures("flex_on_cpu")
def test_an_adapter_on_frozen_weights_trains_through_it(make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert exact_way(model, kind="cuda") is FlexBlocks
    batch = rollouts(4, 4)
    assert relative(flex_gradient(model, batch), flex_gradient(model, batch, way=None)) < 1e-5


@pytest.mark.usefixtures("flex_on_cpu")
def test_under_autocast_queries_keys_and_values_have_its_type(make_model: Callable[..., Any]) -> None:
    """As a rotary embedding in float32 widens queries and keys alone, and flex_attention takes one type only."""
    model, batch = make_model("llama"), rollouts(4, 4)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        inner = flex.attention_kernel("cpu")
        patch.setattr(flex, "attention_kernel", lambda kind: lambda *qkv, **o: seen.append(qkv) or inner(*qkv, **o))
        assert exact_way(model, autocast, kind="cuda") is FlexBlocks
        policy = policy_of(model, autocast=autocast)
        policy.layout.way = FlexBlocks
        ours = gradient(policy, batch)
    assert {x.dtype for qkv in seen for x in qkv} == {torch.bfloat16}
    # bfloat16 has 8 bits: both lie about as far from the gradient in float32.
    full = gradient(policy_of(model, packing="padded"), batch)
    half = gradient(policy_of(model, packing="padded", autocast=autocast), batch)
    assert relative(ours, full) < 1.5 * relative(half, full)


def tokens_seen(segments: Segments, window: int | None) -> torch.Tensor:
    """The definition: (N, N) bool, from each token's run, its prompt's run and its position."""
    places = [
        (run, start, offset)
        for run, (start, length) in enumerate(zip(segments.start, segments.length, strict=True))
        for offset in range(length)
    ]
    run_at = {start: run for run, start in reversed(list(enumerate(segments.start)))}
    seen = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (run, _, offset) in enumerate(places):
        behind = segments.prefix_length[run]
        for j, (other, _, before) in enumerate(places):
            if other == run:
                ago = offset - before
            elif behind and other == run_at[segments.prefix_start[run]]:
                ago = behind + offset - before
            else:
                continue
            seen[i, j] = 0 <= ago < (window or len(places))
    return seen


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Segments, int]:
    """Prompts with completions behind them or further on, filled up to whole blocks; the side of a block."""
    block = draw(st.sampled_from([2, 4, 8]))
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    runs = [("prompt", i, n) for i, n in enumerate(prompts)]
    runs += draw(st.lists(st.tuples(st.just("run"), st.integers(0, len(prompts) - 1), st.integers(1, 12)), max_size=6))
    if draw(st.booleans()):
        runs.sort(key=lambda run: run[1])
    segments, starts = Segments([], [], [], []), {}
    for kind, prompt, length in runs:
        at = sum(segments.length)
        if kind == "prompt":
            starts[prompt] = at
            segments.add(at, length, 0, 0)
        else:
            segments.add(at, length, starts[prompt], prompts[prompt])
    at = sum(segments.length)
    if at % block:
        segments.add(at, -at % block, 0, 0)
    return segments, block


@given(layout=layouts(), window=st.one_of(st.none(), st.integers(1, 14)))
@settings(max_examples=60, deadline=None)
def test_the_mask_and_its_blocks_are_those_of_the_definition(layout: tuple[Segments, int], window: int | None) -> None:
    segments, block = layout
    mask = FlexBlocks(segments, torch.device("cpu")).block_mask(window, block)
    seen = tokens_seen(segments, window)
    size = len(seen)
    torch.testing.assert_close(create_mask(mask.mask_mod, None, None, size, size, device="cpu")[0, 0], seen)
    tiles = seen.view(size // block, block, size // block, block)
    every = tiles.all(3).all(1)
    some = tiles.any(3).any(1) & ~every
    for name, expected in (("kv", some), ("full_kv", every), ("q", some.T), ("full_q", every.T)):
        number, columns = getattr(mask, f"{name}_num_blocks")[0, 0], getattr(mask, f"{name}_indices")[0, 0]
        listed = [row[:n].tolist() for row, n in zip(columns, number.tolist(), strict=True)]
        assert listed == [row.nonzero().flatten().tolist() for row in expected]


def test_a_packed_row_is_filled_up_to_whole_blocks_that_nobody_reads() -> None:
    prompts, completions = [(3, 4, 5), (3, 4, 5), (6,)], [[7, 8, 9], [10], [11, 12]]
    plain, filled = (Packed(prompts, completions, torch.device("cpu"), way=w) for w in (MaskedCalls, FlexBlocks))
    size = plain.ids.shape[1]
    assert filled.ids.shape[1] == 2 * flex.BLOCK > size
    torch.testing.assert_close(filled.ids[:, :size], plain.ids)
    torch.testing.assert_close(filled.place_M, plain.place_M)
    assert int(filled.place_M.max()) < size


def test_each_prompt_stands_before_its_completions_so_that_few_blocks_are_computed() -> None:
    """Ten groups of short completions: a block of the mask holds a prompt and those who read it."""
    prompts = [ids for ids in (tuple(range(100 * g, 100 * g + 60)) for g in range(10)) for _ in range(16)]
    packed = Packed(prompts, [[1] * 21] * 160, torch.device("cpu"), way=FlexBlocks)
    mask = packed.attention.block_mask()
    number = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    apart = Segments([60 * g for g in range(10)], [60] * 10, [0] * 10, [0] * 10)
    for row in range(160):
        apart.add(600 + 20 * row, 20, 60 * (row // 16), 60)
    at = sum(apart.length)
    apart.add(at, FlexBlocks.filled(at) - at, 0, 0)
    other = FlexBlocks(apart, torch.device("cpu")).block_mask()
    assert number < int(other.kv_num_blocks.sum() + other.full_kv_num_blocks.sum())


@pytest.mark.usefixtures("flex_on_cpu")
def test_rows_of_any_length_and_windows_of_any_width_are_one_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    kernel = flex.attention_kernel.__wrapped__("cuda")
    monkeypatch.setattr(flex, "attention_kernel", lambda kind: kernel)
    for group, window in ((2, None), (5, None), (9, 7), (2, 50)):
        packed = Packed([(5,) * 70] * group, [[6] * 90] * group, torch.device("cpu"), way=FlexBlocks)
        query, key, value = (torch.randn(1, heads, packed.ids.shape[1], 16) for heads in (4, 2, 2))
        packed.attention(query, key, value, 0.25, sliding_window=window)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", some(list(FAMILIES), ("gpt2", "gemma2")))
@pytest.mark.usefixtures("flex_on_cpu")
def test_on_cuda_it_is_taken_where_a_trial_finds_it_exact(name: str, make_model: Callable[..., Any]) -> None:
    model = model_of(make_model, name)
    assert exact_way(model, kind="cuda") is FlexBlocks
    assert exact_way(model) is (None if name in SPECIAL else MaskedCalls)


def test_where_it_does_not_run_smaller_calls_take_its_place_and_that_is_told(make_model: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=r"flex_attention is not used .*NotImplementedError.*backward on CPU"):
        assert exact_way(make_model("llama"), kind="cuda") is MaskedCalls


class OutOfResources(Exception):
    """As Triton's: no RuntimeError, here without a word."""


@pytest.mark.parametrize("error", [OutOfResources(), RuntimeError("first line\nand many more")])
def test_whatever_the_compiler_raises_is_told_and_lack_of_memory_is_not_taken_for_it(
    error: Exception, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(raised: Exception) -> Any:
        def kernel(*args: Any, **options: Any) -> torch.Tensor:
            raise raised

        return lambda kind: kernel

    model = make_model("llama")
    monkeypatch.setattr(flex, "attention_kernel", fails(error))
    with pytest.warns(UserWarning, match=rf"\({type(error).__name__}: (first line)?\)"):
        assert exact_way(model, kind="cuda") is MaskedCalls
    monkeypatch.setattr(flex, "attention_kernel", fails(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        exact_way(model, kind="cuda")


def _sees_the_future(self: FlexBlocks, window: int | None) -> torch.Tensor:
    bounds = _bounds(self, window)
    bounds[1], bounds[2] = 0, bounds.shape[1]
    return bounds


_bounds = FlexBlocks.bounds


@pytest.mark.usefixtures("flex_on_cpu")
def test_a_wrong_mask_or_a_wrong_gradient_alone_fails_the_trial(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(FlexBlocks, "bounds", _sees_the_future)
        with pytest.warns(UserWarning, match="a trial gave other numbers"):
            assert exact_way(model, kind="cuda") is MaskedCalls
    inner = flex.attention_kernel("cpu")
    monkeypatch.setattr(flex, "attention_kernel", lambda kind: lambda q, k, v, **o: inner(q, k.detach(), v, **o))
    with pytest.warns(UserWarning, match="a trial gave other numbers"):
        assert exact_way(model, kind="cuda") is MaskedCalls


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
@pytest.mark.usefixtures("flex_on_cpu")
def test_a_window_that_is_not_kept_fails_the_trial_beyond_it(
    name: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(make_model, name)
    model.config.sliding_window = 30  # more than the short trial reaches
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 30
    assert packs_exactly(model, FlexBlocks)
    monkeypatch.setattr(FlexBlocks, "bounds", lambda self, window: _bounds(self, None))
    assert not packs_exactly(model, FlexBlocks)
    assert exact_way(model, kind="cuda") is None


def test_windows_longer_than_a_trial_are_left_to_the_padded_layout(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "LONGEST_WINDOW", 5)
    assert exact_way(model_of(make_model, "mistral"), kind="cuda") is None
