"""The repetition penalty: transformers' own distribution, sampled by every engine and trained in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from llm_pg import GRPOConfig
from llm_pg.model import head
from llm_pg.model.policy import Policy
from llm_pg.rollout.sampler import Sampler
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.vllm.answers import request
from tests.tiny import encoded

PENALTY = 1.7
TEXTS = ["12+30=", "a longer prompt, and more: ", "xx"]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(repetition_penalty=PENALTY, max_completion_length=9, **changes)


def by_transformers(model: Any, rollouts: TextRollouts, temperature: float) -> torch.Tensor:
    """Log-probabilities row by row: the model's own forward, transformers' own processor, then a softmax."""
    processor = RepetitionPenaltyLogitsProcessor(PENALTY)
    logp_BT = torch.zeros(rollouts.mask_BT.shape)
    for row, (prompt, ids) in enumerate(zip(rollouts.prompt_ids_B, rollouts.completion_ids(), strict=True)):
        whole = torch.tensor([[*prompt, *ids]])
        logits = model(input_ids=whole).logits[0]
        for t, token in enumerate(ids):
            at = len(prompt) + t
            once = whole[0, :at].unique().unsqueeze(0)  # of a token twice, the processor doubles the gradient
            scores = processor(once, logits[at - 1 : at].clone()) / temperature
            logp_BT[row, t] = scores.log_softmax(-1)[0, token]
    return logp_BT


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model("llama")


def rollouts_of(policy: Policy, engine: Any, tokenizer: Any, of: SamplingParams) -> TextRollouts:
    policy.params = of
    samples = Sampler(policy, engine).sample(encoded(tokenizer, TEXTS), 3)
    done = samples.completions
    rollouts: TextRollouts = TextRollouts.of_scored_text(
        mask_BT=done.mask_BT,
        logp_BT=done.logp_BT,
        group_B=torch.arange(3).repeat_interleave(3),
        reward_B=torch.zeros(9),
        tokens_BT=done.tokens_BT,
        prompt_ids_B=[p.ids for p in samples.prompts for _ in range(3)],
    )
    return rollouts


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("at_once", [None, 2])
def test_what_is_sampled_is_what_is_trained_and_what_transformers_penalises(
    model: Any, tokenizer: Any, packing: str, at_once: int | None
) -> None:
    policy = Policy(model, params=params(temperature=0.8), tokenizer=tokenizer, packing=packing)
    engine = NativeSampler(model, tokenizer, [tokenizer.eos_token_id], at_once)
    rollouts = rollouts_of(policy, engine, tokenizer, policy.params)
    expected = by_transformers(model, rollouts, 0.8).detach()
    assert torch.allclose(rollouts.logp_BT, expected, atol=1e-4)
    assert torch.allclose(policy.logp(rollouts, 4), expected, atol=1e-4)
    plain = Policy(model, params=SamplingParams(temperature=0.8), tokenizer=tokenizer).logp(rollouts, 4)
    assert (plain - expected).abs().max() > 0.01


def test_the_gradient_is_that_of_the_penalised_distribution_in_any_number_of_chunks(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(model, params=params(), tokenizer=tokenizer)
    rollouts = rollouts_of(policy, None, tokenizer, policy.params)
    weight_BT = torch.sin(torch.arange(rollouts.mask_BT.numel())).view(rollouts.mask_BT.shape)

    def gradient(logp_BT: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((logp_BT * weight_BT * rollouts.mask_BT).sum(), policy.parameters()))

    expected = gradient(by_transformers(model, rollouts, 1.0))
    for numbers in (head.CHUNK_NUMBERS, 3 * head.head_width(model.get_output_embeddings())):
        monkeypatch.setattr(head, "CHUNK_NUMBERS", numbers)
        for found, wanted in zip(gradient(policy.forward(rollouts).logp_BT), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-3)


def test_generate_samples_the_same_distribution_whatever_padding_a_prompt_has(model: Any, tokenizer: Any) -> None:
    policy = Policy(model, params=params(), tokenizer=tokenizer)
    engine = GenerateSampler(model, tokenizer, [tokenizer.eos_token_id])
    rollouts = rollouts_of(policy, engine, tokenizer, policy.params)
    assert torch.allclose(rollouts.logp_BT, by_transformers(model, rollouts, 1.0), atol=1e-4)
    # The likeliest token after the penalty, by both engines: top_k=1 comes after it.
    one = params(top_k=1)
    mine = rollouts_of(policy, NativeSampler(model, tokenizer, [tokenizer.eos_token_id]), tokenizer, one)
    assert rollouts_of(policy, engine, tokenizer, one).completion_ids() == mine.completion_ids()
    assert all(len(set(ids)) > 1 for ids in mine.completion_ids())


def test_vllm_is_asked_for_it() -> None:
    assert request([1], 2, params(), [0], 3, "s")["repetition_penalty"] == PENALTY
    assert request([1], 2, SamplingParams(), [0], 3, "s")["repetition_penalty"] == 1.0


def test_trls_argument_and_its_generation_keyword_set_it() -> None:
    assert GRPOConfig(repetition_penalty=1.1).rollout.repetition_penalty == 1.1
    assert GRPOConfig(generation_kwargs={"repetition_penalty": 1.2}).rollout.repetition_penalty == 1.2
