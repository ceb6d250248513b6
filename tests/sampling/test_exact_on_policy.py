"""Exactly on-policy: the sampler's log-probability of each token is the trainer's, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.learner.learner import require_exact
from llm_pg.metrics import read_metrics
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.exact import ExactSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from tests.tiny import ROWS, SMALL_RUN, Recorder, digits

PROMPTS = [[5, 9, 13], list(range(20, 45)), [7] * 11]
PARAMS = SamplingParams(temperature=0.8, max_completion_length=80)  # beyond the first tokens allocated


def sampled(sampler: Any, group: int = 3) -> TextRollouts:
    keys_B = stream_key(0, 1, torch.arange(len(PROMPTS)).unsqueeze(1), torch.arange(group)).flatten()
    done = sampler.sample(PROMPTS, group, PARAMS, keys_B)
    rows = len(keys_B)
    return TextRollouts.of_scored_text(
        mask_BT=done.mask_BT,
        logp_BT=done.logp_BT,
        tokens_BT=done.tokens_BT,
        truncated_B=done.truncated_B,
        group_B=torch.arange(len(PROMPTS)).repeat_interleave(group),
        reward_B=torch.rand(rows),
        prompt_ids_B=[tuple(PROMPTS[i // group]) for i in range(rows)],
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_token_has_the_trainers_log_probability_to_the_last_bit(
    family: str, dtype: torch.dtype | None, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model(family, max_position_embeddings=256)
    autocast = (lambda: torch.autocast("cpu", dtype)) if dtype else (lambda: torch.autocast("cpu", enabled=False))
    policy = Policy(model, params=PARAMS, pad_id=0, autocast=autocast, exact_on_policy=True)
    exact, native = (
        sampled(make(model, tokenizer, [tokenizer.eos_token_id], dtype=dtype)) for make in (ExactSampler, NativeSampler)
    )
    assert exact.mask_BT.sum() > 100
    for micro_rows in (1, 4, 100):
        assert torch.equal(policy.logp(exact, micro_rows), exact.logp_BT)
    assert torch.equal(policy.forward(exact).logp_BT, exact.logp_BT)
    padded = Policy(model, params=PARAMS, pad_id=0, packing="padded", autocast=autocast)
    assert not torch.equal(padded.logp(native, 100), native.logp_BT)


def test_fewer_slots_than_rows_change_nothing(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model("llama", max_position_embeddings=256)
    one, other = (
        sampled(ExactSampler(model, tokenizer, [tokenizer.eos_token_id], slots, dtype=torch.bfloat16))
        for slots in (None, 4)
    )
    assert torch.equal(one.tokens_BT, other.tokens_BT)
    assert torch.equal(one.logp_BT, other.logp_BT)


def trained(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> list[float]:
    given = {**SMALL_RUN, "max_steps": 2, "bf16": True, "max_completion_length": 12, **settings}
    args = GRPOConfig(output_dir=str(folder), **given)
    trainer = GRPOTrainer(model, digits, args=args, train_dataset=ROWS, processing_class=tokenizer, terminal=Recorder())
    trainer.train()
    return [line["sampler_gap"] for line in read_metrics(folder / "r" / "metrics.jsonl") if "sampler_gap" in line]


def test_a_run_has_no_gap_at_any_step(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    assert trained(make_model("llama"), tokenizer, tmp_path / "exact", exact_on_policy=True) == [0.0, 0.0]
    assert min(trained(make_model("llama"), tokenizer, tmp_path / "other", packing="padded")) > 0


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"engine": "transformers"}, "engine transformers computes"),
        ({"num_iterations": 2}, "more than one step"),
        ({"packing": "padded"}, "packing padded"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"top_k": 5}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"entropy_coef": 0.01}, "entropy bonus"),
        ({"max_staleness": 1}, "max_staleness"),
    ],
)
def test_a_setting_that_makes_them_differ_is_refused_by_name(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        GRPOConfig(**{**SMALL_RUN, "max_steps": 1, "exact_on_policy": True, **settings}).check()


def test_a_model_whose_parts_round_otherwise_is_refused_by_name(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*layers are not written out: .* has no embed_tokens"):
        trained(make_model("gpt2"), tokenizer, tmp_path, exact_on_policy=True)


def test_a_sampler_with_other_numbers_ends_the_run() -> None:
    require_exact(0.0)
    with pytest.raises(ValueError, match=r"0\.0003 nats a token"):
        require_exact(3e-4)
