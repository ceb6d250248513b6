"""Rows of completions as the trainer writes them."""

from __future__ import annotations

from typing import Any


def token_row(step: int, group: int, sample: int, pieces: list[str], **changes: Any) -> dict[str, Any]:
    """A row of completions/: the weight of a token is its place, negative in odd samples."""
    sign = -1 if sample % 2 else 1
    return {
        "prompt_index": group,
        "group": group,
        "prompt": f"prompt {group}",
        "columns": {"hint": f"of {group}", "answer": f"right {group}"},
        "completion": "".join(pieces),
        "ids": list(range(len(pieces))),
        "reward": float(sample % 2 == 0),
        "parts": {"right": float(sample % 2 == 0), "form": 0.25 * sample},
        "truncated": False,
        "pieces": pieces,
        "tokens": {
            "logp": [-0.5 - 0.1 * i for i in range(len(pieces))],
            "ref_logp": [-0.75 - 0.1 * i for i in range(len(pieces))],
            "weight": [sign * 0.5 * (i + 1) for i in range(len(pieces))],
        },
        **changes,
    }
