"""Dynamic sampling: what it replaces, what it does to the expected gradient, and that nothing of it is state."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import ConfigError
from llm_pg.estimators.exact import TabularPolicy, objective, terminal_reward
from llm_pg.metrics import read_metrics
from llm_pg.prompts import Prompt, Prompts
from llm_pg.rollout.experience import Experience
from llm_pg.rollout.refill import mixed_groups, refill
from llm_pg.run.ranks import merge_metrics
from tests import tiny
from tests.seams import Steps, raising
from tests.tiny import experience, prompts

REWARD_PS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
UNKNOWN = None  # could not be scored


def test_a_group_is_mixed_where_two_scorable_completions_differ() -> None:
    rewards = [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [UNKNOWN, 1.0, 1.0], [UNKNOWN, 0.0, 1.0], [UNKNOWN, UNKNOWN, UNKNOWN]]
    batch = experience(prompts(5), rewards)
    assert mixed_groups(batch).tolist() == [True, False, False, True, False]
    assert batch.metrics()["uniform_groups"] == pytest.approx(3 / 5)


def test_a_penalty_on_truncated_completions_makes_a_group_mixed() -> None:
    batch = experience(prompts(1), [[0.0, 0.0]])
    batch.rollouts.truncated_B = torch.tensor([True, False])
    assert not mixed_groups(batch).any()
    assert mixed_groups(batch, truncation_penalty=0.5).all()


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
def test_the_groups_that_are_not_mixed_are_those_without_any_weight(name: str, several: bool, gamma: float) -> None:
    """Over verdicts on completions of different lengths, and over rewards at every step (turns of an episode)."""
    g, row = torch.Generator().manual_seed(0), dataclasses.replace(ALGORITHMS[name], gamma=gamma)
    lengths = torch.randint(1, 4, (60, 2), generator=g)
    batch = experience(prompts(60), torch.randint(0, 2, (60, 2), generator=g).tolist(), (lengths - 1).tolist())
    rollouts = batch.rollouts
    rollouts.discount_BT = rollouts.discount_BT * gamma
    if several:
        rollouts.reward_BT = torch.randint(0, 2, rollouts.mask_BT.shape, generator=g) * rollouts.mask_BT.float()
    weighted = Algorithm(row, 3).compute_advantages(rollouts).advantage_BT.view(60, -1)
    expected_P = (weighted.abs() > 1e-6).any(1)
    assert 0 < int(expected_P.sum()) < 60
    assert torch.equal(mixed_groups(batch, to_go=row.returns == "reward_to_go"), expected_P)


class World:
    """Three prompts, three completions each (one token), groups of two; everything can be listed."""

    def __init__(self) -> None:
        self.policy = TabularPolicy.random(vocab_size=3, horizon=1, num_prompts=3, seed=1)
        self.prob_PS = self.policy.prob_PS()
        self.groups = list(itertools.product(range(3), repeat=2))
        self.prompts = prompts(3)

    def outcomes(self) -> list[tuple[float, int, tuple[int, int]]]:
        """(probability, prompt, group) of one draw of a prompt and its group."""
        return [
            (float(self.prob_PS[p, a] * self.prob_PS[p, b]) / 3, p, (a, b)) for p in range(3) for a, b in self.groups
        ]

    def sampled(self, prompt: int, group: tuple[int, int]) -> Experience:
        rewards = [float(REWARD_PS[prompt, s]) for s in group]
        return experience([self.prompts[prompt]], [rewards], [list(group)])

    def update(self, batch: Experience) -> torch.Tensor:
        """Leave-one-out, by hand: the mean over the group of (r_i - r_j) ∇ log π(y_i)."""
        a, b = (int(text.split("/")[1]) for text in batch.texts)
        prompt, (r_a, r_b) = batch.prompts[0].index, batch.rollouts.reward_BT.sum(1).tolist()
        score = torch.eye(3, dtype=torch.float64) - self.prob_PS[prompt]
        gradient = torch.zeros(3, 3, dtype=torch.float64)
        gradient[prompt] = 0.5 * ((r_a - r_b) * score[a] + (r_b - r_a) * score[b])
        return gradient


def test_the_expected_gradient_keeps_its_direction_and_is_longer_by_a_known_factor() -> None:
    """All pairs of draws through `refill` itself, against ∇J by enumeration times (1 - (1 - M)²) / M."""
    world = World()
    expected, share = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for (prob, prompt, group), (prob_2, prompt_2, group_2) in itertools.product(world.outcomes(), repeat=2):
        first, second = world.sampled(prompt, group), world.sampled(prompt_2, group_2)
        taken = refill(
            first,
            lambda asked, places, second=second: second,
            lambda number, p=prompt_2: [world.prompts[p]],
            torch.tensor([0]),
            rounds=1,
        )
        expected += prob * prob_2 * world.update(taken)
        share[taken.prompts[0].index] += prob * prob_2 * float(mixed_groups(taken)[0])
    pass_P = (world.prob_PS * REWARD_PS).sum(1)
    mixed_P = 1 - pass_P**2 - (1 - pass_P) ** 2
    mean = float(mixed_P.mean())
    exact = objective(world.policy, terminal_reward(world.policy.completions, REWARD_PS))
    factor = (1 - (1 - mean) ** 2) / mean
    assert factor > 1.2
    token_S = world.policy.completions.tokens_ST[:, 0]
    torch.testing.assert_close(expected, factor * exact.gradient_PNV[:, 0, token_S], rtol=1e-6, atol=1e-9)
    # What equal groups have too is weighted by the chance of a mixed group; the prompt that is never passed is out.
    torch.testing.assert_close(share / share.sum(), mixed_P / mixed_P.sum(), rtol=1e-6, atol=1e-9)
    assert float(share[2]) == 0


def drawn(of: list[Prompt], places: torch.Tensor) -> Experience:
    """Completions that are a function of prompt and place, as the collector's are."""
    rewards = [
        [float((7 * p.index + 3 * int(k) + i) % 5 == 0) for i in range(3)] for p, k in zip(of, places, strict=True)
    ]
    tokens = [[(p.index + int(k) + i) % 4 for i in range(3)] for p, k in zip(of, places, strict=True)]
    return experience(of, rewards, tokens)


def refilled(stream: Prompts, step: int, first: int, each: int, rounds: int = 3) -> Experience:
    places = first + torch.arange(each)
    own = drawn(stream.take(step)[first : first + each], places)
    return refill(own, drawn, lambda number: stream.further(step, number), places, rounds=rounds)


def rows(batch: Experience) -> list[tuple[Any, ...]]:
    r = batch.rollouts
    return [
        (r.prompt_ids_B[i], batch.texts[i], batch.scores.reward[i], float(r.reward_BT[i].sum()), int(r.length_B[i]))
        for i in range(len(batch.texts))
    ]


def test_two_ranks_refill_to_the_batch_of_one() -> None:
    stream = Prompts(prompts(200), per_step=8, seed=3)
    replaced = 0
    for step in range(10):
        whole = refilled(stream, step, 0, 8)
        parts = [refilled(stream, step, first, 4) for first in (0, 4)]
        assert rows(whole) == [row for part in parts for row in rows(part)]
        dropped = [p.metrics().get("groups_dropped", 0) for p in parts]
        assert sum(dropped) == whole.metrics().get("groups_dropped", 0)
        replaced += sum(dropped)
    assert replaced > 20


def test_metrics_of_two_ranks_add_groups_and_keep_the_longest_refill() -> None:
    parts = [{"groups_dropped": 3, "refill_rounds": 1}, {"groups_dropped": 4, "refill_rounds": 3}]
    assert merge_metrics(parts, rows=[4, 4]) == {"groups_dropped": 7, "refill_rounds": 3}


def test_places_keep_their_mixed_groups_and_an_empty_budget_keeps_the_first() -> None:
    stream = Prompts(prompts(200), per_step=8, seed=0)
    own = drawn(stream.take(0), torch.arange(8))
    mixed = mixed_groups(own)
    assert 0 < int(mixed.sum()) < 8
    after = refilled(stream, 0, 0, 8, rounds=8)
    for place in range(8):
        same = after.prompts[place].index == own.prompts[place].index
        assert same == (bool(mixed[place]) or not bool(mixed_groups(after)[place]))
    unasked = refilled(stream, 0, 0, 8, rounds=0)
    assert rows(unasked) == rows(own)
    assert (unasked.metrics()["groups_dropped"], unasked.metrics()["refill_rounds"]) == (0, 0)
    told, sizes = after.metrics(), [len(part.prompts) for part in after.collected]
    assert told["groups_dropped"] == sum(sizes) - 8
    assert told["refill_rounds"] == len(sizes) - 1
    assert told["sampled_reward"] == pytest.approx(own.metrics()["reward"])
    assert told["tokens"] == sum(int(part.rollouts.length_B.sum()) for part in after.collected)


def test_pieces_that_an_environment_inserted_follow_their_rows() -> None:
    first, second = experience(prompts(2), [[0.0, 0.0], [0.0, 1.0]]), experience(prompts(3)[2:], [[0.0, 1.0]])
    second.rollouts.inserted_B = [((0, (5, 6)),), ()]
    taken = refill(first, lambda *_: second, lambda _: prompts(4)[2:], torch.arange(2), rounds=1)
    assert taken.rollouts.inserted_B == [((0, (5, 6)),), (), (), ()]
    assert [p.index for p in taken.prompts] == [2, 1]


def test_further_prompts_never_repeat_within_a_step_and_end_with_the_data() -> None:
    stream = Prompts(prompts(30), per_step=8, seed=0)
    for step in (0, 3, 11):
        rounds = [stream.further(step, number) for number in (1, 2, 3, 4)]
        found = [p.index for r in rounds for p in r if p is not None] + [p.index for p in stream.take(step)]
        assert sorted(found) == list(range(30))
        assert rounds[2][6:] == [None, None]
        assert rounds[3] == [None] * 8
        assert Prompts(prompts(30), per_step=8, seed=0).further(step, 2) == rounds[1]
    assert stream.further(0, 1) != stream.further(1, 1) != Prompts(prompts(30), per_step=8, seed=1).further(1, 1)


def begins_with_a_digit(completion: str, **row: Any) -> float:
    return float(completion[:1].isdigit())


@pytest.fixture
def train(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(resume: bool = False, dies_at: int = 0, **changes: Any) -> Any:
        settings = {
            **{"max_steps": 6, "prompts_per_step": 4, "num_generations": 3, "max_completion_length": 3},
            **{"num_eval_prompts": 4, "eval_num_samples": 0, "learning_rate": 1e-2, "use_cpu": True},
            **{"reward_in_process": True, "dynamic_sampling_max_rounds": 3, "run_name": "r", **changes},
        }
        trainer = tiny.trainer(
            make_model("llama"),
            tokenizer,
            tmp_path,
            begins_with_a_digit,
            callbacks=[Steps(after=raising(KeyboardInterrupt, dies_at))],
            **settings,
        )
        trainer.train(resume=resume)
        return trainer

    return run


def untimed(trainer: Any) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "train_tokens_per_second", "mfu", "memory")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(trainer.folder.metrics)]


def test_fewer_groups_of_a_batch_are_equal_with_refills(train: Callable[..., Any]) -> None:
    plain, more = (
        untimed(train(run_name=f"rounds{n}", dynamic_sampling_max_rounds=n, learning_rate=1e-9)) for n in (0, 16)
    )
    equal = [sum(line["uniform_groups"] for line in lines) / 6 for lines in (plain, more)]
    assert equal[0] > 0.4 > 0.1 > equal[1], equal
    # The step's own prompts are those of a run without refills, and so is what they earn.
    assert [line["sampled_reward"] for line in more] == pytest.approx([line["reward"] for line in plain], abs=1e-6)


@pytest.mark.faults
@pytest.mark.parametrize("curriculum", ["none", "pass_rate"])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_run_with_refills_that_was_cut_goes_on_bit_for_bit(
    curriculum: str, engine: str, train: Callable[..., Any]
) -> None:
    """Killed after step 4 of 6 with a checkpoint at step 3."""
    changes = {"curriculum": curriculum, "engine": engine, "save_steps": 3}
    whole = train(run_name="whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(run_name="cut", dies_at=4, **changes)
    resumed = train(run_name="cut", resume=True, **changes)
    assert untimed(whole) == untimed(resumed)
    assert sum(line.get("groups_dropped", 0) for line in untimed(whole)[3:]) > 0
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.prompts.state_dict() == resumed.prompts.state_dict()


def test_an_algorithm_for_which_equal_groups_are_not_silent_refuses_to_drop_them() -> None:
    from llm_pg import ReinforceConfig

    with pytest.raises(ConfigError, match="not silent there"):
        ReinforceConfig(dynamic_sampling_max_rounds=2)


def test_a_round_of_few_completions_is_held_to_the_limit_of_its_step(train: Callable[..., Any]) -> None:
    """One failure in a round of three completions is a third of it, and a twelfth of the step."""
    from llm_pg.rewards.scorer import Scorer

    def fails_on_x(completion: str, **row: Any) -> float:
        if completion == "x":
            raise ValueError("x")
        return 0.0

    with Scorer([fails_on_x], max_unscorable=0.2, in_process=True) as scorer:
        given = (["p"] * 3, ["x", "a", "a"], [[1]] * 3, [{}] * 3)
        with pytest.raises(RuntimeError, match="max_unscorable"):
            scorer.grade(*given)
        scorer.share = 0.25
        assert scorer.grade(*given).reward == [None, 0.0, 0.0]


def test_an_experience_without_refills_reports_none() -> None:
    batch = experience(prompts(2), [[0.0, 1.0], [1.0, 0.0]])
    assert not {"refill_rounds", "groups_dropped", "sampled_reward"} & set(batch.metrics())
    assert dataclasses.replace(batch, collected=[batch]).metrics()["groups_dropped"] == 0
