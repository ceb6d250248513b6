"""Guess a number: after each guess the game says higher or lower. The smallest task whose answer takes several turns.

A player who halves what is left wins every game of 2^k - 1 numbers in k guesses; one who guesses at random wins
1 - (1 - 1/n)^k of them. `NumberGuessing` is the game for `rollout.environment: number_guessing`.
"""

import random
from collections.abc import Mapping
from typing import Any

from llm_pg.environments.protocol import Reply
from reward_fns.registry import Gold, reward

REWARD = "number_guessing"
MOST_DIGITS = 9


class NumberGuessing:
    """The game. A turn is a number; the reward is 1 for the turn that names the secret.

    A turn that is no number of the range is answered by "?" and costs a guess.
    """

    def __init__(self) -> None:
        self.secret = self.high = self.guesses_left = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin with the columns secret, high and max_guesses; nothing is drawn."""
        self.secret, self.high, self.guesses_left = (int(row[key]) for key in ("secret", "high", "max_guesses"))

    def step(self, text: str) -> Reply:
        guess = read_guess(text, self.high)
        self.guesses_left -= 1
        if guess == self.secret:
            return Reply(reward=1.0, done=True)
        return Reply(f"{answer(guess, self.secret)}\n", done=self.guesses_left <= 0)


def read_guess(text: str, high: int) -> int | None:
    """The number that a turn consists of, white space aside; None where it is none from 1 to `high`."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        return None
    return int(text) if 1 <= int(text) <= high else None


def answer(guess: int | None, secret: int) -> str:
    """What the game says to a guess that is not the secret."""
    return "?" if guess is None else "higher" if guess < secret else "lower"


def won_game(secret: int, high: int, max_guesses: int, **row: Any) -> Gold | None:
    """The game of a player who halves what is left; None where it is not won."""
    played = _played(random.Random(0), secret, high, max_guesses, 0.0)
    won = played.split("\n")[-2] == str(secret)
    return Gold(played, reads=frozenset({"alone"})) if won else None


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", gold=won_game)
def number_guessing(completion: str, secret: int, high: int, max_guesses: int, **row: Any) -> float:
    """1 when the completion is a game that was won: guesses and true answers, line by line, up to the secret; else 0.

    `secret`, `high` and `max_guesses` are columns. For transcripts; in training the environment gives the reward.

    Range {0, 1}. Floor 0: answers that are not true end the game, so that several guesses cannot be written down
    without knowing the secret. A single guess is right by luck on one row in `high`.
    """
    lines, game = completion.strip().split("\n"), NumberGuessing()
    game.reset({"secret": secret, "high": high, "max_guesses": max_guesses}, 0)
    for place in range(0, len(lines), 2):
        reply = game.step(lines[place])
        if reply.done:
            return (reply.reward or 0.0) if place == len(lines) - 1 else 0.0
        if lines[place + 1 : place + 2] != [reply.text.strip()]:
            return 0.0
    return 0.0


def prompts(seed: int, n: int, high: int = 7, max_guesses: int = 3) -> list[dict[str, Any]]:
    """`n` distinct rows with the columns prompt ("#04821 1-7" and a new line), secret, high and max_guesses.

    The secrets are drawn evenly from 1 to `high`; the number of a game has nothing to do with its secret.

    Raises ValueError for a range or a number of rows that cannot be.
    """
    if not (2 <= high < 10**MOST_DIGITS and max_guesses >= 1 and 0 <= n <= 10**5):
        raise ValueError(
            f"number_guessing needs high >= 2, max_guesses >= 1 and at most 100,000 rows; got high={high}, "
            f"max_guesses={max_guesses}, n={n}."
        )
    rng = random.Random(f"number_guessing {seed}")
    games = rng.sample(range(10**5), n)
    secrets = [place % high + 1 for place in range(n)]
    rng.shuffle(secrets)
    return [
        {"prompt": f"#{game:05d} 1-{high}\n", "secret": secret, "high": high, "max_guesses": max_guesses}
        for game, secret in zip(games, secrets, strict=True)
    ]


def demonstrations(seed: int, n: int, noise: float = 0.0, high: int = 7, max_guesses: int = 3) -> list[dict[str, str]]:
    """Games as transcripts, row i of `prompts(seed, n)`, for a supervised warm start.

    noise: the probability in [0, 1] of a guess that is drawn evenly from the whole range; the others halve what the
    answers have left.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise is a probability from 0 to 1; got {noise}.")
    rng = random.Random(f"number_guessing demonstrations {seed}")
    return [
        {"prompt": row["prompt"], "completion": _played(rng, row["secret"], high, max_guesses, noise)}
        for row in prompts(seed, n, high, max_guesses)
    ]


def _played(rng: random.Random, secret: int, high: int, max_guesses: int, noise: float) -> str:
    first, last, text = 1, high, ""
    for _ in range(max_guesses):
        guess = rng.randint(1, high) if rng.random() < noise else (first + last) // 2
        text += f"{guess}\n"
        if guess == secret:
            break
        text += f"{answer(guess, secret)}\n"
        if first <= guess <= last:
            first, last = (guess + 1, last) if guess < secret else (first, guess - 1)
    return text
