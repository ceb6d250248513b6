"""Prompts drawn by how open their outcome is: the weights, the draw, the state, and what a run makes of them."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig
from llm_pg.config import ConfigError
from llm_pg.metrics import read_metrics
from llm_pg.prompts import Prompt, Prompts
from llm_pg.rewards.tally import Scores
from llm_pg.rollout.curriculum import CurriculumStream, attempts, make_stream
from llm_pg.rollout.experience import Experience
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.random import stream_key, uniform
from tests import tiny


def stream(size: int = 12, per_step: int = 3, seed: int = 0, **settings: float) -> CurriculumStream:
    # Indices are not places: rows can be dropped before.
    prompts = [Prompt(10 * i + 7, f"p{i}", None, (i,), {}) for i in range(size)]
    return CurriculumStream(prompts, per_step, seed, **settings)


def test_counts_fade_and_the_weight_is_the_variance_of_a_verdict_and_the_floor() -> None:
    told = stream(size=3, floor=0.1, memory=0.5)
    told.observe([(7, 4, 4), (17, 0, 4)])
    told.observe([(7, 1, 4), (17, 0, 0)])
    expected = [(0.5 * 4 + 1 + 1) / (0.5 * 4 + 4 + 2), 1 / 6, 1 / 2]
    assert told.pass_rates().tolist() == pytest.approx(expected)
    assert told.weights().tolist() == pytest.approx([4 * p * (1 - p) + 0.1 for p in expected])
    assert told.metrics() == {
        "prompts_tried": 2 / 3,
        "prompt_pass_rate": pytest.approx((expected[0] + expected[1]) / 2),
    }


def test_prompts_are_drawn_in_proportion_to_their_weights() -> None:
    """One prompt a step: the share of each against w_i / Σw; and of pairs, against drawing without replacement."""
    draws = 5_000
    for per_step in (1, 2):
        source = stream(size=4, per_step=per_step, floor=0.2)
        source.observe([(7, 8, 8), (17, 0, 8), (27, 2, 8)])
        weight = source.weights()
        seen = Counter(tuple(p.ids[0] for p in source.take(step)) for step in range(draws))
        for drawn, count in seen.items():
            left, share = float(weight.sum()), 1.0
            for place in drawn:
                share *= float(weight[place]) / left
                left -= float(weight[place])
            assert count / draws == pytest.approx(share, abs=4 * (share / draws) ** 0.5)
        assert len(seen) == 4 ** (per_step == 1) * 12 ** (per_step == 2)


def test_a_step_is_the_start_of_an_exponential_race() -> None:
    """The order of -log(1 - u)/w, with u the number of (seed, 5, step) at the prompt's place."""
    source = stream(size=12, per_step=3, seed=4)
    source.observe([(7, 3, 4), (17, 0, 4)])
    for step in (0, 6):
        u = uniform(stream_key(4, 5, step), torch.arange(12)).tolist()
        finish = [-math.log1p(-u[i]) / float(w) for i, w in enumerate(source.weights())]
        order = sorted(range(12), key=finish.__getitem__)
        assert [p.ids[0] for p in source.take(step)] == order[:3]
        assert [p.ids[0] for p in source.further(step, 1)] == order[3:6]


def test_only_prompts_that_were_tried_are_in_the_mean_pass_rate() -> None:
    source = stream(size=4)
    assert source.metrics() == {"prompts_tried": 0.0}
    source.observe([(7, 1, 1), (17, 0, 0)])
    assert source.metrics() == {"prompts_tried": 0.25, "prompt_pass_rate": pytest.approx(2 / 3)}


def test_the_stream_is_that_of_the_config() -> None:
    prompts = stream(size=12).prompts
    settings = {"curriculum_floor": 0.3, "curriculum_memory": 0.6, "seed": 3}
    made = make_stream(GRPOConfig(curriculum="pass_rate", **settings), prompts, 3)
    assert isinstance(made, CurriculumStream)
    assert (made.floor, made.memory, made.seed, made.prompts_per_step) == (0.3, 0.6, 3, 3)
    assert made.take(1) == stream(size=12, per_step=3, seed=3, floor=0.3).take(1)
    for shuffle in (True, False):
        plain = make_stream(GRPOConfig(shuffle_dataset=shuffle, **settings), prompts, 3)
        assert type(plain) is Prompts
        same = Prompts(prompts, per_step=3, seed=3, shuffle=shuffle)
        assert [plain.take(step) for step in range(6)] == [same.take(step) for step in range(6)]
    assert [p.index for p in plain.take(0)] == [7, 17, 27]


def test_a_step_and_its_refills_hold_no_prompt_twice_and_end_with_the_data() -> None:
    source = stream(size=11, per_step=3)
    source.observe([(7, 3, 4), (17, 0, 4)])
    for step in range(20):
        found = [*source.take(step), *(p for number in (1, 2, 3, 4) for p in source.further(step, number))]
        assert sorted(p.index for p in found if p is not None) == [p.index for p in source.prompts]
        assert found[11:] == [None] * 4


def test_the_draw_is_a_function_of_seed_step_and_state_and_of_nothing_else() -> None:
    source = stream()
    source.observe([(17, 3, 4), (27, 0, 4), (37, 1, 3)])
    source.observe([(27, 1, 4)])
    restored = stream()
    restored.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert torch.equal(restored.pass_rates(), source.pass_rates())
    assert [restored.take(step) for step in (7, 3, 5)] == [source.take(step) for step in (7, 3, 5)]
    assert [stream(seed=1).take(step) for step in range(9)] != [stream().take(step) for step in range(9)]
    before = source.take(3)
    source.observe([(p.index, 4, 4) for p in before] * 9)
    assert source.take(3) != before


def test_what_two_ranks_saw_is_what_one_saw() -> None:
    whole, parts = stream(), stream()
    whole.observe([(7, 1, 4), (17, 2, 4), (27, 0, 4), (37, 4, 4)])
    parts.observe([*[(27, 0, 4), (37, 4, 4)], *[(7, 1, 4), (17, 2, 4)]])
    assert parts.state_dict() == whole.state_dict()


def test_open_prompts_are_drawn_more_often_than_settled_ones() -> None:
    """A fixed world: a third of the prompts is always passed, a third never, a third every other time."""
    source, drawn = stream(size=60, per_step=6), Counter[int]()
    for step in range(200):
        taken = source.take(step)
        source.observe([(p.index, [4, 0, 2][p.ids[0] % 3], 4) for p in taken])
        drawn.update(p.ids[0] % 3 for p in taken if step >= 50)
    # At rest p̂ is 1 - 1/22, 1/22 and 1/2, as 4 / (1 - 0.8) = 20 tries are remembered: a share of 1.05/(1.05 + 2·0.22).
    assert drawn[2] / sum(drawn.values()) == pytest.approx(0.70, abs=0.12)
    assert drawn[0] > 0 < drawn[1]


def batch(values: list[float | None], *, size: int = 2, name: str = "f") -> Experience:
    mask_BT = torch.ones(len(values), 1, dtype=torch.bool)
    rollouts = TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-torch.ones(mask_BT.shape),
        group_B=torch.arange(len(values)) // size,
        reward_B=values,
    )
    prompts = [Prompt(i, "", None, (i,), {}) for i in range(len(values) // size)]
    return Experience(prompts, rollouts, [""] * len(values), Scores(list(values), {name: values}), size)


def test_attempts_count_the_scorable_completions_of_all_groups_sampled() -> None:
    own = batch([1.0, 0.4, None, 0.5])
    assert attempts(own, None, 0.5) == [(0, 1, 2), (1, 1, 1)]
    own.collected = [own, batch([0.0, 0.0])]
    assert attempts(own, "f", 1.0) == [(0, 1, 2), (1, 0, 1), (0, 0, 2)]
    with pytest.raises(ConfigError, match="none of the reward functions: f"):
        attempts(own, "g", 1.0)


ROWS = [{"prompt": f"{a}+{b}=", "possible": b < 3} for a in range(10) for b in range(10)]


def digit_where_possible(completion: str, possible: bool, **row: Any) -> float:
    return float(possible and any(c.isdigit() for c in completion))


@pytest.fixture
def train(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(resume: bool = False, **changes: Any) -> Any:
        settings = {
            **{"max_steps": 24, "prompts_per_step": 8, "num_generations": 4, "max_completion_length": 4},
            **{"num_eval_prompts": 12, "eval_num_samples": 0, "learning_rate": 1e-9, "use_cpu": True},
            **{"reward_in_process": True, "engine": "native", "curriculum": "pass_rate", "run_name": "r", **changes},
        }
        reward = digit_where_possible
        trainer = tiny.trainer(make_model("llama"), tokenizer, tmp_path, reward, rows=ROWS, **settings)
        trainer.train(resume=resume)
        return trainer

    return run


def test_a_run_turns_to_what_can_be_learned_and_never_to_what_is_held_out(train: Callable[..., Any]) -> None:
    shares = {}
    for curriculum in ("none", "pass_rate"):
        trainer = train(curriculum=curriculum, run_name=curriculum, max_steps=120, curriculum_floor=0.02)
        lines = read_metrics(trainer.folder.metrics)
        shares[curriculum] = sum(line["uniform_groups"] for line in lines[60:]) / 60
        files = sorted((trainer.folder.path / "completions").iterdir())
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        taken = {row["prompt"] for row in rows}
        assert taken <= {p.text for p in trainer.train_prompts}
        assert not taken & {p.text for p in trainer.eval_prompts}
    assert lines[-1]["prompts_tried"] > 0.8
    assert shares["none"] == pytest.approx(0.8, abs=0.1)
    assert shares["pass_rate"] < shares["none"] - 0.1


def test_another_verdict_of_a_pass_does_not_go_on_with_a_curriculum(train: Callable[..., Any]) -> None:
    train(max_steps=2, save_steps=2)
    with pytest.raises(ConfigError, match=r"eval\.pass_threshold +1\.0 +0\.5"):
        train(max_steps=2, save_steps=2, pass_threshold=0.5, resume=True)
