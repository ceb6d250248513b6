"""Penalties on length and on repetition: never above 0, for use beside a reward for the answer."""

from collections.abc import Sequence
from typing import Any, Literal

from reward_fns.registry import reward

MAX_UNITS = 100_000


@reward(low=-1.0, high=0.0, floor=0.0, checks="shape")
def length_penalty(
    completion: str, completion_ids: Sequence[int], max_length: int, cushion: int = 0, **row: Any
) -> float:
    """0 up to max_length - cushion tokens, from there in a straight line to -1 at max_length, -1 beyond.

    r = -clip((length - (max_length - cushion)) / cushion, 0, 1); without a cushion a step at max_length, which is
    itself still free. The soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13) has this form.
    Lengths are in tokens, the end token included.

    Range [-1, 0]. Floor 0: an empty completion is not punished.
    """
    if not 0 <= cushion <= max_length or max_length < 1:
        raise ValueError(
            f"length_penalty needs 0 <= cushion <= max_length, max_length >= 1; got cushion {cushion}, max_length "
            f"{max_length}."
        )
    over = len(completion_ids) - (max_length - cushion)
    if over <= 0:
        return 0.0
    return -min(1.0, over / cushion) if cushion else -1.0


@reward(low=-1.0, high=0.0, floor=0.0, checks="shape")
def repetition_penalty(
    completion: str, ngram: int = 3, unit: Literal["word", "character"] = "word", **row: Any
) -> float:
    """Minus the share of n-grams that repeat an earlier one: r = -(1 - distinct / all), 0 with fewer than two n-grams.

    Only the first 100,000 words or characters count, so that huge output costs no more.

    Range [-1, 0]. Floor 0: an empty completion, or junk without repeats, is not punished.
    """
    if ngram < 1 or unit not in ("word", "character"):
        raise ValueError(f"repetition_penalty needs ngram >= 1 and unit 'word' or 'character'; got {ngram}, {unit!r}.")
    units: Sequence[str] = completion.split(None, MAX_UNITS)[:MAX_UNITS] if unit == "word" else completion[:MAX_UNITS]
    total = len(units) - ngram + 1
    if total < 2:
        return 0.0
    distinct = {tuple(units[start : start + ngram]) for start in range(total)}
    return len(distinct) / total - 1.0
