"""The words of the table and their functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llm_pg.algorithms import advantages, loss
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.spec import WORDS
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.rollouts import Rollouts

TABLES = {
    "returns": advantages.CREDITS,
    "baseline": advantages.BASELINES,
    "scale_rewards": advantages.SCALES,
    "normalize_advantages": advantages.NORMALIZATIONS,
    "surrogate": loss.SURROGATES,
    "loss_type": loss.REDUCTIONS,
}


def scored() -> Rollouts:
    g = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    return Rollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-torch.rand(4, 3, generator=g, dtype=torch.float64),
        group_B=torch.tensor([0, 0, 1, 1]),
        reward_B=torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64),
        greedy_B=torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_every_word_has_its_function_and_every_function_its_word(kind: str) -> None:
    by_a_critic = {"value"} if kind == "baseline" else set()
    assert set(TABLES[kind]) | by_a_critic == set(WORDS[kind])
    assert set(loss.CLIPPED) == set(WORDS["surrogate"])


def arguments(kind: str) -> tuple[Any, ...]:
    of = scored()
    return_B, all_sum = of.reward_BT.sum(1), lambda x: x
    batch = Algorithm("rloo").compute_advantages(of)
    ratio_BT = torch.linspace(0.7, 1.4, 12, dtype=torch.float64).view(4, 3)
    return {
        "returns": (return_B, of.reward_BT, of),
        "baseline": (return_B, of, 0.25, all_sum),
        "scale_rewards": (batch.advantage_BT, return_B, of, all_sum),
        "normalize_advantages": (batch.advantage_BT, of.mask_BT, all_sum),
        "surrogate": (ALGORITHMS["cispo"], of.logp_BT, ratio_BT, batch),
        "loss_type": (of.mask_BT.double(), torch.tensor(4.0), torch.tensor(9.0), 3),
    }[kind]


@pytest.mark.parametrize("kind, word", [(kind, word) for kind in sorted(TABLES) for word in TABLES[kind]])
def test_a_function_changes_nothing_that_it_is_given_and_gives_the_same_again(kind: str, word: str) -> None:
    given, before = arguments(kind), copy.deepcopy(arguments(kind))
    first = TABLES[kind][word](*given)
    again = TABLES[kind][word](*given)
    assert torch.equal(first, again)
    for now, then in zip(given, before, strict=True):
        tensors = vars(then) if hasattr(then, "__dict__") else {"": then}
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(now, name) if name else now)
