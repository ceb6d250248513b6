"""Where the rollouts of a step come from: the run's own prompts, a rank's share of them, and what replaces silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.metrics import Clock
from llm_pg.prompts import Prompts
from llm_pg.rollout.collector import Collector
from llm_pg.rollout.experience import Experience
from llm_pg.rollout.refill import mixed_groups
from llm_pg.rollout.source import DirectSource, DynamicSampling
from tests.tiny import ROWS, collector, length


def begins_with_a_digit(completions: list[str], **row: Any) -> list[float]:
    return [float(text[:1].isdigit()) for text in completions]


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., DirectSource]:
    def source(reward: Any = length, **changes: Any) -> DirectSource:
        sampler = collector(make_model("llama"), tokenizer, reward, seed=3, max_completion_length=4)
        return DirectSource(sampler, Prompts(ROWS, tokenizer, per_step=6, seed=1), 3, **changes)

    return source


def rows(batch: Experience) -> list[tuple[Any, ...]]:
    r = batch.rollouts
    ids = r.completion_ids()
    return [(r.prompt_ids_B[i], ids[i], batch.scores.reward[i], float(r.reward_BT[i].sum())) for i in range(len(ids))]


def test_a_step_is_the_runs_prompts_of_that_step_sampled_at_their_places(make: Callable[..., DirectSource]) -> None:
    source = make()
    for step in (1, 4):
        taken = source.prompts.take(step - 1)
        batch = source.collect(step)
        assert source.prompts_of(step) == batch.prompts == taken
        assert rows(batch) == rows(source.collector.collect(taken, step, 3, Clock(), 0))
        assert batch.num_generations == 3
        assert batch.rollouts.greedy_B is None


@pytest.mark.parametrize("rounds", [None, 3])
def test_the_shares_of_two_ranks_are_the_step_of_one(rounds: int | None, make: Callable[..., DirectSource]) -> None:
    """With refills too: what replaces a group is a function of its place in the whole step."""

    def collected(step: int, share: range | None) -> Experience:
        source = make(begins_with_a_digit, share=share)
        return (
            source.collect(step)
            if rounds is None
            else DynamicSampling(source, rounds, ALGORITHMS["rloo"]).collect(step)
        )

    for step in (1, 2):
        whole, parts = collected(step, None), [collected(step, share) for share in (range(2), range(2, 6))]
        assert rows(whole) == [row for part in parts for row in rows(part)]
        assert [len(part.prompts) for part in parts] == [2, 4]


def test_greedy_completions_are_scored_where_they_are_asked_for(make: Callable[..., DirectSource]) -> None:
    source = make(greedy=True)
    batch = source.collect(1)
    answers = [float(len(text)) for text, _ in source.collector.answer(batch.prompts, 1, greedy=True)]
    assert batch.rollouts.greedy_B.tolist() == [reward for reward in answers for _ in range(3)]


def test_seconds_are_counted_on_the_clock_of_the_run_and_else_on_ones_own(make: Callable[..., DirectSource]) -> None:
    phases: list[tuple[str, bool]] = []
    clock = Clock(watch=lambda phase, begins: phases.append((phase, begins)))
    source = make(clock=clock)
    source.collect(1)
    assert source.clock is clock
    assert phases == [("sample", True), ("sample", False), ("reward", True), ("reward", False)]
    alone = make(greedy=True)
    alone.collect(1)
    assert list(alone.clock.seconds) == ["sample", "reward"]
    assert min(alone.clock.seconds.values()) > 0
    other = Clock()
    alone.batch(2, alone.prompts_of(2), other)
    assert other.seconds.keys() == alone.clock.seconds.keys()


def test_refills_replace_silent_groups_and_leave_the_others(make: Callable[..., DirectSource]) -> None:
    source = make(begins_with_a_digit)
    for step in (1, 2, 3):
        own, after = source.collect(step), DynamicSampling(source, 4, ALGORITHMS["rloo"]).collect(step)
        mixed = mixed_groups(own).tolist()
        assert rows(after.collected[0]) == rows(own)
        for place in range(6):
            same = rows(after)[3 * place : 3 * place + 3] == rows(own)[3 * place : 3 * place + 3]
            assert same == (mixed[place] or not bool(mixed_groups(after)[place]))
        further = [p.index for part in after.collected[1:] for p in part.prompts]
        assert 0 < len(further) == len(set(further))
        assert not set(further) & {p.index for p in own.prompts}
        offered = [p.index for number in (1, 2, 3, 4) for p in source.prompts.further(step - 1, number) if p]
        assert set(further) <= set(offered)


def test_the_budget_is_the_number_of_rounds(make: Callable[..., DirectSource]) -> None:
    source = make(lambda completions, **_: [1.0] * len(completions))
    for rounds in (0, 1, 3):
        batch = DynamicSampling(source, rounds, ALGORITHMS["rloo"]).collect(1)
        assert len(batch.collected) == 1 + rounds
        assert rows(batch) == rows(source.collect(1))


def test_each_round_is_told_its_share_of_the_step(
    make: Callable[..., DirectSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on unscorable completions is over the whole step, and a round of two groups is a third of it."""
    source, shares = make(begins_with_a_digit), []
    original = Collector.collect

    def noted(self: Collector, prompts: Any, *given: Any, **options: Any) -> Experience:
        shares.append((len(prompts), self.scorer.share))
        return original(self, prompts, *given, **options)

    monkeypatch.setattr(Collector, "collect", noted)
    DynamicSampling(source, 4, ALGORITHMS["rloo"]).collect(1)
    assert len(shares) > 2
    assert shares == [(number, number / 6) for number, _ in shares]
    assert source.collector.scorer.share == 1.0


def test_a_share_of_a_step_ends_with_its_block_also_by_an_error(make: Callable[..., DirectSource]) -> None:
    sampler = make().collector

    def failing() -> None:
        with sampler.part_of_a_step(0.25):
            assert sampler.scorer.share == 0.25
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert sampler.scorer.share == 1.0


def test_what_is_silent_is_what_the_algorithm_does_not_credit(make: Callable[..., DirectSource]) -> None:
    """All completions earn the same; under a penalty on cut ones, or with discounted rewards to go, they differ."""
    source = make(lambda completions, **_: [1.0] * len(completions))
    spec = dataclasses.replace(ALGORITHMS["rloo"], truncated="penalize", truncation_penalty=0.5)
    cut = source.collect(1).rollouts.truncated_B.view(6, 3)
    some_P = cut.any(1) & ~cut.all(1)
    assert some_P.any()

    def asked(spec: Any) -> int:
        return sum(len(part.prompts) for part in DynamicSampling(source, 1, spec).collect(1).collected[1:])

    assert asked(spec) == int((~some_P).sum())
    assert asked(dataclasses.replace(spec, truncated="mask")) == 6
    source.collector.sampler.gamma = 0.5
    to_go = dataclasses.replace(ALGORITHMS["rloo"], returns="reward_to_go")
    lengths = source.collect(1).rollouts.length_B.view(6, 3)
    assert asked(to_go) == int((lengths.amax(1) == 1).sum())
    by_total = int((lengths.amax(1) == lengths.amin(1)).sum())
    assert asked(dataclasses.replace(to_go, returns="total")) == by_total
    assert asked(dataclasses.replace(to_go, advantage=lambda *_: torch.zeros(()))) == by_total
