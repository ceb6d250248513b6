"""Reward functions in the shapes that TRL's documentation shows, written anew, and light for the workers to load."""

import asyncio
import re
from typing import Any


def unique_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def many_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def many_characters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def thinks_then_answers(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    texts = [messages[0]["content"] for messages in completions]
    return [float(bool(re.match(r"^<think>.*?</think><answer>.*?</answer>$", text))) for text in texts]


def begins_as_the_reference(completions: list[str], ground_truth: list[str], **kwargs: Any) -> list[float]:
    return [float(text[:1] == truth) for text, truth in zip(completions, ground_truth, strict=True)]


def of_sums(prompts: list[str], completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    return [
        (1.0 if any(c.isdigit() for c in text) else -1.0) if kind == "math" else None
        for text, kind in zip(completions, task, strict=True)
    ]


def of_code(prompts: list[str], completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    return [
        (1.0 if "(" in text else -1.0) if kind == "code" else None for text, kind in zip(completions, task, strict=True)
    ]


async def answered(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [1.0 if text else 0.0 for text in completions]


def with_logs(completions: list[str], log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[float]:
    digits = [sum(c.isdigit() for c in text) for text in completions]
    if log_extra:
        log_extra("digits", digits)
    if log_metric:
        log_metric("with_digits", sum(map(bool, digits)) / len(digits))
    return [float(bool(n)) for n in digits]


def harder_later(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]
