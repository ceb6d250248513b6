"""Reward functions that give one number for each token: what becomes of them, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.model.policy import Policy
from llm_pg.prompts import Prompt
from llm_pg.rewards.scorer import Scorer
from llm_pg.rewards.tally import RewardError
from llm_pg.rollout.experience import Experience
from llm_pg.rollout.sampler import Sampler, Samples
from llm_pg.sampling.protocol import SamplingParams
from tests.tiny import encoded


def each_id(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[token / 8 for token in ids] for ids in completion_ids]


def first_token(completion: str, completion_ids: list[int]) -> list[float]:
    return [1.0] + [0.0] * (len(completion_ids) - 1)


def num_tokens(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [float(len(ids)) if place else None for place, ids in enumerate(completion_ids)]


def as_tensors(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    return [torch.ones(len(ids)) for ids in completion_ids]


def too_short(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[1.0] * (len(ids) + (place != 1) - 1) for place, ids in enumerate(completion_ids)]


def with_none(completion_ids: list[list[int]], **_: Any) -> list[list[float | None]]:
    return [[None] * len(ids) for ids in completion_ids]


def with_nan(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[math.nan if place == 2 else 1.0] * len(ids) for place, ids in enumerate(completion_ids)]


@pytest.fixture
def samples(make_model: Callable[..., Any], tokenizer: Any) -> Samples:
    prompts: list[Prompt] = encoded(tokenizer, ["1+2=", "3+4="])
    policy = Policy(make_model("llama"), params=SamplingParams(max_completion_length=6), tokenizer=tokenizer)
    return Sampler(policy).sample(prompts, 3)


def scored(samples: Samples, *functions: Any, **settings: Any) -> Experience:
    with Scorer(functions, in_process=True, **settings) as scorer:
        found: Experience = scorer.score(samples)
    return found


def test_each_token_has_its_own_reward(samples: Samples) -> None:
    experience = scored(samples, each_id)
    for row, ids in enumerate(samples.ids):
        expected = [token / 8 for token in ids]
        assert experience.rollouts.reward_BT[row, : len(ids)].tolist() == expected
        assert experience.rollouts.reward_BT[row, len(ids) :].tolist() == [0.0] * (
            experience.rollouts.reward_BT.shape[1] - len(ids)
        )
        assert experience.scores.reward[row] == pytest.approx(sum(expected))


def test_a_worker_sends_the_rewards_of_tokens_too(samples: Samples) -> None:
    with Scorer([each_id, first_token], workers=1) as scorer:
        found = scorer.score(samples)
    here = scored(samples, each_id, first_token)
    assert torch.equal(found.rollouts.reward_BT, here.rollouts.reward_BT)
    assert found.rollouts.reward_BT[0, 0] == samples.ids[0][0] / 8 + 1


def test_rewards_to_go_credit_a_token_with_those_from_it_on_and_total_with_all(samples: Samples) -> None:
    rollouts = scored(samples, each_id).rollouts
    to_go = Algorithm("reinforce").compute_advantages(rollouts).advantage_BT
    total = Algorithm("reinforce", returns="total").compute_advantages(rollouts).advantage_BT
    for row, ids in enumerate(samples.ids):
        assert to_go[row, : len(ids)].tolist() == pytest.approx([sum(ids[t:]) / 8 for t in range(len(ids))])
        assert total[row, : len(ids)].tolist() == pytest.approx([sum(ids) / 8] * len(ids))


def test_functions_of_both_kinds_are_weighed_and_the_one_number_is_at_the_last_token(samples: Samples) -> None:
    experience = scored(samples, first_token, num_tokens, weights=[2.0, 0.5])
    for row, ids in enumerate(samples.ids):
        expected = [0.0] * len(ids)
        expected[0] += 2.0
        expected[-1] += 0.5 * len(ids) if row else 0.0
        assert experience.rollouts.reward_BT[row, : len(ids)].tolist() == expected
        assert experience.scores.parts["first_token"][row] == 1.0


def test_tensors_of_tokens_are_read(samples: Samples) -> None:
    rollouts = scored(samples, as_tensors).rollouts
    assert torch.equal(rollouts.reward_BT, rollouts.mask_BT.float())


def test_a_number_too_few_is_refused_with_both_numbers(samples: Samples) -> None:
    length = len(samples.ids[1])
    with pytest.raises(RewardError, match=rf"too_short must .* returned {length - 1} for completion 1 of {length} tok"):
        scored(samples, too_short)


def test_none_for_a_token_is_refused(samples: Samples) -> None:
    with pytest.raises(RewardError, match=r"value 0, token 0, is None. Use 0 there"):
        scored(samples, with_none)


def test_nan_for_a_token_leaves_its_completion_unscored(samples: Samples) -> None:
    rollouts = scored(samples, with_nan).rollouts
    assert rollouts.valid_B.tolist() == [True, True, False, True, True, True]
    assert rollouts.reward_BT[2].tolist() == [0.0] * rollouts.reward_BT.shape[1]


def test_a_clip_of_whole_rewards_is_refused(samples: Samples) -> None:
    with pytest.raises(RewardError, match=r"reward_clip_range is \[0, 1\].*gave one for each token"):
        scored(samples, each_id, clip_range=(0.0, 1.0))
