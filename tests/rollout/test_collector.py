"""What a batch of experience is made of: its random streams, its greedy completions, facts and readable rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.learner.update import Updater
from llm_pg.metrics import Clock
from llm_pg.prompts import Prompt
from llm_pg.rollout.collector import Collector
from tests import tiny

TEXTS = ["ab=", "a longer prompt, and more: ", "x"]


@pytest.fixture
def collector_of(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Collector]:
    """A collector of completions of a random model. Changes are sampling parameters."""

    def make(seed: int = 0, **changes: Any) -> Collector:
        return tiny.collector(make_model("llama"), tokenizer, seed=seed, **changes)

    return make


@pytest.fixture
def prompts(tokenizer: Any) -> list[Prompt]:
    return tiny.encoded(tokenizer, TEXTS)


def test_equal_steps_sample_equal_completions_and_other_steps_others(
    collector_of: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    """The weights are the same at every step, so only the random numbers differ."""
    collector = collector_of()
    first, again, second = (collector.collect(prompts, step, 4, Clock()).texts for step in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert len(set(first + second)) == 24


def test_no_two_rows_of_a_run_share_a_stream(collector_of: Callable[..., Collector]) -> None:
    """Over seeds, streams, steps, places and samples."""
    rows = [
        collector.keys(5, 4, stream, step, place)
        for collector in (collector_of(0), collector_of(1))
        for stream in (1, 2)
        for step in range(6)
        for place in (0, 5)
    ]
    assert len(set(torch.cat(rows).tolist())) == 2 * 2 * 6 * 2 * 20


def test_a_prompts_completions_hang_on_its_place_and_not_on_who_samples_it(
    collector_of: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    """The first rank has one prompt, the second two; a refill has places in any order."""
    whole = collector_of().collect(prompts, 3, 2, Clock()).texts
    parts = [collector_of().collect(part, 3, 2, Clock(), at).texts for part, at in ((prompts[:1], 0), (prompts[1:], 1))]
    assert parts[0] + parts[1] == whole
    turned = collector_of().collect(prompts[::-1], 3, 2, Clock(), torch.tensor([2, 1, 0])).texts
    assert turned == whole[4:] + whole[2:4] + whole[:2]


def until(stop: str, text: str) -> str:
    return text[: text.index(stop) + len(stop)] if stop in text else text


def test_greedy_answers_end_at_a_stop_string(collector_of: Callable[..., Collector], prompts: list[Prompt]) -> None:
    """An answer with a stop string is the answer without it, cut behind it."""
    free = [text for text, _ in collector_of().answer(prompts, 1, greedy=True)]
    stop = free[0][4:6]
    cut = collector_of(stop=(stop,)).answer(prompts, 1, greedy=True)
    assert [text for text, _ in cut] == [until(stop, text) for text in free]
    assert [len(ids) for _, ids in cut] != [12, 12, 12]


def test_a_greedy_answer_has_the_length_limit_and_not_the_temperature_of_training(
    collector_of: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    hot, cold = (
        collector_of(temperature=t, top_k=k, max_completion_length=7).answer(prompts, 1, greedy=True)
        for t, k in ((5.0, 0), (0.1, 3))
    )
    assert hot == cold
    assert max(len(ids) for _, ids in hot) == 7


def test_the_greedy_reward_of_a_step_is_that_of_the_greedy_answer(
    collector_of: Callable[..., Collector], prompts: list[Prompt]
) -> None:
    """Under a stop string too: ReMax's baseline is the reward of what an evaluation would answer."""
    free = collector_of().answer(prompts, 1, greedy=True)[0][0]
    collector = collector_of(stop=(free[2:4],))
    answers = collector.answer(prompts, 1, greedy=True)
    rollouts = collector.collect(prompts, 1, 2, Clock(), greedy=True).rollouts
    expected = [float(len(text)) for text, _ in answers for _ in range(2)]
    assert rollouts.greedy_B.tolist() == expected
    assert len(answers[0][0]) <= 4


def test_every_step_of_a_run_draws_numbers_of_its_own(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same two prompts at every step and weights that hardly move: completions, the order of the rows in
    minibatches and the seed of dropout differ all the same."""
    orders: list[torch.Tensor] = []
    seeds: list[int] = []
    original = Updater.update

    def noted(self: Updater, batch: Any, order: torch.Tensor, **options: Any) -> Any:
        orders.append(order)
        seeds.append(torch.initial_seed())
        return original(self, batch, order, **options)

    monkeypatch.setattr(Updater, "update", noted)
    settings = {"max_steps": 3, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 6}
    settings |= {"steps_per_generation": 2, "num_iterations": 2, "num_eval_prompts": 0, "learning_rate": 1e-9}
    rows = [{"prompt": text} for text in TEXTS[:2]]
    trainer = tiny.trainer(make_model("llama"), tokenizer, tmp_path, tiny.length, rows=rows, **settings)
    trainer.train()
    seen: dict[str, list[str]] = {}
    for file in sorted((trainer.folder.path / "completions").iterdir()):
        for row in map(json.loads, file.read_text().splitlines()):
            seen.setdefault(row["prompt"], []).append(row["completion"])
    assert [(len(texts), len(set(texts))) for texts in seen.values()] == [(12, 12)] * 2
    assert len({tuple(row) for order in orders for row in order.tolist()}) == 3 * 2
    assert len(set(seeds)) == 3
