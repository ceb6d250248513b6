"""What is sampled, what is trained and what the model computes itself are one, whatever the architecture."""

import json
import logging
from pathlib import Path
from typing import Any

import architectures_page
import pytest
import tiny_models
import torch

from llm_pg.estimators.distributions import token_logp
from llm_pg.model import head
from llm_pg.model.cache import CacheRows, UnknownCache
from llm_pg.model.own_head import has_own_head
from llm_pg.model.policy import Policy
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_packing import gradient, relative
from tests.model.test_policy import policy_of, rollouts

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "architectures.md"
TARGET = 3e-6  # nats a token, in float32

# One of a kind: how it is decoded, and the layout of its training passes.
KINDS = {
    "llama": ("lean", "packed"),
    "olmoe": ("shared", "packed"),  # experts
    "deepseek_v3": ("shared", "packed"),  # latent attention: values of another width than keys
    "opt": ("shared", "packed"),  # learned positions
    "qwen3_5_text": ("cache", "grouped"),  # linear attention beside attention
    "lfm2": ("cache", "grouped"),  # convolutions beside attention
    "falcon_h1": ("cache", "grouped"),  # both in one layer
    "mamba": ("cache", "padded"),  # a state alone
    "recurrent_gemma": ("cache", "padded"),  # a state that the modules keep
    "bloom": ("cache", "grouped"),  # positions in the scores
    "mistral": ("cache", "grouped"),  # a sliding window
    "gemma2": ("cache", "grouped"),  # a cap on the logits
    "cohere": ("cache", "packed"),  # logits that are scaled
    "modernbert-decoder": ("cache", "grouped"),  # a layer between its body and its output layer
    "llama4_text": ("cache", "grouped"),  # windows in chunks, layers without positions
    "minimax": ("cache", "grouped"),  # a cache of a class of its own
    "diffllama": ("cache", "packed"),  # its values differ from layer to layer
    "rwkv": ("whole rows", "padded"),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_sampler_trainer_and_model_agree_on_every_kind_of_architecture(model_type: str) -> None:
    row = architectures_page.measured(tiny_models.make(model_type))
    assert (row.engine, row.layout) == KINDS[model_type]
    assert max(row.sampler, row.trainer) < TARGET
    assert row.kl < 1e-6
    assert row.reloaded == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_every_architecture_does() -> None:
    """Where this fails: python docs/generators/architectures_page.py docs/architectures.md"""
    assert PAGE.read_text(encoding="utf-8") == architectures_page.markdown()


def test_the_page_has_every_architecture_of_this_transformers() -> None:
    named = {line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text(encoding="utf-8").splitlines()}
    assert set(tiny_models.architectures()) <= named


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2", "falcon_h1", "zamba2", "mistral", "bloom"])
def test_the_gradient_of_completions_that_go_on_from_their_prompt_is_the_padded_one(model_type: str) -> None:
    model, batch = tiny_models.make(model_type), rollouts(num_prompts=5, group=4)
    grouped, padded = policy_of(model), policy_of(model, packing="padded")
    assert (grouped.layout.name, padded.layout.name) == ("grouped", "padded")
    for micro_rows in (99, 3):
        assert relative(gradient(grouped, batch, micro_rows=micro_rows), gradient(padded, batch)) < 1e-5


def test_rows_that_enter_a_hybrids_batch_are_sampled_as_if_they_had_been_there_from_the_start(tokenizer: Any) -> None:
    """More rows than the batch takes, prompts of several lengths, and columns cut as the first rows leave."""
    model, params = tiny_models.make("qwen3_5_text"), SamplingParams(max_completion_length=50)
    prompts = [tuple(range(5, 5 + n)) for n in (3, 12, 7, 20, 5, 9, 4, 15)]
    keys = torch.arange(8 * 3)
    whole, few = (
        NativeSampler(model, tokenizer, range(88, 95), at_once).sample(prompts, 3, params, keys)
        for at_once in (None, 4)
    )
    assert len(set(whole.mask_BT.sum(1).tolist())) > 5
    assert torch.equal(whole.tokens_BT, few.tokens_BT)
    torch.testing.assert_close(whole.logp_BT, few.logp_BT, atol=5e-6, rtol=0)


def test_a_hybrids_prompt_is_computed_once_for_its_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("lfm2")
    sampler = NativeSampler(model, tokenizer, [1])
    seen: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = [tuple(range(5, 15)), tuple(range(30, 40))]
    sampler.sample(prompts, 6, SamplingParams(max_completion_length=4), torch.arange(12))
    assert seen[0] == (2, 10)
    assert all(tokens == 1 for _, tokens in seen[1:])


def test_a_model_without_a_usable_cache_is_named_before_the_first_step(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llm_pg.sampling"):
        NativeSampler(tiny_models.make("openai-gpt"), tokenizer, [1])
    assert "OpenAIGPTLMHeadModel" in caplog.text
    assert "it returns no cache" in caplog.text


def test_a_model_that_sees_what_follows_is_refused() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=101, d_model=32, n_layer=2, n_head=4, d_inner=64)).eval()
    with pytest.raises(ValueError, match="depends on tokens behind it"):
        Policy(model, params=SamplingParams(), pad_id=0)


def test_a_cap_shows_in_a_model_whose_logits_are_still_small(tokenizer: Any) -> None:
    """Its cap changes fresh logits by less than rounding shows, and those of the trained model by nats."""
    model = tiny_models.make("gemma2", final_logit_softcapping=30.0)
    sampler, policy = NativeSampler(model, tokenizer, [1]), policy_of(model)
    with torch.no_grad():
        model.lm_head.weight *= 200  # as after training
    done = sampler.sample([(5, 6, 7)], 4, SamplingParams(max_completion_length=9), torch.arange(4))
    for tokens, logp in zip(done.tokens_BT, done.logp_BT, strict=True):
        logits = model(input_ids=torch.tensor([[5, 6, 7, *tokens.tolist()]])).logits[0, 2:-1]
        torch.testing.assert_close(logp, token_logp(logits, tokens).detach(), atol=1e-4, rtol=0)
    assert policy.layout.name == "grouped"


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "modernbert-decoder"])
def test_logits_that_are_more_than_a_product_have_the_gradient_of_the_models_own_forward(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of some tens, which a cap changes; in one piece and in several."""
    model, batch = tiny_models.make(model_type), rollouts(num_prompts=4, group=4)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 100
    assert batch.tokens_BT is not None
    advantage_BT = torch.linspace(-1.0, 1.0, batch.mask_BT.numel()).view(batch.mask_BT.shape)
    total = torch.zeros(())
    for row, prompt in enumerate(batch.prompt_ids_B):
        done = batch.tokens_BT[row, : int(batch.length_B[row])]
        logits = model(input_ids=torch.tensor([[*prompt, *done.tolist()]]), use_cache=False).logits
        total = total + token_logp(logits[0, len(prompt) - 1 : -1], done) @ advantage_BT[row, : len(done)]
    total.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    policy = policy_of(model)
    assert policy.layout.name != "padded"
    assert relative(gradient(policy, batch), expected) < 1e-5
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 5 * head.head_width(model.get_output_embeddings()))
    assert relative(gradient(policy, batch), expected) < 1e-5


def test_a_head_that_looks_at_other_tokens_is_not_called_without_the_body() -> None:
    model = tiny_models.make("cohere")
    assert has_own_head(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x + x.roll(1, 1))
    assert not has_own_head(model)


def test_what_counts_rows_is_found_by_the_shape_of_a_cache() -> None:
    """States by names of their own, an axis of rows that is not the first, and a number that counts tokens."""

    def cache(rows: int, tokens: int) -> dict[str, Any]:
        return {
            "keys": [torch.arange(rows * tokens * 2.0).view(rows, tokens, 2)],
            "positions": torch.arange(rows * 3).view(3, rows),
            "seen": tokens,
            "width": 16,
        }

    known = CacheRows((cache(2, 2), cache(3, 2), cache(2, 3)))
    held, other = cache(4, 5), cache(2, 3)
    known.select(held, torch.tensor([3, 3, 0]))
    assert torch.equal(held["keys"][0], cache(4, 5)["keys"][0][[3, 3, 0]])
    assert torch.equal(held["positions"], cache(4, 5)["positions"][:, [3, 3, 0]])
    known.join(held, other, 5)
    assert held["keys"][0].shape == (5, 5, 2)
    assert torch.equal(held["keys"][0][3:, 2:], cache(2, 3)["keys"][0])
    assert (held["keys"][0][3:, :2] == 0).all()
    known.cut(held, 5, 3)
    assert (held["seen"], held["width"], held["keys"][0].shape) == (3, 16, (5, 3, 2))
    with pytest.raises(UnknownCache, match="nothing a row"):
        CacheRows((cache(2, 2), cache(2, 2), cache(2, 2)))


def test_the_configs_of_tiny_models_are_plain_values() -> None:
    assert json.dumps(tiny_models.OTHERS)
