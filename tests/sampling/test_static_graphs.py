"""What is recorded, how often, when again, and what stays between batches; without a GPU, by recorders that look on."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_pg.estimators.distributions import token_logp
from llm_pg.sampling import lean
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.static import batch as static_batch
from llm_pg.sampling.static import graphs as static_graphs
from llm_pg.sampling.static.batch import StaticSampler
from llm_pg.sampling.static.step import Bucket, Buffers, Step
from llm_pg.sampling.static.weights import Refreshed
from tests.sampling.static_models import GROUP, PARAMS, TEXTS, assert_same, make, sample

pytestmark = pytest.mark.fake


class Recorder:
    """In the place of a CUDA graph: notes what is recorded and how often it is replayed, by calling it."""

    def __init__(self) -> None:
        self.recorded: list[Step] = []
        self.replays = 0

    def __call__(self, device: torch.device) -> Any:
        return self._record

    def _record(self, step: Any) -> Any:
        self.recorded.append(step)

        def replay() -> None:
            self.replays += 1
            step()

        return replay

    @property
    def buckets(self) -> list[Bucket]:
        return [step.bucket for step in self.recorded]


def recorded(model: Any, tokenizer: Any, ends: list[int], **options: Any) -> tuple[NativeSampler, Recorder]:
    """In float64 the lean layers read the weights themselves, as on a GPU, and no copy laid out for the processor."""
    sampler, recorder = NativeSampler(model, tokenizer, ends, static=True), Recorder()
    assert sampler.static is not None
    sampler.static = StaticSampler(model, sampler.is_lean, ends, sampler.pad_id, record=recorder, **options)
    return sampler, recorder


def test_a_bucket_is_recorded_once_and_replayed_for_every_token(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler, recorder = recorded(model, tokenizer, ends)
    plain = NativeSampler(model, tokenizer, ends)
    for _ in range(3):
        assert_same(sample(sampler, PARAMS["plain"]), sample(plain, PARAMS["plain"]))
        assert len(recorder.buckets) == len(set(recorder.buckets))
    rows = [bucket.rows for bucket in recorder.buckets]
    assert rows[0] == len(TEXTS) * GROUP
    assert all(2 * b <= a for a, b in itertools.pairwise(rows) if a != b)
    assert {bucket.columns for bucket in recorder.buckets} == {64, 128}
    assert 3 * 88 <= recorder.replays <= 3 * (90 + static_batch.LOOK_EVERY)
    sample(sampler, PARAMS["greedy"])
    again = len(recorder.recorded)
    sample(sampler, PARAMS["greedy"], limit=30, texts=TEXTS[2:])  # fewer prompts, another limit
    assert {s.bucket.places for s in recorder.recorded[again:]} <= {4, 2, 1}
    sample(sampler, PARAMS["plain"])
    assert all(s.params.greedy for s in recorder.recorded[len(rows) :])


def test_a_recording_follows_the_optimiser_and_is_made_again_where_weights_moved(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler, recorder = recorded(model, tokenizer, ends)
    before = sample(sampler, PARAMS["plain"])
    count = len(recorder.recorded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([tokenizer("some text")["input_ids"]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    after = sample(sampler, PARAMS["plain"])
    assert {s.bucket for s in recorder.recorded[count:]}.isdisjoint(recorder.buckets[:count])
    assert_same(after, sample(NativeSampler(model, tokenizer, ends), PARAMS["plain"]))
    assert not torch.equal(after.logp_BT[:, 0], before.logp_BT[:, 0])
    count = len(recorder.recorded)
    moved = model.base_model.layers[1].mlp.down_proj
    moved.weight.data = moved.weight.data.clone() * 1.5
    assert_same(sample(sampler, PARAMS["plain"]), sample(NativeSampler(model, tokenizer, ends), PARAMS["plain"]))
    assert recorder.buckets[0] in recorder.buckets[count:]


def test_a_recording_is_made_again_where_an_adapter_is_switched(make_model: Callable[..., Any], tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain, ends = make(make_model, tokenizer, dtype=torch.float64)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.2
    sampler, recorder = recorded(model, tokenizer, ends)
    on = sample(sampler, PARAMS["plain"], limit=20)
    with model.disable_adapter():
        off = sample(sampler, PARAMS["plain"], limit=20)
        assert_same(off, sample(NativeSampler(model, tokenizer, ends), PARAMS["plain"], limit=20))
    assert not torch.equal(on.logp_BT[:, 0], off.logp_BT[:, 0])
    assert_same(sample(sampler, PARAMS["plain"], limit=20), on, atol=0)
    assert recorder.buckets.count(recorder.buckets[0]) == 3


def test_what_may_not_stay_grows_by_buckets_and_is_given_back(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler, recorder = recorded(model, tokenizer, ends, keep_bytes=0)
    assert sampler.static is not None
    plain = NativeSampler(model, tokenizer, ends)
    capacities: list[int] = []
    grow = Buffers.grow

    def noted(self: Buffers, columns: int) -> None:
        capacities.extend([self.capacity.columns, columns])
        grow(self, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffers, "grow", noted)
        assert_same(sample(sampler, PARAMS["plain"]), sample(plain, PARAMS["plain"]))
    assert capacities == [64, 128]
    assert sampler.static.arena is None
    count = len(recorder.recorded)
    sample(sampler, PARAMS["plain"])
    assert recorder.buckets[count:] == recorder.buckets[:count]


def test_a_larger_batch_takes_larger_buffers_that_the_smaller_one_then_shares(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler, _ = recorded(model, tokenizer, ends)
    assert sampler.static is not None
    plain = NativeSampler(model, tokenizer, ends)
    wide = [text * 12 for text in TEXTS[:3]]  # 300 columns of a prompt
    for texts in (TEXTS[:2], wide, TEXTS):
        assert_same(sample(sampler, PARAMS["plain"], 20, texts), sample(plain, PARAMS["plain"], 20, texts))
    arena = sampler.static.arena
    assert arena is not None
    assert arena.buffers.capacity.width >= 312
    assert arena.buffers.capacity.rows == len(TEXTS) * GROUP
    for texts in (TEXTS[:2], wide, TEXTS):
        sample(sampler, PARAMS["plain"], 20, texts)
        assert sampler.static.arena is arena


def test_a_batch_of_nans_leaves_nothing_in_the_buffers(make_model: Callable[..., Any], tokenizer: Any) -> None:
    """A masked column weighs 0, and 0 times NaN is NaN."""
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler, _ = recorded(model, tokenizer, ends)
    before = sample(sampler, PARAMS["plain"])
    weight = model.base_model.layers[0].self_attn.v_proj.weight
    held = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        longer = [text * 2 for text in TEXTS]
        assert sample(sampler, PARAMS["plain"], texts=longer).logp_BT.isnan().any()
        weight.copy_(held)
    assert_same(sample(sampler, PARAMS["plain"]), before, atol=0)


class FakeGraph:
    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.step = cuda, None  # type: FakeCuda, Any

    def replay(self) -> None:
        self.cuda.events.append("replay")
        self.step()


class FakeCuda:
    """What a recorder uses of torch.cuda, as it behaves: what is captured does not run until it is replayed."""

    def __init__(self, patch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.fails, self.events = fails, []  # type: bool, list[str]
        self.capturing: FakeGraph | None = None
        patch.setattr(torch.cuda, "Stream", lambda device: self)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        patch.setattr(torch.cuda, "graph", self.graph)

    def wait_stream(self, other: Any) -> None:
        self.events.append("wait")

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream, capture_error_mode) == ("pool", self, "thread_local")
        if self.fails:
            self.events.append("refused")
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        yield
        self.capturing = None

    def record(self, device: torch.device) -> Any:
        recorder = static_graphs.Recorder(device)
        return lambda step: recorder(lambda: self.run(step))

    def run(self, step: Step) -> None:
        if self.capturing is None:
            self.events.append("run")
            step()
        else:
            self.events.append("capture")
            self.capturing.step = step


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_runs_three_times_is_captured_once_and_replayed_and_each_is_one_token(
    fails: bool, make_model: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it cannot be captured the log says so, and the tokens are the same."""
    model, ends = make(make_model, tokenizer, dtype=torch.float64)
    sampler = NativeSampler(model, tokenizer, ends, static=True)
    assert sampler.static is not None
    plain = sample(NativeSampler(model, tokenizer, ends), PARAMS["plain"])
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        cuda = FakeCuda(patch, fails=fails)
        sampler.static.record = cuda.record
        for _ in range(6):  # the smallest grid has few tokens a batch
            first = len(cuda.events)
            assert_same(sample(sampler, PARAMS["plain"]), plain)
        arena = sampler.static.arena
        assert arena is not None
        assert cuda.events[: 3 * static_graphs.WARM_UP] == ["wait", "run", "wait"] * static_graphs.WARM_UP
        assert cuda.events.count("capture") == (0 if fails else len(arena.graphs.made))
    assert set(cuda.events[first:]) == ({"run"} if fails else {"replay"})
    assert caplog.text.count("could not be captured") == cuda.events.count("refused") == int(fails)


@pytest.mark.parametrize("bias", [False, True])
def test_cast_copies_are_taken_again_in_place(bias: bool) -> None:
    """Of layers with the same input as one product: what autocast computes of each, next to one another."""
    layers = tuple(torch.nn.Linear(16, n, bias=bias or n == 8) for n in (8, 4, 4))
    refreshed = Refreshed(layers, torch.bfloat16)
    address, x = refreshed.weight.data_ptr(), torch.randn(3, 16)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            expected = torch.cat([layer(x) for layer in layers], 1)
        torch.testing.assert_close(refreshed(x), expected, atol=1e-2, rtol=1e-2)
        with torch.no_grad():
            for layer in layers:
                layer.weight *= -2
        assert not torch.allclose(refreshed(x), -2 * expected, atol=0.1)
        refreshed.refresh()
    assert refreshed.weight.data_ptr() == address


def test_under_autocast_recordings_hold_and_follow_the_weights(
    make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: no layers laid out for the processor, but cast copies, which are the weights of each batch."""
    monkeypatch.setattr(lean, "has_onednn", lambda: False)
    model, ends = make(make_model, tokenizer)
    sampler, recorder = recorded(model, tokenizer, ends)
    sampler.dtype = torch.bfloat16
    for _ in range(2):
        out = sample(sampler, PARAMS["plain"], limit=30)
        count = len(recorder.recorded)
        first = token_logp(prompt_logits(model, tokenizer), out.tokens_BT[:, 0])
        torch.testing.assert_close(out.logp_BT[:, 0], first, atol=0.1, rtol=0)
        fresh, _ = recorded(model, tokenizer, ends)
        fresh.dtype = torch.bfloat16
        assert_same(sample(fresh, PARAMS["plain"], limit=30), out, atol=0)
        again = sample(sampler, PARAMS["plain"], limit=30)
        assert_same(again, out, atol=0)
        assert len(recorder.recorded) == count
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


def prompt_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """After the prompt of each row."""
    with torch.no_grad():
        last = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1] for text in TEXTS]
    return torch.stack(last).repeat_interleave(GROUP, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_laid_out_for_the_processor_are_those_of_each_batch(
    dtype: torch.dtype, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, ends = make(make_model, tokenizer)
    sampler, _ = recorded(model, tokenizer, ends)
    sampler.dtype = None if dtype is torch.float32 else dtype
    before = sample(sampler, PARAMS["plain"], limit=30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    fresh, _ = recorded(model, tokenizer, ends)
    fresh.dtype = sampler.dtype
    after = sample(sampler, PARAMS["plain"], limit=30)
    assert_same(sample(fresh, PARAMS["plain"], limit=30), after, atol=0)
    assert not torch.equal(before.tokens_BT, after.tokens_BT)
