"""A row's log-probabilities hang on the row alone, also past the original context of its rotary embedding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config.schema import ModelConfig
from llm_pg.metrics import read_metrics
from llm_pg.model.loading import load_model
from llm_pg.model.policy import Policy
from llm_pg.model.rotary import fix_frequencies
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from tests import tiny

ORIGINAL, LONGEST = 16, 40
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3},
}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, "factor": 4.0},
    **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
}
KINDS: dict[str, dict[str, Any]] = {
    "phi3 longrope": {"model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL},
    "llama longrope": {"model_type": "llama", "rope_parameters": LONG},
    "phimoe longrope": {
        **{"model_type": "phimoe", "num_local_experts": 2, "num_experts_per_tok": 2},
        **{"rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.4}},
    },
    "llama dynamic": {
        **{"model_type": "llama", "max_position_embeddings": ORIGINAL},
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}
PLAIN = {"model_type": "llama"}


@pytest.fixture
def make(tokenizer: Any) -> Callable[..., Any]:
    def model(kind: dict[str, Any], **changes: Any) -> Any:
        return load_model(ModelConfig(make={**SIZES, **kind, **changes}), tokenizer, seed=0)

    return model


def batch(*lengths: int) -> Any:
    """A row for each length of its completion, of its own tokens, behind one prompt of 4."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 90, (len(lengths), LONGEST), generator=generator)
    mask_BT = torch.arange(LONGEST) < torch.tensor(lengths).unsqueeze(1)
    return TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-1.0 * mask_BT,
        group_B=torch.zeros(len(lengths), dtype=torch.int64),
        reward_B=torch.zeros(len(lengths)),
        tokens_BT=tokens * mask_BT,
        prompt_ids_B=[(7, 8, 9, 10)] * len(lengths),
    )


def short_row(model: Any, packing: str, *beside: int) -> torch.Tensor:
    policy = Policy(model, params=SamplingParams(), pad_id=0, packing=packing)
    with torch.no_grad():
        return policy.forward(batch(6, *beside)).logp_BT[0, :6]


@pytest.mark.parametrize("kind", KINDS)
def test_without_fixing_a_row_depends_on_its_neighbour_and_with_it_not(kind: str, make: Callable[..., Any]) -> None:
    loose = make(KINDS[kind])
    assert (short_row(loose, "padded") - short_row(loose, "padded", LONGEST - 4)).abs().max() > 1e-3
    model = make(KINDS[kind])
    (told,) = fix_frequencies(model, LONGEST)
    assert told == kind.split()[1]
    for packing in ("padded", "auto"):
        alone, beside = short_row(model, packing), short_row(model, packing, LONGEST - 4, 20)
        torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)
    assert fix_frequencies(model, LONGEST) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_row_is_what_the_model_computes_by_itself(kind: str, make: Callable[..., Any]) -> None:
    """By another road: a row of the longest length alone, through a model as transformers made it."""
    fixed, bare = make(KINDS[kind]), make(KINDS[kind])
    fix_frequencies(fixed, LONGEST)
    ids = torch.randint(5, 90, (1, LONGEST), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(fixed(ids).logits, bare(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_rows_within_the_original_context_are_left_as_they_are(kind: str, make: Callable[..., Any]) -> None:
    model = make(KINDS.get(kind, PLAIN))
    before = short_row(model, "padded")
    assert fix_frequencies(model, 64 if kind == "plain" else ORIGINAL) == []
    assert torch.equal(short_row(model, "padded"), before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_across_the_border_is_what_is_trained(
    kind: str, make: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = tiny.trainer(
        make(KINDS[kind], max_position_embeddings=64) if "dynamic" not in kind else make(KINDS[kind]),
        tokenizer,
        tmp_path,
        lambda completion, **_: len(completion) % 3 / 2,
        rows=[{"prompt": "1+1=" + " " * (n % 2)} for n in range(8)],
        **{"max_steps": 2, "learning_rate": 1e-3, "beta": 0.05},
        max_completion_length=ORIGINAL - 5 if "dynamic" in kind else LONGEST - 5,
    )
    trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert all(line["sampler_gap"] < 1e-5 for line in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert sum("longrope" in line for line in trainer.context.terminal.said) == int("longrope" in kind)


def test_a_sampler_draws_the_same_row_beside_a_longer_one(make: Callable[..., Any], tokenizer: Any) -> None:
    model = make(KINDS["phi3 longrope"])
    fix_frequencies(model, LONGEST)
    sampler = NativeSampler(model, tokenizer, [1])
    params = SamplingParams(max_completion_length=24)
    keys = stream_key(0, 1, torch.arange(2))
    both = sampler.sample([(7, 8, 9), (7, 8, 9, *range(10, 22))], 1, params, keys)
    alone = sampler.sample([(7, 8, 9)], 1, params, keys[:1])
    n = int(alone.mask_BT.sum())
    assert torch.equal(both.tokens_BT[0, :n], alone.tokens_BT[0, :n])
    torch.testing.assert_close(both.logp_BT[0, :n], alone.logp_BT[0, :n], rtol=0, atol=1e-5)
