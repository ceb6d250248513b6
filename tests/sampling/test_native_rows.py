"""What the native sampler asks of a decoder: which rows it steps, when they leave and enter, and what it makes of them.

The decoder here is a script: a prompt (n,) is completed by n - 1 times the token 5 and the end token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_pg.sampling import native
from llm_pg.sampling.choice import Choice
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams

END, PAD, WORD = 1, 0, 5
LIMIT = 10


class Script:
    """Notes every call; its slots hold prompts."""

    def __init__(self, model: Any, refills: bool) -> None:
        self.refills = refills
        self.slots: list[int] = []
        self.calls: list[tuple[str, Any]] = []

    def _logits(self, lengths: Sequence[int], token: Sequence[int]) -> Tensor:
        ends = torch.tensor([t == length - 1 for length, t in zip(lengths, token, strict=True)])
        chosen = torch.where(ends, END, WORD)
        return torch.nn.functional.one_hot(chosen, 8) * 50.0

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        self.slots = [prompt[0] for prompt in prompts]
        self.calls.append(("prefill", list(self.slots)))
        return self._logits(self.slots, [0] * len(prompts))

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        self.calls.append(("step", len(next_R)))
        assert len(next_R) == len(self.slots)
        return self._logits(self.slots, (depth_R + 1).tolist())

    def keep(self, index: Tensor) -> None:
        self.slots = [self.slots[i] for i in index.tolist()]
        self.calls.append(("keep", list(self.slots)))

    def refill(self, slot_N: Tensor, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        for slot, prompt in zip(slot_N.tolist(), prompts, strict=True):
            self.slots[slot] = prompt[0]
        self.calls.append(("refill", (slot_N.tolist(), [prompt[0] for prompt in prompts])))
        return self._logits([prompt[0] for prompt in prompts], [0] * len(prompts))


@pytest.fixture
def scripts() -> list[Script]:
    return []


@pytest.fixture
def make(
    make_model: Callable[..., Any], tokenizer: Any, scripts: list[Script], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., NativeSampler]:
    def sampler(refills: bool = True, name: str = "cache", why: str = "", **options: Any) -> NativeSampler:
        def script(model: Any, enters: bool) -> Script:
            scripts.append(Script(model, enters))
            return scripts[-1]

        monkeypatch.setattr(native, "choose", lambda *_, **__: Choice(name, script, refills, why))
        return NativeSampler(make_model("llama"), tokenizer, [END], **options)

    return sampler


def sampled(sampler: NativeSampler, lengths: Sequence[int], limit: int = LIMIT, group: int = 1) -> Completions:
    keys = torch.arange(len(lengths) * group)
    return sampler.sample([[n] for n in lengths], group, SamplingParams(max_completion_length=limit), keys)


def check(out: Completions, lengths: Sequence[int], limit: int = LIMIT) -> None:
    held = [min(length, limit) for length in lengths]
    assert out.mask_BT.sum(1).tolist() == held
    assert out.tokens_BT.shape[1] == max(held)
    assert out.truncated_B.tolist() == [length > limit for length in lengths]
    for row, mask, length in zip(out.tokens_BT, out.mask_BT, lengths, strict=True):
        ended = [WORD] * (length - 1) + [END] if length <= limit else [WORD] * limit
        assert row[mask].tolist() == ended
        assert set(row[~mask].tolist()) <= {PAD}
    assert out.tokens_BT.dtype == torch.int64
    assert out.logp_BT.dtype == torch.float32
    torch.testing.assert_close(out.logp_BT, torch.zeros_like(out.logp_BT), atol=1e-6, rtol=0)
    assert (out.logp_BT[~out.mask_BT] == 0).all()


def steps(script: Script) -> list[int]:
    return [size for name, size in script.calls if name == "step"]


@pytest.mark.parametrize("at_once", [None, 1, 2, 3, 7, 50])
@pytest.mark.parametrize("refills", [True, False])
def test_every_row_is_completed_whoever_is_in_the_batch_with_it(
    at_once: int | None, refills: bool, make: Callable[..., NativeSampler], scripts: list[Script]
) -> None:
    lengths = [3, 1, 12, 2, 10, 1, 11, 4, 1]
    check(sampled(make(refills, rows_at_once=at_once), lengths), lengths)
    assert max(size for script in scripts for size in steps(script)) <= (at_once or 9)


def test_rows_that_ended_leave_when_fewer_than_three_in_four_are_left(
    make: Callable[..., NativeSampler], scripts: list[Script]
) -> None:
    """Of eight: two may idle, the third takes them along; of five one, of three none."""
    sampled(make(), list(range(1, 9)))
    (script,) = scripts
    assert steps(script) == [8, 8, 5, 5, 3, 2, 1]
    assert [kept for name, kept in script.calls if name == "keep"] == [[4, 5, 6, 7, 8], [6, 7, 8], [7, 8], [8]]
    assert script.calls[0] == ("prefill", list(range(1, 9)))
    assert not script.refills


def test_rows_that_wait_enter_when_an_eighth_of_the_slots_is_free(
    make: Callable[..., NativeSampler], scripts: list[Script]
) -> None:
    """Of sixteen slots the first row that ends is waited with, the second brings two in; nobody leaves before all are
    in."""
    lengths = [1, 2, *[8] * 14, 7, 6, 5]
    check(sampled(make(rows_at_once=16), lengths), lengths)
    (script,) = scripts
    assert script.refills
    names = [name for name, _ in script.calls]
    refills = [given for name, given in script.calls if name == "refill"]
    assert names.index("refill") == 2  # prefill, a step, and both slots are filled
    assert refills == [([0, 1], [7, 6]), ([0], [5])]
    assert "keep" not in names[: len(names) - 1 - names[::-1].index("refill")]
    assert all(size == 16 for size in steps(script)[: names.index("refill")])


def test_no_more_rows_enter_than_wait(make: Callable[..., NativeSampler], scripts: list[Script]) -> None:
    """All slots are free at once, and one row is left."""
    lengths = [2, 2, 2, 2, 3]
    check(sampled(make(rows_at_once=4), lengths), lengths)
    assert [given for name, given in scripts[0].calls if name == "refill"] == [([0], [3])]


def test_where_no_row_may_enter_the_batch_is_sampled_in_waves(
    make: Callable[..., NativeSampler], scripts: list[Script]
) -> None:
    sampled(make(False, rows_at_once=2), [3, 4, 1, 2, 5])
    assert [script.calls[0] for script in scripts] == [("prefill", [3, 4]), ("prefill", [1, 2]), ("prefill", [5])]
    assert not any(script.refills for script in scripts)


def test_a_prompts_completions_are_below_each_other(make: Callable[..., NativeSampler], scripts: list[Script]) -> None:
    check(sampled(make(), [2, 4], group=3), [2, 2, 2, 4, 4, 4])
    assert scripts[0].calls[0] == ("prefill", [2, 2, 2, 4, 4, 4])


@pytest.mark.parametrize("at_once", [None, 2])
def test_each_token_and_each_end_is_told_when_it_is_sampled(
    at_once: int | None, make: Callable[..., NativeSampler]
) -> None:
    sampler, told = make(rows_at_once=at_once), []
    sampler.progress = lambda tokens, ended: told.append((tokens, ended))
    sampled(sampler, [1, 2, 3])
    assert told == ([(3, 1), (2, 1), (1, 1)] if at_once is None else [(2, 1), (1, 0), (2, 1), (1, 1)])


def test_a_completion_of_one_token_may_be_all_that_fits(make: Callable[..., NativeSampler]) -> None:
    check(sampled(make(), [1, 2], limit=1), [1, 2], limit=1)


TEXTS = [
    "xno more",
    "no",
    "onnoooo",
    "nxo nn on",
    "o no o",
    "nnnnnn",
    "yes, no, no",
    "noo",
    "n",
    "a pair of no",
    "n|o",
    "no|",
]


@pytest.mark.parametrize("at_once", [None, 1, 3, 4])
def test_a_row_ends_behind_its_first_stop_string_wherever_the_others_are(
    at_once: int | None, make: Callable[..., NativeSampler], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letter by letter: row k spells text k, and blanks after it. Of two stop strings the first that comes counts, and
    the end token (|) ends a row as ever."""
    letters = {letter: tokenizer(letter)["input_ids"][0] for letter in set("".join(TEXTS)) - {"|"} | {" "}}
    spelled = [[{**letters, "|": END}[letter] for letter in text.ljust(16)] for text in TEXTS]

    def spell(self: Script, rows: Sequence[int], token: Sequence[int]) -> Tensor:
        chosen = torch.tensor([spelled[row][t] for row, t in zip(rows, token, strict=True)])
        return torch.nn.functional.one_hot(chosen, len(tokenizer)) * 50.0

    monkeypatch.setattr(Script, "_logits", spell)
    sampler, stops = make(rows_at_once=at_once), ("no", "pair")
    params = SamplingParams(max_completion_length=12, stop=stops)
    out = sampler.sample([[k] for k in range(len(TEXTS))], 1, params, torch.arange(len(TEXTS)))
    found = [row[mask].tolist() for row, mask in zip(out.tokens_BT, out.mask_BT, strict=True)]
    ends = [min((text.find(stop) + len(stop) for stop in (*stops, "|") if stop in text), default=13) for text in TEXTS]
    assert found == [row[: min(end, 12)] for row, end in zip(spelled, ends, strict=True)]
    assert out.truncated_B.tolist() == [end > 12 for end in ends]


def test_what_is_decoded_whole_for_every_token_is_named_with_its_reason(
    make: Callable[..., NativeSampler], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        make(name="cache")
        assert caplog.messages == []
        make(name="whole rows", why="its keys are of another kind")
    assert caplog.messages == [
        "LlamaForCausalLM is decoded by computing each row whole for every token, which is slow; its cache is of no "
        "use: its keys are of another kind."
    ]


def test_a_model_that_shares_no_prompts_has_no_steps_of_fixed_shapes_and_says_so_once(
    make: Callable[..., NativeSampler], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        sampler = make(static=True)
        sampled(sampler, [1, 2])
    assert sampler.static is None
    assert caplog.messages == [
        "Decoding without steps of fixed shapes (no CUDA graphs): its attention or its output layer is not that of a "
        "plain decoder."
    ]


@pytest.mark.parametrize("name, shares, lean", [("lean", True, True), ("shared", True, False), ("cache", False, False)])
def test_the_way_to_decode_says_whether_prompts_are_shared_and_layers_lean(
    name: str, shares: bool, lean: bool, make: Callable[..., NativeSampler]
) -> None:
    sampler = make(name=name)
    assert (sampler.shares, sampler.is_lean) == (shares, lean)


def test_weights_of_two_types_are_tried_under_the_type_of_their_products(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """A float32 matrix among bfloat16 ones takes no bfloat16 input: without autocast every way would fail."""
    model = make_model("llama").to(torch.bfloat16)
    model.model.layers[0].self_attn.q_proj.float()
    assert NativeSampler(model, tokenizer, [END], dtype=torch.bfloat16).choice.name in ("lean", "shared")


def test_prompts_are_shared_and_layers_lean_unless_it_is_asked_otherwise(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("llama")
    names = [NativeSampler(model, tokenizer, [END], **options).choice.name for options in ({}, {"lean": False})]
    assert names == ["lean", "shared"]
    assert NativeSampler(model, tokenizer, [END], share_prompts=False).choice.name == "cache"
    assert NativeSampler(make_model("gemma2"), tokenizer, [END]).choice.name == "cache"
    plain = NativeSampler(model, tokenizer, [END, 7])
    assert (plain.pad_id, plain.eos_ids, plain.rows_at_once, plain.dtype) == (PAD, (END, 7), None, None)
    assert plain.static is None
    assert plain.progress is None
