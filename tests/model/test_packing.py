"""A batch packed with shared prompts has the log-probabilities and the gradient of a row a completion."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.estimators.distributions import entropy, token_logp
from llm_pg.model import head, segments
from llm_pg.model.exact import packs_exactly
from llm_pg.model.packing import Packed, bins
from llm_pg.model.policy import Policy
from llm_pg.model.segments import MaskedCalls
from llm_pg.rollouts import TextRollouts, distinct
from llm_pg.sampling.protocol import SamplingParams
from tests.conftest import FAMILIES
from tests.model.test_policy import doubled, in_double, policy_of, rollouts

PACKED_FAMILIES = sorted(set(FAMILIES) - {"gemma2"})


def gradient(policy: Policy, batch: TextRollouts, *, entropy_coef: float = 0.0, micro_rows: int = 99) -> torch.Tensor:
    """Gradient of a weighted sum of the log-probabilities and entropies, with weights of either sign."""
    policy.model.zero_grad()
    advantage_BT = torch.linspace(-1.0, 1.0, batch.mask_BT.numel()).view(batch.mask_BT.shape) * batch.mask_BT
    for index in policy.layout.cuts(batch, micro_rows):
        scores = policy.forward(batch.rows(index), entropy_grad=bool(entropy_coef))
        ((scores.logp_BT + entropy_coef * scores.entropy_BT) * advantage_BT[index]).sum().backward()
    return torch.cat([p.grad.reshape(-1) for p in policy.parameters() if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", PACKED_FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_packed_gradient_is_the_padded_one(family: str, temperature: float, make_model: Callable[..., Any]) -> None:
    params, batch = SamplingParams(temperature=temperature), rollouts(num_prompts=5, group=4)
    for convert, prepare, bound in ((lambda m: m, lambda b: b, 1e-5), (doubled, in_double, 1e-10)):
        model = convert(make_model(family))
        packed = policy_of(model, params, packing="shared_prefix")
        padded = policy_of(model, params, packing="padded")
        expected = gradient(padded, prepare(batch))
        for micro_rows in (99, 3):
            assert relative(gradient(packed, prepare(batch), micro_rows=micro_rows), expected) < bound


def test_with_truncated_support_or_an_entropy_bonus_the_gradient_is_the_padded_one(
    make_model: Callable[..., Any],
) -> None:
    model, batch = doubled(make_model("qwen2")), in_double(rollouts(4, 4))
    for params, coefficient in ((SamplingParams(top_p=0.9), 0.0), (SamplingParams(), 0.3)):
        grads = [
            gradient(policy_of(model, params, packing=p), batch, entropy_coef=coefficient)
            for p in ("shared_prefix", "padded")
        ]
        assert relative(*grads) < 1e-10


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_attention_written_out_is_that_of_the_kernel(
    family: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken in bfloat16 alone, whose rounding hides mistakes: here it is made to compute in float64."""
    monkeypatch.setattr(segments, "is_written_out", lambda *_: True)
    batch = in_double(rollouts(num_prompts=5, group=4))
    packed = gradient(policy_of(doubled(make_model(family)), packing="shared_prefix"), batch)
    padded = gradient(policy_of(doubled(make_model(family)), packing="padded"), batch)
    assert relative(packed, padded) < 1e-12


@pytest.mark.parametrize("cells", [0, 1 << 16])
def test_short_runs_under_bf16_go_without_the_kernel_and_lose_no_digit(
    cells: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(segments, "kernels_for", lambda: None)
    monkeypatch.setattr(segments, "CELLS_WRITTEN_OUT", cells)
    monkeypatch.setattr(segments.F, "scaled_dot_product_attention", counted)
    model, batch = make_model("llama"), rollouts(num_prompts=5, group=4)
    half = policy_of(model, packing="shared_prefix", autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    exact = gradient(policy_of(model, packing="padded"), batch)
    calls.clear()
    assert relative(gradient(half, batch), exact) < 0.02
    assert bool(calls) == (cells == 0)


def test_sliding_windows_and_soft_caps_take_the_padded_layout(make_model: Callable[..., Any]) -> None:
    model = make_model("gemma2")
    assert not packs_exactly(model)
    assert policy_of(model).layout.way is None
    with pytest.raises(ValueError, match=r"train\.packing: auto"):
        policy_of(model, packing="shared_prefix")
    # One window over every layer and no soft cap: the short trial alone would not see it.
    assert not packs_exactly(make_model("qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=0))


def test_a_model_whose_positions_are_ignored_fails_the_trial(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    assert packs_exactly(model)
    core, original = model.transformer, model.transformer.forward
    core.forward = lambda *args, position_ids=None, **kwargs: original(*args, **kwargs)
    assert not packs_exactly(model)


def test_gradient_checkpointing_switched_on_later_takes_the_padded_layout(make_model: Callable[..., Any]) -> None:
    model, batch = make_model("llama"), rollouts()
    policy = policy_of(model)
    assert policy.layout.way is MaskedCalls
    expected = gradient(policy, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert relative(gradient(policy, batch), expected) < 1e-5


def test_the_packed_layout_is_refused_where_it_is_asked_for_and_layers_run_again(
    make_model: Callable[..., Any],
) -> None:
    model = make_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"train\.packing: auto"):
        policy_of(model, packing="shared_prefix")
    with pytest.raises(ConfigError, match=r"packing is shared_prefix and gradient_checkpointing is true.*packing=auto"):
        check_values({"packing": "shared_prefix", "gradient_checkpointing": True})


def test_each_prompt_is_one_run_and_the_last_tokens_are_no_inputs() -> None:
    batch = rollouts(num_prompts=3, group=4)
    packed = Packed(batch.prompt_ids_B, batch.completion_ids(), torch.device("cpu"))
    prompts = sum(len(p) for p in set(batch.prompt_ids_B))
    assert packed.ids.shape[1] == prompts + int((batch.length_B - 1).sum())


def test_completions_of_one_token_and_a_single_row_pack(make_model: Callable[..., Any]) -> None:
    model, batch = make_model("llama"), rollouts(2, 2)
    short = dataclasses.replace(batch, mask_BT=batch.mask_BT & (torch.arange(7) == 0))
    for rows in (short, batch.rows(torch.tensor([1]))):
        ours, plain = (policy_of(model, packing=p).forward(rows).logp_BT for p in ("shared_prefix", "padded"))
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_an_adapter_trains_through_the_packed_layout(make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    batch = rollouts(4, 4)
    grads = [gradient(policy_of(model, packing=p), batch) for p in ("shared_prefix", "padded")]
    assert relative(*grads) < 1e-5


@given(
    groups=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=6),
    budget=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_bins_hold_each_row_once_within_the_budget(groups: list[list[int]], budget: int) -> None:
    prompt_ids_B = [ids for ids, group in [((i,) * 5, group) for i, group in enumerate(groups)] for _ in group]
    lengths = [n for group in groups for n in group]
    passes = bins(prompt_ids_B, lengths, budget)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        size = sum(lengths[r] for r in rows) + 5 * len({prompt_ids_B[r] for r in rows})
        assert size <= budget or len(rows) == 1
    whole = [g for g, group in enumerate(groups) if sum(group) + 5 <= budget]
    for g in whole:
        assert len({i for i, rows in enumerate(passes) for r in rows if prompt_ids_B[r] == (g,) * 5}) == 1


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_chunked_head_is_the_log_softmax(rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=g, dtype=torch.float64, requires_grad=True)
    linear = torch.nn.Linear(6, 20, bias=False).double()
    token = torch.randint(20, (11,), generator=g)
    weight = torch.randn(11, generator=g, dtype=torch.float64)
    monkeypatch.setattr(head, "CHUNK_NUMBERS", rows * 20)
    params = SamplingParams(temperature=temperature)
    logp, nats = head.token_scores(hidden, linear, token, params, with_entropy=True, entropy_grad=False)
    warped = linear(hidden) / temperature
    torch.testing.assert_close(logp, token_logp(warped, token))
    torch.testing.assert_close(nats, entropy(warped))
    leaves = (hidden, linear.weight)
    ours = torch.autograd.grad((logp * weight).sum(), leaves)
    theirs = torch.autograd.grad((token_logp(warped, token) * weight).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_no_chunk_of_logits_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, original = [], head._logits

    def seen(*args: Any) -> torch.Tensor:
        logits = original(*args)
        largest.append(logits.numel())
        return logits

    monkeypatch.setattr(head, "_logits", seen)
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 100)
    hidden = torch.randn(11, 6, requires_grad=True)
    linear = torch.nn.Linear(6, 20, bias=False)
    token = torch.zeros(11, dtype=torch.int64)
    logp, _ = head.token_scores(hidden, linear, token, SamplingParams(), with_entropy=True, entropy_grad=False)
    logp.sum().backward()
    assert max(largest) == 100


def test_a_prompt_is_found_again_by_its_object_and_not_by_its_tokens() -> None:
    ids = [5, 6, 7]
    one, two, again = tuple(ids), (8, 8, 8), tuple(ids)
    prompts, places = distinct([one, two, one, again, two])
    assert prompts == [one, two, one]
    assert [id(prompt) for prompt in prompts] == [id(one), id(two), id(again)]
    assert places == [0, 1, 0, 2, 1]
    mask_BT = torch.ones(3, 1, dtype=torch.bool)
    made = TextRollouts.of_scored_text(
        mask_BT=mask_BT, logp_BT=-mask_BT.float(), group_B=torch.arange(3), reward_B=[1.0, 0.0, None],
        prompt_ids_B=[one, two, again],
    )  # fmt: skip
    assert made.prompt_ids_B[0] is made.prompt_ids_B[2]
    assert distinct(made.rows(torch.tensor([2, 0])).prompt_ids_B)[1] == [0, 0]
