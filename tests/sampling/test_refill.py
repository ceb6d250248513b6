"""Rows that enter the batch as others leave it are sampled as if all had been there from the start."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_pg.estimators.distributions import token_logp
from llm_pg.sampling.decoding import SharedDecoder
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.prompts import PromptTable
from llm_pg.sampling.protocol import Completions, SamplingParams, joined
from llm_pg.sampling.random import stream_key

TEXTS = ["ab=", "a longer prompt, and more: ", "x", "12+30=", "ab=", "the sixth prompt "]
GROUP = 4
ENDS = ("e", "t")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOUBLED = tuple(2 * a + b for a in LETTERS for b in LETTERS)  # the first token of a row must not count twice
PATHS = {
    "llama, by kernels where they are": ("llama", {}),
    "llama, lean": ("llama", {"compiled": False}),
    "llama, its own layers": ("llama", {"lean": False}),
    "gpt2, learned positions": ("gpt2", {}),
    "gemma2, the model's cache": ("gemma2", {}),
}


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """What was allocated and not written must not be read: with it, any use of it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_sampler(family: str, make_model: Callable[..., Any], tokenizer: Any, **options: Any) -> NativeSampler:
    """A model of which a part of the rows ends soon, by one of three tokens, and a part never."""
    model = make_model(family)
    ends = [tokenizer.eos_token_id, *(tokenizer(text)["input_ids"][0] for text in ENDS)]
    with torch.no_grad():
        model.get_output_embeddings().weight[ends] *= 1.3
    return NativeSampler(model, tokenizer, ends, **options)


def sample(sampler: NativeSampler, at_once: int | None, params: SamplingParams, prompts: slice) -> Completions:
    sampler.rows_at_once = at_once
    ids = [sampler.tokenizer(text)["input_ids"] for text in TEXTS]
    keys = stream_key(5, torch.arange(len(ids)).unsqueeze(1), torch.arange(GROUP))
    return sampler.sample(ids[prompts], GROUP, params, keys[prompts].reshape(-1))


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=60, stop=("no", *DOUBLED))])
def test_whatever_the_limit_the_same_is_sampled(
    path: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Limits below a group, across groups, of whole groups, and of all but one row; more tokens than are allocated at
    first. Tokens are equal, log-probabilities to 2e-5 nats: the order of sums in a matrix product."""
    family, options = PATHS[path]
    sampler = make_sampler(family, make_model, tokenizer, **options)
    params = SamplingParams(**{**vars(params), "max_completion_length": 70})
    whole = sample(sampler, None, params, slice(None))
    length_B = whole.mask_BT.sum(1)
    assert (whole.logp_BT[~whole.mask_BT] == 0).all()  # also where the pad id is outside of what may be sampled
    assert params.stop or whole.truncated_B.any()
    assert (~whole.truncated_B).any()
    assert len(set(length_B.tolist())) > 5
    waves = [sample(sampler, None, params, slice(i, i + 2)) for i in range(0, len(TEXTS), 2)]
    others = [joined(waves, sampler.pad_id), *(sample(sampler, n, params, slice(None)) for n in (3, 8, 10, 23))]
    for other in others:
        for name in ("tokens_BT", "mask_BT", "truncated_B"):
            assert torch.equal(getattr(other, name), getattr(whole, name))
        torch.testing.assert_close(other.logp_BT, whole.logp_BT, atol=2e-5, rtol=0)
    alone = sample(sampler, 1, params, slice(2, 3))  # one row at a time
    rows, width = slice(2 * GROUP, 3 * GROUP), alone.tokens_BT.shape[1]
    assert torch.equal(alone.tokens_BT, whole.tokens_BT[rows, :width])
    torch.testing.assert_close(alone.logp_BT, whole.logp_BT[rows, :width], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_logp_of_rows_that_entered_later_is_that_of_one_row_alone(
    family: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    sampler = make_sampler(family, make_model, tokenizer)
    out = sample(sampler, 6, SamplingParams(max_completion_length=70), slice(None))
    for i, (tokens, mask, logp) in enumerate(zip(out.tokens_BT, out.mask_BT, out.logp_BT, strict=True)):
        prompt, done = tokenizer(TEXTS[i // GROUP])["input_ids"], tokens[mask]
        with torch.no_grad():
            logits = sampler.model(torch.tensor([prompt + done.tolist()])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logp[mask], token_logp(logits, done), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 6, 8])
def test_a_prompt_is_computed_once_and_the_cache_allocated_once(
    at_once: int, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its rows straddle; the equal first and fifth prompts may be computed twice. No more rows than allowed
    are in the batch, and all of them until none waits."""
    sampler = make_sampler("llama", make_model, tokenizer, compiled=False)
    computed: list[tuple[int, ...]] = []
    batches: list[int] = []
    caches: set[int] = set()
    compute, step, keep = PromptTable.compute, SharedDecoder.step, SharedDecoder.keep
    compacted = False

    def counted_compute(self: Any, prompts: Any, places: Any) -> None:
        computed.extend(prompts)
        compute(self, prompts, places)

    def counted_step(self: Any, next_R: Any, depth_R: Any) -> Any:
        logits = step(self, next_R, depth_R)
        batches.append(len(next_R))
        if not compacted:
            caches.add(self.own[0][0].data_ptr())
        return logits

    def noted_keep(self: Any, index: Any) -> None:
        nonlocal compacted
        compacted = True
        keep(self, index)

    monkeypatch.setattr(PromptTable, "compute", counted_compute)
    for name, function in (("step", counted_step), ("keep", noted_keep)):
        monkeypatch.setattr(SharedDecoder, name, function)
    out = sample(sampler, at_once, SamplingParams(max_completion_length=60), slice(None))
    assert len(computed) <= len(TEXTS)
    assert set(computed) == {tuple(tokenizer(text)["input_ids"]) for text in TEXTS}
    assert max(batches) == batches[0] == at_once
    assert len(caches) == 1
    tokens = int(out.mask_BT.sum())
    assert len(batches) < 60 * len(TEXTS) * GROUP // at_once * 0.8  # waves would take 60 steps each
    assert sum(batches) >= tokens - len(TEXTS) * GROUP  # a step a token, the first of each row apart


def test_the_terminal_is_told_each_token_and_each_end_once(make_model: Callable[..., Any], tokenizer: Any) -> None:
    sampler = make_sampler("llama", make_model, tokenizer)
    told: list[tuple[int, int]] = []
    sampler.progress = lambda tokens, ended: told.append((tokens, ended))
    out = sample(sampler, 5, SamplingParams(max_completion_length=30), slice(None))
    assert sum(tokens for tokens, _ in told) == int(out.mask_BT.sum())
    assert sum(ended for _, ended in told) == len(TEXTS) * GROUP
