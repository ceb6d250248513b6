"""Steps of fixed shapes sample what the other decoders sample, and are of the kind that a CUDA graph can hold.

No GPU is needed: a recording holds a step if its operations do not wait for the host, have no shape that hangs on
values, and read and write the same addresses every time. Each of the three is observed here.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_pg.estimators.distributions import token_logp
from llm_pg.sampling.lean import LeanDecoder
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.static import batch as static_batch
from llm_pg.sampling.static import graphs as static_graphs
from llm_pg.sampling.static.batch import StaticSampler
from llm_pg.sampling.static.graphs import NotStatic, OnlyStatic
from llm_pg.sampling.static.step import Bucket, Buffers, Step
from tests.sampling.static_models import GROUP, MODELS, PARAMS, TEXTS, assert_same, make, sample


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_static_steps_sample_what_the_shared_decoder_samples(
    name: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Over prompts of different lengths, one of them twice, rows that end early, late and never, a grid that shrinks,
    buckets of 64 and 128 columns, and groups that wait for a place."""
    family, changes = MODELS[name]
    model, ends = make(make_model, tokenizer, family, **changes)
    plain = sample(NativeSampler(model, tokenizer, ends), params)
    for at_once in (None, 3 * GROUP + 1):
        sampler = NativeSampler(model, tokenizer, ends, at_once, static=True)
        assert sampler.static is not None
        assert_same(sample(sampler, params), plain)
    assert params.greedy or len(set(plain.mask_BT.sum(1).tolist())) > 8


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", [PARAMS["plain"], PARAMS["truncated"]], ids=["plain", "truncated"])
def test_logp_is_that_of_the_padded_forward(
    name: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    family, changes = MODELS[name]
    model, ends = make(make_model, tokenizer, family, **changes)
    out = sample(NativeSampler(model, tokenizer, ends, static=True), params, limit=40)
    prompts = [tokenizer(TEXTS[i // GROUP])["input_ids"] for i in range(len(out.mask_BT))]
    width = max(map(len, prompts))
    pad = [width - len(prompt) for prompt in prompts]
    left = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts, strict=True)])
    before = torch.arange(width) >= torch.tensor(pad).unsqueeze(1)
    attention = torch.cat([before, out.mask_BT], 1)
    with torch.no_grad():
        logits = model(
            torch.cat([left, out.tokens_BT], 1), attention_mask=attention.long(),
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        ).logits[:, width - 1 : -1]  # fmt: skip
    expected = token_logp(params.warp(logits, keep=out.tokens_BT), out.tokens_BT)
    torch.testing.assert_close(out.logp_BT[out.mask_BT], expected[out.mask_BT], atol=1e-5, rtol=1e-5)


def a_step(model: Any, ends: list[int], params: SamplingParams = SamplingParams(), limit: int = 20) -> Step:  # noqa: B008
    """One in the middle of two prompts, with everything that a batch has set up before it."""
    sampler = StaticSampler(model, hasattr(model.base_model, "layers"), ends, 0)
    prompts = [(7, 8, 9), (5, 6, 11, 12, 13)]
    with torch.no_grad():
        first = static_batch.compute_prompts(model.eval(), prompts)
        need = Bucket(2, GROUP, 64, 64)
        arena = sampler.arena_for(need, 2 * GROUP, limit, first[0])
        batch = static_batch.StaticBatch(
            sampler, arena, need, prompts, replace(params, max_completion_length=limit), torch.arange(2 * GROUP), None
        )
        arena.buffers.begin(0, limit)
        batch.enter([0, 1], first)
    return batch.step()


def test_a_row_that_ended_behind_the_columns_of_a_bucket_harms_nobody(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """As where its place waits for a prompt, and the rows that came later are not as far."""
    model, ends = make(make_model, tokenizer)
    step = a_step(model, ends, limit=100)
    step.live_R[0] = False
    with torch.no_grad():
        expected = step.logits()[1:]
        step.count_R[0] = 90
        assert torch.equal(step.logits()[1:], expected)
    step()
    assert step.count_R[0] == 90


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_no_operation_of_a_step_waits_for_the_host(
    name: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    family, changes = MODELS[name]
    model, ends = make(make_model, tokenizer, family, **changes)
    step = a_step(model, ends, params)
    before = step.count_R.sum()
    with OnlyStatic():
        step()
    assert step.count_R.sum() > before


X = torch.arange(6)
PLANTED: dict[str, Callable[[], Any]] = {
    "a number read": lambda: X.sum().item(),
    "a branch": lambda: 1 if X[2] > 1 else 0,
    "places of what is true": lambda: (X > 2).nonzero(),
    "what a mask selects": lambda: X.masked_select(X > 2),
    "an index that is a mask": lambda: X[X > 2],
    "written by a mask": lambda: X.clone().index_put_((X > 2,), torch.zeros((), dtype=torch.int64)),
    "without repetition": lambda: X.unique(),
    "repeated by counts": lambda: X.repeat_interleave(X),
    "membership, which may sort": lambda: torch.isin(X, X),
    "equality of the whole": lambda: torch.equal(X, X + 0),
    "numbers from the host": lambda: torch.tensor([1, 2]) + 1,
    "torch's generator": lambda: torch.rand(3),
    "torch's multinomial": lambda: torch.multinomial(torch.ones(3), 1),
}


@pytest.mark.parametrize("operation", PLANTED.values(), ids=PLANTED)
def test_an_operation_that_no_recording_could_hold_is_refused(operation: Callable[[], Any]) -> None:
    operation()
    with OnlyStatic(), pytest.raises(NotStatic):
        operation()


class OnMeta(TorchDispatchMode):
    """Every operand lies on the device without values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs or {})):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", f"{func} reads {x.device}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_step_runs_where_tensors_have_no_values(
    name: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """A tensor left on the host, or a value that is asked for, would end it."""
    family, changes = MODELS[name]
    model, ends = make(make_model, tokenizer, family, **changes)
    held = a_step(model, ends).buffers
    like = {layer: (k[:1].to("meta"), v[:1].to("meta")) for layer, (k, v) in held.own.items()}
    model.to("meta")
    buffers = Buffers(held.capacity, 8, 20, like, torch.device("meta"), None)
    layers = LeanDecoder(model) if hasattr(model.base_model, "layers") else None
    step = Step(model, layers, buffers, held.capacity, params, torch.tensor(ends, device="meta"), 0)
    with OnMeta(), OnlyStatic():
        step()
    with OnMeta(), pytest.raises((AssertionError, RuntimeError)):
        step.next_R + torch.arange(len(step.next_R))
    with pytest.raises(RuntimeError):
        step.count_R.sum().item()


def strided(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_mkldnn


class Watched(TorchDispatchMode):
    """outer: the addresses that operations read or write and that were not made inside the block, in their order;
    inside: the storages that were."""

    def __init__(self) -> None:
        super().__init__()
        self.outer: list[tuple[str, int, tuple[int, ...]]] = []
        self.inside: dict[int, StorageWeakRef] = {}
        self.alive: list[Any] = []  # an address must not be given twice while it is watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if strided(x)]
        known = {x.untyped_storage().data_ptr() for x in given}
        for x in given:
            if x.untyped_storage().data_ptr() not in self.inside:
                self.outer.append((str(func), x.data_ptr(), tuple(x.shape)))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if strided(x) and x.untyped_storage().data_ptr() not in known:
                self.inside[x.untyped_storage().data_ptr()] = StorageWeakRef(x.untyped_storage())
                self.alive.append(x)
        return out


@pytest.mark.parametrize("name", MODELS)
def test_each_step_reads_and_writes_the_addresses_of_the_one_before_and_leaves_nothing_behind(
    name: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """The memory of what a step makes is that of the next recording too, so nothing of it may be kept."""
    family, changes = MODELS[name]
    model, ends = make(make_model, tokenizer, family, **changes)
    step = a_step(model, ends, PARAMS["truncated"])
    step()
    watched = [Watched() for _ in range(3)]
    for one in watched:
        with one:
            step()
    assert watched[0].outer == watched[1].outer == watched[2].outer
    assert len(watched[0].outer) > 50
    made = [ref for one in watched for ref in one.inside.values()]
    for one in watched:
        one.alive.clear()
    gc.collect()
    assert len(made) > 100
    assert all(ref.expired() for ref in made)


def test_the_watch_sees_a_buffer_that_moves_and_a_tensor_that_is_kept(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, ends = make(make_model, tokenizer)
    step = a_step(model, ends)
    kept = []
    take = step.buffers.take
    step.buffers.take = lambda logits, *others: kept.append(logits) or take(logits, *others)  # type: ignore
    first, second = Watched(), Watched()
    with first:
        step()
    step.count_R = step.count_R.clone()
    with second:
        step()
    assert first.outer != second.outer
    first.alive.clear()
    gc.collect()
    assert not all(ref.expired() for ref in first.inside.values())


def test_sampling_leaves_torchs_generators_as_they_were(make_model: Callable[..., Any], tokenizer: Any) -> None:
    """And draws nothing from them: a recording would hold a generator's state, or replay the same draws."""
    model, ends = make(make_model, tokenizer)
    sampler = NativeSampler(model, tokenizer, ends, static=True)
    torch.manual_seed(0)
    first, state = sample(sampler, PARAMS["plain"]), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert_same(sample(sampler, PARAMS["plain"]), first, atol=0)


def test_the_terminal_is_told_each_token_and_each_end_once(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, ends = make(make_model, tokenizer)
    sampler = NativeSampler(model, tokenizer, ends, 2 * GROUP, static=True)
    told: list[tuple[int, int]] = []
    sampler.progress = lambda tokens, ended: told.append((tokens, ended))
    out = sample(sampler, PARAMS["plain"])
    assert sum(tokens for tokens, _ in told) == int(out.mask_BT.sum())
    assert sum(ended for _, ended in told) == len(TEXTS) * GROUP


@pytest.mark.parametrize(
    ("reason", "params", "at_once"),
    [("stop strings", SamplingParams(stop=("no",)), None), ("below a group", SamplingParams(), GROUP - 1)],
)
def test_a_batch_that_cannot_be_static_goes_the_other_way_and_the_log_says_why_once(
    reason: str, params: SamplingParams, at_once: int | None, make_model: Callable[..., Any], tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model, ends = make(make_model, tokenizer)
    sampler = NativeSampler(model, tokenizer, ends, at_once, static=True)
    with caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        outs = [sample(sampler, params, 30) for _ in range(2)]
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert_same(outs[0], sample(NativeSampler(model, tokenizer, ends, at_once), params, 30), atol=0)


def test_a_model_that_waits_for_the_host_is_not_decoded_so(
    make_model: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A rotation that is computed anew beyond some length (dynamic NTK) reads the length on the host."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model, ends = make(make_model, tokenizer, rope_parameters=rope)
    with caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        sampler = NativeSampler(model, tokenizer, ends, static=True)
    assert sampler.static is None
    assert "_local_scalar_dense" in caplog.text
    gemma, _ = make(make_model, tokenizer, "gemma2")
    assert NativeSampler(gemma, tokenizer, ends, static=True).static is None


def test_only_a_gpu_is_decoded_so_unasked(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, ends = make(make_model, tokenizer)
    assert NativeSampler(model, tokenizer, ends).static is None
    assert static_graphs.recorder(torch.device("cpu"))(print) is print
