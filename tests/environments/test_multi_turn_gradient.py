"""A row of several turns has the gradient of a plain forward in which the environment's tokens are left out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.distributions import entropy, token_logp
from llm_pg.estimators.returns import reward_to_go
from llm_pg.model.critic import Critic
from llm_pg.rollouts import TextRollouts
from tests.model.test_packing import gradient, relative
from tests.model.test_policy import doubled, in_double, policy_of, rollouts

LAYOUTS = ["shared_prefix", "padded"]


def two_turns(seed: int = 0) -> TextRollouts:
    """Rows of `rollouts` with something inserted: before the first token, in the middle, twice, or nowhere."""
    batch, g = rollouts(num_prompts=3, group=3, seed=seed), torch.Generator().manual_seed(seed)
    inserted = []
    for row, length in enumerate(batch.length_B.tolist()):
        steps = sorted({0, length // 2, length - 1} if row % 3 == 0 else {length // 2} if row % 3 == 1 else set())
        inserted.append(tuple((step, tuple(torch.randint(3, 90, (2 + step,), generator=g).tolist())) for step in steps))
    assert any(inserted)
    return dataclasses.replace(batch, inserted_B=inserted)


def written_out(batch: TextRollouts, row: int) -> tuple[list[int], list[int]]:
    """The whole row as ids, and the places of its sampled tokens: by appending, token by token."""
    assert batch.inserted_B is not None
    assert batch.tokens_BT is not None
    ids, sampled, before = list(batch.prompt_ids_B[row]), [], dict(batch.inserted_B[row])
    for step in range(int(batch.length_B[row])):
        ids += before.get(step, ())
        sampled.append(len(ids))
        ids.append(int(batch.tokens_BT[row, step]))
    return ids, sampled


def alone(model: Any, batch: TextRollouts, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each sampled token by the model's own forward of this row alone."""
    ids, sampled = written_out(batch, row)
    logits = model(torch.tensor([ids])).logits[0]
    before = logits[[place - 1 for place in sampled]]
    return token_logp(before, torch.tensor([ids[place] for place in sampled])), entropy(before)


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_each_sampled_token_is_scored_after_all_that_stands_before_it(
    family: str, packing: str, make_model: Callable[..., Any]
) -> None:
    model, batch = doubled(make_model(family)), in_double(two_turns())
    scores = policy_of(model, packing=packing).forward(batch)
    for row, n in enumerate(batch.length_B.tolist()):
        logp, spread = alone(model, batch, row)
        torch.testing.assert_close(scores.logp_BT[row, :n], logp, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(scores.entropy_BT[row, :n], spread, atol=1e-6, rtol=1e-6)
        assert (scores.logp_BT[row, n:] == 0).all()


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_autograd_through_a_plain_forward(
    family: str, packing: str, make_model: Callable[..., Any]
) -> None:
    model, batch = doubled(make_model(family)), in_double(two_turns())
    advantage_BT = torch.linspace(-1.0, 1.0, batch.mask_BT.numel()).view(batch.mask_BT.shape) * batch.mask_BT
    model.zero_grad()
    for row, n in enumerate(batch.length_B.tolist()):
        (alone(model, batch, row)[0] * advantage_BT[row, :n]).sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    for micro_rows in (99, 2):
        found = gradient(policy_of(model, packing=packing), batch, micro_rows=micro_rows)
        assert relative(found, expected) < 1e-6


def test_packed_equals_padded_to_rounding_in_double(make_model: Callable[..., Any]) -> None:
    model, batch = doubled(make_model("qwen2")), in_double(two_turns(seed=3))
    grads = [gradient(policy_of(model, packing=p), batch, entropy_coef=0.2) for p in LAYOUTS]
    assert relative(*grads) < 1e-10


def test_without_the_inserted_tokens_it_is_another_gradient(make_model: Callable[..., Any]) -> None:
    model, batch = doubled(make_model("llama")), in_double(two_turns())
    bare = dataclasses.replace(batch, inserted_B=None)
    assert relative(gradient(policy_of(model), bare), gradient(policy_of(model), batch)) > 1e-3


@pytest.mark.parametrize("packing", LAYOUTS)
def test_the_critic_values_the_state_with_the_environments_words_in_it(
    packing: str, make_model: Callable[..., Any]
) -> None:
    model, batch = doubled(make_model("llama")), in_double(two_turns())
    critic = Critic(model)
    for p in critic.head.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    batch.truncated_B[:] = True
    seen = policy_of(model, packing=packing, critic=critic).observe(batch, 99, with_logp=False, after=True)
    assert seen.value_BT is not None
    assert seen.after_B is not None
    for row, n in enumerate(batch.length_B.tolist()):
        ids, sampled = written_out(batch, row)
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
        values = critic.values(hidden[[place - 1 for place in sampled]])
        torch.testing.assert_close(seen.value_BT[row, :n], values, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(seen.after_B[row], critic.values(hidden[-1:])[0], atol=1e-6, rtol=1e-6)


def test_a_reward_in_the_middle_credits_its_own_turn_and_those_before_and_no_later_one() -> None:
    """Turns of the steps 0..2, 3..4, 5..6; the second earns 1, the third -2."""
    mask_BT = torch.ones(1, 7, dtype=torch.bool)
    reward_BT, discount_BT = torch.zeros(1, 7), torch.ones(1, 7)
    reward_BT[0, 4], reward_BT[0, 6], discount_BT[0, 6] = 1.0, -2.0, 0.0
    batch = TextRollouts(
        mask_BT=mask_BT,
        logp_BT=-torch.ones(1, 7),
        group_B=torch.zeros(1, dtype=torch.int64),
        reward_BT=reward_BT,
        discount_BT=discount_BT,
        cut_BT=torch.zeros_like(mask_BT),
        valid_B=torch.ones(1),
        truncated_B=torch.zeros(1, dtype=torch.bool),
        tokens_BT=torch.arange(7).unsqueeze(0),
        prompt_ids_B=[(1, 2)],
        inserted_B=[((3, (50, 51)), (5, (52,)))],
    )
    expected = torch.tensor([[-1.0, -1, -1, -1, -1, -2, -2]])
    assert torch.equal(reward_to_go(batch.reward_BT, batch.discount_BT, batch.cut_BT), expected)
    weighed = Algorithm(dataclasses.replace(ALGORITHMS["reinforce"], baseline="none")).compute_advantages(batch)
    assert torch.equal(weighed.advantage_BT, expected)


def test_pieces_that_stand_before_no_sampled_token_are_refused() -> None:
    batch = rollouts(num_prompts=1, group=1)
    n = int(batch.length_B[0])
    for steps in ((n,), (-1,), (1, 1) if n > 1 else (n + 1,)):
        with pytest.raises(ValueError, match="inserted_B"):
            dataclasses.replace(batch, inserted_B=[tuple((step, (5,)) for step in steps)])
