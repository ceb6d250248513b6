"""Completions before they are scored: what they are a function of, how functions get them, what scores make of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg import Policy, Sampler
from llm_pg.metrics import Clock
from llm_pg.prompts import Prompt
from llm_pg.rewards.tally import Scores
from llm_pg.rollout.sampler import EVAL_STREAM, TRAIN_STREAM, Samples, in_trls_form
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from tests.tiny import collector, encoded

TEXTS = ["ab=", "a longer prompt, and more: ", "x"]


@pytest.fixture
def policy(make_model: Callable[..., Any], tokenizer: Any) -> Policy:
    return Policy(make_model("llama"), params=SamplingParams(max_completion_length=6), tokenizer=tokenizer)


@pytest.fixture
def prompts(tokenizer: Any) -> list[Prompt]:
    return encoded(tokenizer, TEXTS)


def test_a_sampler_draws_what_the_collector_of_a_run_draws_and_counts_steps_from_zero(
    policy: Policy, make_model: Callable[..., Any], tokenizer: Any, prompts: list[Prompt]
) -> None:
    of_run = collector(make_model("llama"), tokenizer, seed=5, max_completion_length=6)
    for step in (0, 3):
        samples = Sampler(policy).sample(prompts, 2, seed=(5, step))
        assert samples.texts == of_run.collect(prompts, step + 1, 2, Clock()).texts
        assert (samples.num_steps, samples.num_generations, samples.prompts) == (step, 2, prompts)
    assert Sampler(policy).sample(prompts, 2, seed=(5, 0)).texts != samples.texts
    assert Sampler(policy).sample(prompts, 2, seed=(6, 3)).texts != samples.texts


def test_the_seed_of_a_run_and_the_step_are_zero_where_none_is_given(policy: Policy, prompts: list[Prompt]) -> None:
    sampler = Sampler(policy)
    assert sampler.sample(prompts, 2).texts == sampler.sample(prompts, 2, seed=(0, 0), first_place=0).texts


def test_a_part_of_a_step_is_sampled_from_its_place_on(policy: Policy, prompts: list[Prompt]) -> None:
    sampler = Sampler(policy)
    whole = sampler.sample(prompts, 2, seed=(1, 4)).texts
    assert sampler.sample(prompts[1:], 2, seed=(1, 4), first_place=1).texts == whole[2:]
    turned = sampler.sample([prompts[2], prompts[0]], 2, seed=(1, 4), first_place=torch.tensor([2, 0])).texts
    assert turned == whole[4:] + whole[:2]


def test_training_and_evaluation_have_streams_of_their_own(policy: Policy) -> None:
    of_training, of_evaluation = (Sampler.keys(0, stream, 1, 3, 2) for stream in (TRAIN_STREAM, EVAL_STREAM))
    assert of_training.shape == (6,)
    assert not set(of_training.tolist()) & set(of_evaluation.tolist())


def test_no_two_rows_of_a_run_have_one_stream_and_the_first_place_is_zero() -> None:
    keys = [
        Sampler.keys(seed, stream, step, 3, 2, place)
        for seed, stream, step, place in itertools.product((0, 1), (1, 2), (1, 2, 3), (0, 3))
    ]
    assert len(set(torch.cat(keys).tolist())) == 2 * 2 * 3 * 2 * 6
    assert torch.equal(Sampler.keys(0, 1, 1, 3, 2), keys[0])


def test_a_draw_by_another_distribution_has_that_distribution_and_no_updates_before_it(
    policy: Policy, prompts: list[Prompt]
) -> None:
    sampler = Sampler(policy)
    greedy = SamplingParams(greedy=True, max_completion_length=3)
    one, other = (sampler.draw(prompts, 1, greedy, Sampler.keys(seed, 1, 1, 3, 1)) for seed in (0, 1))
    assert one.texts == other.texts
    assert max(len(ids) for ids in one.ids) == 3
    assert one.num_steps == 0


def test_a_sampler_without_an_engine_ends_where_the_model_does_and_computes_as_the_policy_does(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = [7, 9]
    policy.sampling_dtype = torch.bfloat16
    engine = Sampler(policy).engine
    assert engine.eos_ids == (policy.tokenizer.eos_token_id, 7, 9)
    assert engine.dtype == torch.bfloat16


def test_an_engine_of_ones_own_is_asked_and_else_the_native_one_on_the_policys_model(
    policy: Policy, prompts: list[Prompt]
) -> None:
    assert isinstance(Sampler(policy).engine, NativeSampler)
    before = Sampler(policy).sample(prompts, 2).texts
    own = NativeSampler(policy.model, policy.tokenizer, [policy.tokenizer.eos_token_id])
    assert Sampler(policy, own).engine is own
    assert Sampler(policy, own).sample(prompts, 2).texts == before
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(-1)
    assert Sampler(policy).sample(prompts, 2).texts != before


def test_ids_are_what_was_sampled_without_padding_and_texts_what_they_read(
    policy: Policy, prompts: list[Prompt]
) -> None:
    samples = Sampler(policy).sample(prompts, 24)
    done = samples.completions
    assert [len(ids) for ids in samples.ids] == done.mask_BT.sum(1).tolist()
    assert len({len(ids) for ids in samples.ids}) > 2
    for ids, text, row in zip(samples.ids, samples.texts, done.tokens_BT.tolist(), strict=True):
        assert row[: len(ids)] == ids
        assert policy.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "".join(samples.pieces(samples.ids[0])) == policy.tokenizer.decode(samples.ids[0])


def test_another_reader_is_used_where_it_is_given(policy: Policy, prompts: list[Prompt]) -> None:
    sampler = Sampler(policy, reader=lambda ids: [str(len(row)) for row in ids])  # type: ignore[arg-type]
    samples = sampler.sample(prompts, 2)
    assert samples.texts == [str(len(ids)) for ids in samples.ids]


def test_conversations_are_given_as_messages_and_plain_prompts_as_text() -> None:
    messages = [{"role": "user", "content": "hello"}]
    plain, chat = Prompt(0, "p", None, (1,), {"answer": "1"}), Prompt(1, "q", messages, (2,), {"answer": "2"})
    given, completions, rows = in_trls_form([plain, chat], ["yes", "no"])
    assert given == ["p", messages]
    assert completions == ["yes", [{"role": "assistant", "content": "no"}]]
    assert rows == [{"answer": "1"}, {"answer": "2"}]
    with pytest.raises(ValueError, match="longer"):
        in_trls_form([plain, chat], ["yes", "no", "perhaps"])


def test_reward_functions_get_each_completion_with_its_own_prompt_and_row(policy: Policy, tokenizer: Any) -> None:
    some = [Prompt(i, text, None, tuple(tokenizer(text)["input_ids"]), {"n": i}) for i, text in enumerate(TEXTS)]
    samples = Sampler(policy).sample(some, 2)
    given, completions, ids, rows = samples.inputs
    assert given == [text for text in TEXTS for _ in range(2)]
    assert rows == [{"n": n} for n in (0, 0, 1, 1, 2, 2)]
    assert (completions, ids) == (samples.texts, samples.ids)


@pytest.fixture
def samples(policy: Policy, prompts: list[Prompt]) -> Samples:
    return Sampler(policy, gamma=0.5).sample(prompts, 2)


def test_scored_samples_are_rollouts_with_the_verdict_at_the_last_token(policy: Policy, samples: Samples) -> None:
    scores = Scores([1.0, 2.0, None, 4.0, 5.0, 6.0], {"f": [1.0, 2.0, None, 4.0, 5.0, 6.0]})
    batch = samples.scored(scores)
    rollouts, done = batch.rollouts, samples.completions
    assert rollouts.reward_BT.sum(1).tolist() == [1.0, 2.0, 0.0, 4.0, 5.0, 6.0]
    assert rollouts.reward_BT.dtype == torch.float32
    assert rollouts.valid_B.tolist() == [True, True, False, True, True, True]
    assert rollouts.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollouts.prompt_ids_B == [p.ids for p in samples.prompts for _ in range(2)]
    assert rollouts.completion_ids() == samples.ids
    assert torch.equal(rollouts.logp_BT, done.logp_BT)
    assert torch.equal(rollouts.truncated_B, done.truncated_B)
    inside = rollouts.mask_BT & (rollouts.reward_BT == 0) & rollouts.valid_B.unsqueeze(1)
    assert set(rollouts.discount_BT[inside].tolist()) == {0.5}
    plain = dataclasses.replace(samples, gamma=Sampler(policy).gamma).scored(scores).rollouts
    assert set(plain.discount_BT[inside].tolist()) == {1.0}
    assert rollouts.greedy_B is None
    assert (batch.scores, batch.texts, batch.num_generations) == (scores, samples.texts, 2)
    assert (batch.prompts, batch.pieces) == (samples.prompts, samples.pieces)


def test_a_group_without_a_greedy_reward_cannot_be_trained_on(samples: Samples) -> None:
    scores = Scores([1.0, None, 3.0, 4.0, 5.0, 6.0], {})
    rollouts = samples.scored(scores, [0.25, None, 0.75]).rollouts
    assert rollouts.greedy_B.tolist() == [0.25, 0.25, 0.0, 0.0, 0.75, 0.75]
    assert rollouts.valid_B.tolist() == [True, False, False, False, True, True]
