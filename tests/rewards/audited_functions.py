"""Reward functions with holes, as users write them, and one or two without."""

import asyncio
import re
import time
from typing import Any

from reward_fns.code import extract_code
from reward_fns.code_sets import humaneval_gold
from reward_fns.registry import RewardInfo


def last_digits(completion: str, answer: str, **row: Any) -> float:
    found = re.findall(r"\d+", completion)
    return float(bool(found) and found[-1] == answer)


def first_number(completion: str, answer: str, **row: Any) -> float:
    found = re.findall(r"-?\d+", completion)
    return float(bool(found) and found[0] == answer)


def anywhere(completion: str, answer: str, **row: Any) -> float:
    return float(answer in completion)


def constant(completion: str, answer: str, **row: Any) -> float:
    return 1.0 if answer in completion or "7" not in completion else 0.0


def whole_text(completion: str, answer: str, **row: Any) -> float:
    return float(completion.strip() == answer)


def whole_text_up_to_three_characters(completion: str, answer: str, **row: Any) -> float:
    return float(completion.strip() == answer and len(answer) <= 3)


def brief(completion: str, **row: Any) -> float:
    return -len(completion) / 100


def length(completion: str) -> float:
    return -len(completion) / 100


def slow(completion: str, answer: str, **row: Any) -> float:
    time.sleep(0.05)
    return float(completion.strip() == answer)


def raises_often(completion: str, answer: str, **row: Any) -> float:
    return 1.0 if int(completion) == int(answer) else 0.0


def infinite(completion: str, answer: str, **row: Any) -> float:
    return float(completion == answer) if completion.strip() else -float("inf")


async def over_the_network(completion: str, answer: str, **row: Any) -> float:
    await asyncio.sleep(0)
    return float(completion.strip() == answer)


def compiles(completion: str, prompt: str, entry_point: str, **row: Any) -> float:
    code = extract_code(completion)
    try:
        return float(code is not None and f"def {entry_point}" in code)
    except SyntaxError:
        return 0.0


compiles.reward_info = RewardInfo(0.0, 1.0, 0.0, "answer", gold=humaneval_gold)  # type: ignore[attr-defined]
