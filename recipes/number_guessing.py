"""A number-guessing game over several turns, learned on a CPU: the environment, the run, and what it learned.

    python number_guessing.py [max_steps=40 learning_rate=1e-3 ...]

The game here is a user's own: copy `Game`, and write yours. A worker process plays it, so that a slow or broken game
costs one episode and not the run. The model starts with guesses of which most are random.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_pg import shipped
from llm_pg.config import load_config
from llm_pg.environments import Reply
from llm_pg.metrics import read_metrics


class Game:
    """Higher or lower, with a little pay for a guess that the answers before it leave possible."""

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self.secret, self.first, self.last, self.left = row["secret"], 1, row["high"], row["max_guesses"]

    def step(self, text: str) -> Reply:
        guess, self.left = int(text) if text.strip().isdecimal() else 0, self.left - 1
        if guess == self.secret:
            return Reply(reward=1.0, done=True)
        reward = self.bonus if self.first <= guess <= self.last else 0.0
        if guess < self.secret:
            self.first = max(self.first, guess + 1)
        else:
            self.last = min(self.last, guess - 1)
        return Reply("higher\n" if guess < self.secret else "lower\n", reward, done=self.left == 0)


def first_guesses(folder: Path) -> dict[int, Counter[str]]:
    """What the first guess was, in the episodes kept of the first and of the last step."""
    import json

    files = sorted(folder.glob("completions/*.jsonl"))
    return {
        int(path.stem.rpartition("-")[2]): Counter(
            json.loads(line)["completion"].split("\n")[0] for line in path.read_text().splitlines()
        )
        for path in (files[0], files[-1])
    }


def main(overrides: list[str]) -> None:
    here = [f"environment={Path(__file__).resolve()}:Game", "run_name=number_guessing", "log_completions=8"]
    config = load_config(shipped.find("number_guessing.yaml"), [*here, *overrides])
    from llm_pg import RLOOTrainer

    begin = time.perf_counter()
    summary = RLOOTrainer(args=config).train()
    folder = Path(summary["model"]).parent
    reported = read_metrics(folder / "metrics.jsonl")
    print(f"\nPass rate {summary['pass_rate_before']:.0%} -> {summary['pass_rate_after']:.0%} (greedy, held out), ")
    print(
        f"turns {reported[0]['log/turns']:.2f} -> {reported[-1]['log/turns']:.2f}, {time.perf_counter() - begin:.0f} s."
    )
    for step, guesses in first_guesses(folder).items():
        print(f"First guesses in step {step}: {', '.join(f'{g} ({n})' for g, n in guesses.most_common(4))}")


if __name__ == "__main__":
    main(sys.argv[1:])
