"""Episodes over a sampler: what is sampled stays as it is, what is said to it never enters the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.environments import Reply, as_reward_function
from llm_pg.environments.partner import EnvironmentPartner
from llm_pg.environments.rollout import EpisodeLimits
from llm_pg.environments.writing import TurnWriter
from llm_pg.metrics import Clock
from llm_pg.prompts import Prompt
from llm_pg.rewards import RewardError, Scorer
from llm_pg.rollout.collector import Collector
from llm_pg.rollout.episodes import EpisodeCollector
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from tests.environments import partners

HERE = partners.__name__
PARAMS = SamplingParams(max_completion_length=60)


def prompts_of(tokenizer: Any, texts: Sequence[str], rows: Sequence[dict[str, Any]] | None = None) -> list[Prompt]:
    rows = rows or [{} for _ in texts]
    return [
        Prompt(i, text, None, tuple(tokenizer(text)["input_ids"]), row)
        for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]


class Heard:
    """A sampler that keeps the prompts it was given."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.prompts = sampler, []

    def sample(self, prompt_ids: Any, num_generations: int, params: SamplingParams, keys_B: Tensor) -> Completions:
        self.prompts.append([tuple(ids) for ids in prompt_ids for _ in range(num_generations)])
        done: Completions = self.sampler.sample(prompt_ids, num_generations, params, keys_B)
        return done


def collector_of(
    tokenizer: Any,
    sampler: Any,
    environment: str,
    options: dict[str, Any] | None = None,
    limits: EpisodeLimits | None = None,
    max_unscorable: float = 1.0,
    deadline: float = 10.0,
) -> EpisodeCollector:
    scorer = Scorer([as_reward_function(environment, options)], workers=1, deadline=deadline, max_unscorable=1.0)
    return EpisodeCollector(
        sampler, scorer, tokenizer, PARAMS, seed=3, gamma=1.0, max_unscorable=max_unscorable,
        partner=EnvironmentPartner(scorer, TurnWriter(tokenizer, [tokenizer.eos_token_id])),
        limits=limits or EpisodeLimits(5, 60, 8),
    )  # fmt: skip


def sampler_of(model: Any, tokenizer: Any) -> NativeSampler:
    """Turns end at the end token or at any of the digits, so that a random model ends some of them."""
    return NativeSampler(model, tokenizer, [tokenizer.eos_token_id, *range(4, 34)])


def test_each_turn_continues_the_very_ids_of_the_turns_before(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    sampler = Heard(sampler_of(make_model(), tokenizer))
    collector = collector_of(tokenizer, sampler, f"{HERE}:Echo")
    with collector.scorer:
        got = collector.collect(prompts_of(tokenizer, ["ab=", "c="]), 1, 3, Clock())
    rollouts = got.rollouts
    assert rollouts.inserted_B is not None
    whole = [(*p, *ids) for p, ids in zip(rollouts.prompt_ids_B, rollouts.context_ids(), strict=True)]
    assert any(len(pieces) == 2 for pieces in rollouts.inserted_B)
    for turn, prompts in enumerate(sampler.prompts[1:], 1):
        expected = [
            (*rollouts.prompt_ids_B[row], *rollouts.context_ids()[row][: place + len(ids)])
            for row, pieces in enumerate(rollouts.inserted_B)
            for place, ids in [_piece(pieces, turn - 1)]
            if ids
        ]
        assert prompts == expected
        assert all(any(row[: len(p)] == p for row in whole) for p in prompts)


def _piece(pieces: Any, number: int) -> tuple[int, tuple[int, ...]]:
    """Where piece `number` stands among all tokens after the prompt, and its ids; no ids where there is none."""
    if number >= len(pieces):
        return 0, ()
    return pieces[number][0] + sum(len(ids) for _, ids in pieces[:number]), pieces[number][1]


def test_the_environments_words_are_inserted_and_carry_no_weight(
    tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    collector = collector_of(tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Echo")
    with collector.scorer:
        got = collector.collect(prompts_of(tokenizer, ["ab=", "c="]), 1, 4, Clock())
    rollouts, rows = got.rollouts, got.readable(torch.ones_like(got.rollouts.logp_BT), 2)
    batch = Algorithm(ALGORITHMS["rloo"]).compute_advantages(rollouts)
    assert batch.advantage_BT.shape == rollouts.tokens_BT.shape == rollouts.mask_BT.shape
    for i, row in enumerate(rows):
        inserted = {p for step, ids in rollouts.inserted_B[i] for p in _span(rollouts, i, step, ids)}
        assert [v is None for v in row["tokens"]["logp"]] == [p in inserted for p in range(len(row["ids"]))]
        assert [v is None for v in row["tokens"]["weight"]] == [p in inserted for p in range(len(row["ids"]))]
        assert row["ids"] == rollouts.context_ids()[i]
        assert row["reward"] == rollouts.reward_BT[i].sum()
        # Echo pays the length of each turn: so much was said by the model, and the rest by the environment.
        said = tokenizer.decode(rollouts.completion_ids()[i], skip_special_tokens=True)
        assert row["reward"] == len(said)


def _span(rollouts: Any, row: int, step: int, ids: tuple[int, ...]) -> range:
    place = int(rollouts.place_BT()[row, step])
    return range(place - len(ids), place)


def test_rewards_stand_at_the_last_token_of_their_turn(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    collector = collector_of(tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Silent", {"turns": 2})
    with collector.scorer:
        rollouts = collector.collect(prompts_of(tokenizer, ["ab="]), 1, 6, Clock()).rollouts
    whole_B = ~rollouts.truncated_B
    assert whole_B.any()
    assert rollouts.inserted_B is None  # it says nothing, so that nothing is inserted
    for row in whole_B.nonzero().squeeze(1).tolist():
        paid = rollouts.reward_BT[row].nonzero().squeeze(1).tolist()
        assert len(paid) == 2
        assert paid[1] == int(rollouts.length_B[row]) - 1
        ends = [4 <= t < 34 or t == tokenizer.eos_token_id for t in rollouts.tokens_BT[row].tolist()]
        assert [t for t in range(int(rollouts.length_B[row])) if ends[t]] == paid


class Scripted:
    """Says tokens of a fixed script, turn by turn, whatever it is asked."""

    def __init__(self, turns: list[list[int]]) -> None:
        self.turns, self.prompts = list(turns), []

    def sample(self, prompt_ids: Any, num_generations: int, params: SamplingParams, keys_B: Tensor) -> Completions:
        self.prompts += [list(ids) for ids in prompt_ids]
        ids = self.turns.pop(0)
        tokens_BT = torch.tensor([ids] * len(prompt_ids) * num_generations)
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        return Completions(tokens_BT, mask_BT, -torch.ones(tokens_BT.shape), torch.zeros(len(tokens_BT)).bool())


def merging_tokenizer() -> Any:
    """Decode then encode is not the identity: a, b and ab are tokens, and "ab" is always read as the last."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "a", "b", "ab", "0", "1", "2", "3"])}
    core = Tokenizer(BPE(vocabulary, [("a", "b")]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def test_what_was_sampled_is_never_tokenised_again() -> None:
    tokenizer = merging_tokenizer()
    spoken = [2, 3]  # a, b: read back, they would be the one token ab
    assert tokenizer(tokenizer.decode(spoken))["input_ids"] == [4]
    sampler = Scripted([spoken, [3, 2], [2, 1]])
    collector = collector_of(tokenizer, sampler, f"{HERE}:Echo", {"reply": "b0"})
    with collector.scorer:
        got = collector.collect([Prompt(0, "0", None, (5,), {})], 1, 1, Clock())
    assert sampler.prompts == [[5], [5, 2, 3, 3, 5], [5, 2, 3, 3, 5, 3, 2, 3, 5]]
    assert got.rollouts.completion_ids() == [[2, 3, 3, 2, 2, 1]]
    assert got.rollouts.context_ids() == [[2, 3, 3, 5, 3, 2, 3, 5, 2, 1]]
    assert got.texts == ["abb0bab0ab0"]  # the last words are heard by nobody


def test_an_episode_of_one_turn_is_the_completion_of_a_task_without_an_environment(
    tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    sampler, prompts = sampler_of(make_model(), tokenizer), prompts_of(tokenizer, ["ab=", "c="])
    collector = collector_of(tokenizer, sampler, f"{HERE}:Echo", {"turns": 1}, EpisodeLimits(5, 60))
    with Scorer([length], in_process=True) as scorer, collector.scorer:
        plain = Collector(sampler, scorer, tokenizer, PARAMS, seed=3, gamma=1.0).collect(prompts, 1, 4, Clock())
        found = collector.collect(prompts, 1, 4, Clock())
    for name in ("tokens_BT", "mask_BT", "logp_BT", "reward_BT", "discount_BT", "truncated_B", "group_B"):
        assert torch.equal(getattr(found.rollouts, name), getattr(plain.rollouts, name)), name
    assert found.rollouts.inserted_B is None
    assert [t[: len(p)] for t, p in zip(found.texts, plain.texts, strict=True)] == plain.texts


def length(completion: str, **row: Any) -> float:
    return float(len(completion))


def test_an_episode_is_a_function_of_seed_step_place_sample_and_turn(
    tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    """The same row comes out of a batch of four prompts and of the second half of it alone; another step differs."""
    prompts = prompts_of(tokenizer, ["ab=", "c=", "dd=", "e="])
    collector = collector_of(tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Echo")
    with collector.scorer:
        whole = collector.collect(prompts, 1, 2, Clock())
        half = collector.collect(prompts[2:], 1, 2, Clock(), first_place=2)
        later = collector.collect(prompts[2:], 2, 2, Clock(), first_place=2)
    assert half.texts == whole.texts[4:]
    assert half.rollouts.context_ids() == whole.rollouts.context_ids()[4:]
    assert later.texts != half.texts


@pytest.mark.parametrize(
    "limits, longest, turns",
    [(EpisodeLimits(2, 60, 8), 16, 2), (EpisodeLimits(5, 12, 8), 12, 5), (EpisodeLimits(5, 60, 3), 9, 3)],
)
def test_limits_hold_and_flag_the_row(
    limits: EpisodeLimits, longest: int, turns: int, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    collector = collector_of(tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Echo", None, limits)
    with collector.scorer:
        got = collector.collect(prompts_of(tokenizer, ["ab=", "c="]), 1, 8, Clock())
    rollouts = got.rollouts
    assert int(rollouts.context_length_B.max()) <= limits.max_length
    assert int(rollouts.length_B.max()) <= longest
    assert rollouts.truncated_B.any()
    assert got.metrics()["log/turns"] <= turns
    numbers = [1 + len(pieces) for pieces in rollouts.inserted_B or [()] * 16]
    # Echo ends its episodes itself at the third turn: what ended earlier was cut.
    assert all(truncated for truncated, n in zip(rollouts.truncated_B.tolist(), numbers, strict=True) if n < 3)


@pytest.mark.parametrize("how, cause", [("raise", "KeyError"), ("sleep", "deadline"), ("none", "returned None")])
def test_an_environment_that_fails_costs_its_own_episode_and_is_counted(
    how: str, cause: str, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    rows = [{"how": None}, {"how": how}, {"how": None}]
    sampler = Scripted([[20, 1]] * 3)
    collector = collector_of(tokenizer, sampler, f"{HERE}:Bad", deadline=1.0)
    with collector.scorer:
        got = collector.collect(prompts_of(tokenizer, ["a=", "b=", "c="], rows), 1, 1, Clock())
    assert got.rollouts.valid_B.tolist() == [True, False, True]
    assert got.rollouts.reward_BT[1].sum() == 0
    assert got.scores.problems == {"Bad": {cause: 1}}
    # The others play on: the worker that was killed is replaced, and the new one plays their turns again.
    assert got.scores.reward == [3.0, None, 3.0]
    weights_BT = Algorithm(ALGORITHMS["rloo"]).compute_advantages(got.rollouts).advantage_BT
    assert (weights_BT[1] == 0).all()


def test_too_many_failures_stop_the_run(tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer, ["a=", "b="], [{"how": "raise"}, {"how": None}])
    collector = collector_of(tokenizer, Scripted([[20, 1]] * 3), f"{HERE}:Bad", max_unscorable=0.4)
    with collector.scorer, pytest.raises(RewardError, match=r"Environment Bad failed in 1 of 2 .*KeyError: 1"):
        collector.collect(prompts, 1, 1, Clock())


@pytest.mark.parametrize(
    "spec, options, words",
    [
        ("number_gessing", None, "Did you mean 'number_guessing'"),
        (f"{HERE}:Nobody", None, "no 'Nobody'"),
        (f"{HERE}:Echo", {"depth": 3}, "depth"),
        (f"{HERE}:Mute", None, "no method 'step'"),
    ],
)
def test_an_environment_that_cannot_be_made_is_told_before_the_run(
    spec: str, options: dict[str, Any] | None, words: str
) -> None:
    from llm_pg.config import Config, ConfigError
    from llm_pg.run.before.preflight import check_inputs

    config = Config()
    config.model.make = {"model_type": "llama"}
    config.data.task = "number_guessing"
    config.rollout.environment, config.rollout.environment_options = spec, options or {}
    with pytest.raises(ConfigError, match=words):
        check_inputs(config)


def test_a_greedy_episode_has_the_seed_of_its_place_among_those_of_all_ranks(
    tokenizer: Any, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = collector_of(tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Echo")
    prompts, seeds, play = prompts_of(tokenizer, ["ab=", "c=", "d+", "e"]), [], collector.conversations.play

    def noted(*given: Any) -> Any:
        episodes, problems = play(*given)
        seeds.append([episode.seed for episode in episodes])
        return episodes, problems

    monkeypatch.setattr(collector.conversations, "play", noted)
    with collector.scorer:
        collector.collect(prompts, 1, 1, Clock(), greedy=True)
        collector.collect(prompts[2:], 1, 1, Clock(), 2, greedy=True)
    sampled, greedy, sampled_later, greedy_later = seeds
    assert len(set(sampled)) == 4
    assert sampled[2:] == sampled_later
    assert greedy[2:] == greedy_later


def test_a_worker_lets_go_of_episodes_that_a_limit_cut_short_when_the_next_batch_begins(
    tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    collector = collector_of(
        tokenizer, sampler_of(make_model(), tokenizer), f"{HERE}:Alive", limits=EpisodeLimits(1, 60, 8)
    )
    with collector.scorer:
        held = [collector.collect(prompts_of(tokenizer, ["a=", "b="]), step, 2, Clock()) for step in (1, 2, 3)]
    assert [experience.scores.reward for experience in held] == [[1.0, 2.0, 3.0, 4.0]] * 3


@pytest.mark.parametrize("text, role", [(None, "user"), (5, "user"), ("a", None), ("half \ud83d", "user")])
def test_a_reply_that_is_no_text_is_refused_in_the_environment(text: Any, role: Any) -> None:
    with pytest.raises(ValueError, match=r"texts; got|surrogates not allowed"):
        Reply(text, role=role)
