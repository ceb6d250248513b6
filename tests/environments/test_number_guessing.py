"""The number-guessing game: its rules, how it is learned, and that a run of it goes on after a kill, bit for bit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import PolicyGradientTrainer, shipped
from llm_pg.config import ConfigError, load_config
from llm_pg.metrics import read_metrics
from llm_pg.terminal import Terminal
from reward_fns import number_guessing
from reward_fns.number_guessing import NumberGuessing
from tests.faults.conftest import lines, tiny, weights  # noqa: F401 - tiny is a fixture

EPISODES = {
    "environment": "number_guessing",
    "max_turns": 3,
    "max_turn_length": 3,
    "max_completion_length": 30,
    "stop": ["\n", *"1234567"],
    "save_steps": 3,
}


def won(secret: int, guesses: list[str], high: int = 7, max_guesses: int = 3) -> tuple[float, list[str]]:
    game = NumberGuessing()
    game.reset({"secret": secret, "high": high, "max_guesses": max_guesses}, 0)
    replies = [game.step(guess) for guess in guesses]
    return sum(reply.reward or 0.0 for reply in replies), [r.text.strip() for r in replies] + [str(replies[-1].done)]


def test_the_game_answers_higher_lower_and_ends() -> None:
    assert won(5, ["4", "6\n", " 5 "]) == (1.0, ["higher", "lower", "", "True"])
    assert won(5, ["4", "4", "4"]) == (0.0, ["higher", "higher", "higher", "True"])
    assert won(5, ["8", "-5"]) == (0.0, ["?", "?", "False"])
    for text in ("", "five", "5 5", "4\n5", "٥", "5.0", "0x5", "5" * 5000):
        assert won(5, [text]) == (0.0, ["?", "False"]), text


@pytest.mark.parametrize("guesses", [2, 3, 4])
def test_halving_wins_every_game_of_two_to_the_k_less_one_numbers(guesses: int) -> None:
    shown = number_guessing.demonstrations(0, 60, high=2**guesses - 1, max_guesses=guesses)
    for row, demonstration in zip(number_guessing.prompts(0, 60, 2**guesses - 1, guesses), shown, strict=True):
        assert number_guessing.number_guessing(demonstration["completion"], **row) == 1.0


def test_a_random_player_wins_one_minus_six_sevenths_cubed() -> None:
    rows, shown = (
        f(1, 4000) for f in (number_guessing.prompts, lambda s, n: number_guessing.demonstrations(s, n, 1.0))
    )
    wins = [number_guessing.number_guessing(d["completion"], **row) for row, d in zip(rows, shown, strict=True)]
    expected = 1 - (6 / 7) ** 3
    assert abs(sum(wins) / len(wins) - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


@pytest.mark.parametrize(
    "transcript", ["4\nlower\n5", "4\n5", "5\nhigher", "1\nhigher\n2\nhigher\n3\nhigher\n5", "", "higher\n5"]
)
def test_a_transcript_with_made_up_answers_earns_nothing(transcript: str) -> None:
    assert number_guessing.number_guessing(transcript, secret=5, high=7, max_guesses=3) == 0.0


@pytest.mark.faults
def test_a_killed_run_of_episodes_ends_as_the_one_that_was_not(
    tiny: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = number_guessing.prompts(0, 20)
    for name in ("rloo", "grpo"):
        changes = EPISODES | ({"num_iterations": 2, "beta": 0.05} if name == "grpo" else {})
        options = {"algorithm": name, "changes": changes, "rows": rows, "reward": None}
        whole = tiny(f"{name}-whole", **options)
        assert whole.status == 0, whole.output
        assert tiny(f"{name}-cut", fault="kill", at=5, **options).status == -signal.SIGKILL
        resumed = tiny(f"{name}-cut", resume=True, **options)
        assert resumed.status == 0, resumed.output
        told = lines(tmp_path / f"{name}-whole")
        assert told == lines(tmp_path / f"{name}-cut")
        assert weights(tmp_path / f"{name}-whole") == weights(tmp_path / f"{name}-cut")
        assert max(line["log/turns"] for line in told) > 1


def test_an_environment_beside_reward_functions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives the rewards itself"):
        load_config(shipped.find("number_guessing.yaml"), ["reward_funcs=[exact_match]"])
    config = load_config(shipped.find("number_guessing.yaml"), ["use_cpu=true"])
    with pytest.raises(ConfigError, match="give one"):
        PolicyGradientTrainer(reward_funcs="exact_match", args=config, terminal=Terminal(quiet=True))


@pytest.mark.slow
def test_the_shipped_config_learns_to_halve_what_is_left(tmp_path: Path) -> None:
    config = load_config(shipped.find("number_guessing.yaml"), [f"output_dir={tmp_path}", "use_cpu=true"])
    summary = PolicyGradientTrainer(args=config, terminal=Terminal(quiet=True)).train()
    assert summary["pass_rate_before"] < 0.7
    assert summary["pass_rate_after"] > 0.9
    told = read_metrics(tmp_path / "number_guessing-rloo-seed0" / "metrics.jsonl")
    assert told[-1]["log/turns"] <= 3
