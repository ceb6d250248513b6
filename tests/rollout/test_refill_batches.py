"""What a refilled batch is made of: rows, texts, scores and reports of the groups that were chosen and dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_pg.prompts import Prompt
from llm_pg.rewards.tally import Scores
from llm_pg.rollout.experience import Experience
from llm_pg.rollout.refill import mixed_groups, refill
from tests.tiny import experience, prompts


def asking(rounds_of: list[list[Prompt | None]], answers: list[Experience]) -> Any:
    """What `refill` asks for, and its two callables: `asked` fills with the prompts and places of each round."""
    asked: list[tuple[list[int], list[int]]] = []

    def again(further: list[Prompt], places_P: torch.Tensor) -> Experience:
        asked.append(([prompt.index for prompt in further], places_P.tolist()))
        return answers[len(asked) - 1]

    return asked, again, lambda number: rounds_of[number - 1]


def test_each_round_asks_for_the_places_that_are_left_with_streams_of_their_own() -> None:
    """Places 4, 5 and 6 of a step of eight; the first round mends the last of them, the second none is left of."""
    first = experience(prompts(3), [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    rounds = [[prompts(20)[8 * number + place] for place in range(8)] for number in (0, 1)]
    answers = [experience([rounds[0][4], rounds[0][6]], [[1.0, 1.0], [1.0, 0.0]])]
    answers += [experience([rounds[1][4]], [[0.0, 1.0]])]
    asked, again, further = asking(rounds, answers)  # type: ignore[arg-type]
    taken = refill(first, again, further, torch.tensor([4, 5, 6]), rounds=2)
    assert asked == [([4, 6], [4 + 8, 6 + 8]), ([12], [4 + 16])]
    assert [prompt.index for prompt in taken.prompts] == [12, 1, 6]
    assert taken.collected == [first, *answers]
    assert taken.rollouts.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert taken.scores.reward == [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert taken.num_generations == 2


def test_a_place_without_a_further_prompt_is_not_asked_for_and_the_data_end_with_a_round_that_has_none() -> None:
    first = experience(prompts(2), [[0.0, 0.0], [0.0, 0.0]])
    rounds: list[list[Prompt | None]] = [[None, prompts(9)[8]], [None, None], [prompts(9)[7], None]]
    asked, again, further = asking(rounds, [experience([prompts(9)[8]], [[0.0, 0.0]])])
    taken = refill(first, again, further, torch.arange(2), rounds=3)
    assert asked == [([8], [1 + 2])]  # the second round has nothing for anyone, and the data end there
    assert taken.scores.reward == [0.0] * 4
    assert [prompt.index for prompt in taken.prompts] == [0, 1]


def test_a_batch_that_needs_nothing_asks_for_nothing() -> None:
    first = experience(prompts(2), [[0.0, 1.0], [1.0, 0.0]])
    asked, again, further = asking([[prompts(4)[2], prompts(4)[3]]], [])
    taken = refill(first, again, further, torch.arange(2), rounds=1)
    assert asked == []
    assert taken.collected == [first]
    assert taken.rollouts is first.rollouts


@pytest.mark.parametrize("credit", [{"truncation_penalty": 0.5}, {"to_go": True}])
def test_what_is_credited_decides_of_first_and_further_groups_alike(credit: dict[str, Any]) -> None:
    """Equal sums, but a completion was cut, or was paid at other steps: mixed under one credit and not the other."""

    def made(index: int) -> Experience:
        batch = experience([prompts(5)[index]], [[1.0, 1.0]], [[1, 1]])
        batch.rollouts.truncated_B = torch.tensor([True, False])
        batch.rollouts.reward_BT = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
        return batch

    assert not bool(mixed_groups(made(0)))
    assert bool(mixed_groups(made(0), **credit))
    first, second, further = made(0), made(1), prompts(5)[1:2]
    plain = refill(first, lambda *_: second, lambda _: further, torch.arange(1), rounds=1)
    assert [p.index for p in plain.prompts] == [0]
    assert len(plain.collected) == 2
    assert len(refill(first, lambda *_: second, lambda _: further, torch.arange(1), rounds=1, **credit).collected) == 1
    silent = experience(prompts(1), [[1.0, 1.0]])
    taken = refill(silent, lambda *_: second, lambda _: further, torch.arange(1), rounds=1, **credit)
    assert [p.index for p in taken.prompts] == [1]


def test_an_unscorable_row_and_what_is_outside_the_mask_make_no_group_mixed() -> None:
    batch = experience(prompts(1), [[1.0, 1.0, None]], [[1, 0, 1]])
    batch.rollouts.reward_BT = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 7.0]])
    assert not bool(mixed_groups(batch))
    assert not bool(mixed_groups(batch, to_go=True))  # the second row has one step; its padding is credited with 0


def test_rewards_to_go_at_a_cut_have_the_value_after_it() -> None:
    batch = experience(prompts(1), [[1.0, 1.0]], [[1, 1]])
    rollouts = batch.rollouts
    rollouts.cut_BT = torch.tensor([[False, True], [False, False]])
    rollouts.discount_BT = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert not bool(mixed_groups(batch, to_go=True))
    rollouts.bootstrap_BT = torch.full((2, 2), 3.0)
    assert bool(mixed_groups(batch, to_go=True))
    rollouts.reward_BT = torch.tensor([[0.0, 1.0], [0.0, 4.0]])  # 1 and the 3 that would have followed
    assert not bool(mixed_groups(batch, to_go=True))


def test_a_penalty_can_make_a_group_of_different_rewards_equal() -> None:
    batch = experience(prompts(1), [[1.0, 0.5]])
    batch.rollouts.truncated_B = torch.tensor([True, False])
    assert bool(mixed_groups(batch))
    assert not bool(mixed_groups(batch, truncation_penalty=0.5))


@pytest.fixture
def parts() -> list[Experience]:
    """Two silent groups and a mixed one, of other lengths, functions and reports."""
    first = experience(prompts(2), [[0.0, 0.0], [1.0, 0.0]], [[0, 1], [1, 0]])
    first.scores.extra = {"note": ["a", "b", "c", "d"]}
    first.scores.metrics = {"seen": 1.0}
    first.scores.problems = {"f": {"NaN": 1}}
    more = experience(prompts(9)[8:], [[2.0, 3.0]], [[2, 0]])
    more.scores = Scores(
        [2.0, 3.0],
        {"f": [2.0, 3.0], "g": [5.0, None]},
        {"other": ["e", "f"]},
        {"seen": 4.0, "late": 2.0},
        {"f": {"NaN": 2, "late": 1}, "g": {"late": 3}},
    )
    more.rollouts.truncated_B = torch.tensor([True, False])
    for part, value in ((first, 0.25), (more, 0.75)):
        rollouts = part.rollouts
        rollouts.logp_BT = -value * rollouts.mask_BT
        rollouts.entropy_BT = torch.full_like(rollouts.logp_BT, value)
        rollouts.discount_BT = value * rollouts.mask_BT
        rollouts.greedy_B = torch.full_like(rollouts.valid_B, value, dtype=torch.float32)
    return [first, more]


@pytest.fixture
def taken(parts: list[Experience]) -> Experience:
    first, more = parts
    return refill(first, lambda *_: more, lambda _: [more.prompts[0], None], torch.arange(2), rounds=1)


def test_texts_prompts_and_tensors_are_those_of_the_chosen_rows_padded_to_the_longest(taken: Experience) -> None:
    """The first place has the further group, of three tokens and of one; the second its own, of two and of one."""
    rollouts = taken.rollouts
    assert taken.texts == ["8/2", "8/0", "1/1", "1/0"]
    assert [prompt.index for prompt in taken.prompts] == [8, 1]
    assert rollouts.prompt_ids_B == [(9,), (9,), (2,), (2,)]
    assert rollouts.completion_ids() == [[2, 2, 2], [0], [1, 1], [0]]
    assert rollouts.mask_BT.dtype == torch.bool
    assert rollouts.group_B.tolist() == [0, 0, 1, 1]
    assert rollouts.reward_BT.tolist() == [[0.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert rollouts.logp_BT.tolist() == [[-0.75] * 3, [-0.75, 0, 0], [-0.25, -0.25, 0.0], [-0.25, 0.0, 0.0]]
    assert rollouts.discount_BT[2].tolist() == [0.25, 0.25, 0.0]
    assert rollouts.entropy_BT[3].tolist() == [0.25, 0.25, 0.0]
    assert rollouts.tokens_BT[2].tolist() == [1, 1, 0]
    assert rollouts.greedy_B.tolist() == [0.75, 0.75, 0.25, 0.25]
    assert rollouts.truncated_B.tolist() == [True, False, False, False]
    assert rollouts.ref_logp_BT is None
    assert rollouts.inserted_B is None


def test_scores_are_those_of_the_chosen_rows_and_reports_of_all_that_was_collected(taken: Experience) -> None:
    """The report of four completions and that of two: (1 · 4 + 4 · 2) / 6."""
    scores = taken.scores
    assert scores.reward == [2.0, 3.0, 1.0, 0.0]
    assert scores.parts == {"f": [2.0, 3.0, 1.0, 0.0], "g": [5.0, None, None, None]}
    assert scores.extra == {"note": [None, None, "c", "d"], "other": ["e", "f", None, None]}
    assert scores.metrics == {"seen": pytest.approx(2.0), "late": 2.0}
    assert list(scores.metrics) == ["late", "seen"]
    assert scores.problems == {"f": {"NaN": 3, "late": 1}, "g": {"late": 3}}


def test_what_was_collected_is_left_as_it_was(parts: list[Experience], taken: Experience) -> None:
    first, more = parts
    assert taken.collected == [first, more]
    assert first.rollouts.mask_BT.shape == (4, 2)
    assert first.scores.problems == {"f": {"NaN": 1}}
    assert more.scores.problems["f"] == {"NaN": 2, "late": 1}
    assert first.collected == []


def test_pieces_of_the_run_are_kept_and_pieces_that_an_environment_inserted_follow_their_rows(
    parts: list[Experience],
) -> None:
    first, more = parts
    first.pieces = object()  # type: ignore[assignment]
    first.rollouts.inserted_B = [(), (), ((1, (7,)),), ()]
    taken = refill(first, lambda *_: more, lambda _: [more.prompts[0], None], torch.arange(2), rounds=1)
    assert taken.pieces is first.pieces
    assert taken.rollouts.inserted_B == [(), (), ((1, (7,)),), ()]


def test_fields_with_further_axes_are_padded_along_the_steps(parts: list[Experience]) -> None:
    first, more = parts
    first.rollouts.entropy_BT = torch.ones(4, 2, 3)
    more.rollouts.entropy_BT = torch.full((2, 3, 3), 2.0)
    taken = refill(first, lambda *_: more, lambda _: [more.prompts[0], None], torch.arange(2), rounds=1)
    assert taken.rollouts.entropy_BT.shape == (4, 3, 3)
    assert taken.rollouts.entropy_BT[2].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_rounds_are_counted_from_one_and_their_number_is_the_budget() -> None:
    numbers: list[int] = []

    def further(number: int) -> list[Prompt | None]:
        numbers.append(number)
        return [prompts(9)[number]]

    silent = experience(prompts(1), [[1.0, 1.0]])
    refill(silent, lambda *_: silent, further, torch.arange(1), rounds=3)
    assert numbers == [1, 2, 3]
