"""Reward functions for the fault tests, in a file that a worker loads at once."""

import os
import time
import urllib.request


def digits(completion: str, answer: str) -> float:
    return float(completion[:1] == answer) + 0.1 * len(completion.strip("abc"))


def prints(completion: str, answer: str) -> float:
    print(completion * 500)
    return digits(completion, answer)


def on_rank_1(completion: str) -> float:
    """RANK is set by torchrun; FAULT by the test."""
    if os.environ.get("RANK") == "1":
        if os.environ["FAULT"] == "raises":
            raise KeyError("injected on rank 1")
        if os.environ["FAULT"] == "exits":
            os._exit(3)
        if os.environ["FAULT"] == "hangs":
            time.sleep(1e6)
    return float(len(completion))


def first_half(completions: list[str], answer: list[str]) -> list[float | None]:
    """Scores of the first half of a step: of two ranks, the share of the first."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    scored = len(completions) // 2 if ranks == 1 else len(completions) * (os.environ["RANK"] == "0")
    scores = [digits(*pair) for pair in zip(completions, answer, strict=True)]
    return [score if place < scored else None for place, score in enumerate(scores)]


def on_no_rank(completion: str) -> float | None:
    return None


def judge(completion: str) -> float:
    with urllib.request.urlopen(os.environ["JUDGE_URL"], timeout=2) as answer:
        return float(answer.read())


def complains(completion: str) -> float:
    raise ConnectionError(f"no answer from https://user:{os.environ['SERVICE_TOKEN']}@host/?token=query-secret-value")
