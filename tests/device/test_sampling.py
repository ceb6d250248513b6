"""Sampling with all tensors on an accelerator: the CPU's tokens, and at most one wait of the host for each of them."""

from collections.abc import Callable
from typing import Any

import pytest

from llm_pg.sampling.static.batch import LOOK_EVERY
from tests.device import room
from tests.device.room import Done
from tests.device.test_updates import assert_same

WAYS: dict[str, dict[str, Any]] = {
    "lean": {},
    "its own layers": {"lean": False},
    "learned positions": {"family": "gpt2"},
    "the model's cache": {"share_prompts": False},
    "windows and soft caps": {"family": "gemma2"},
    "rows that enter": {"at_once": 6},
    "rows that enter the model's cache": {"at_once": 6, "share_prompts": False},
    "a truncated distribution": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "greedy": {"greedy": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_plain_decoder_waits_once_a_token(way: str, on_sim: Callable[..., Done]) -> None:
    """To learn which rows have ended. Through the model's cache transformers waits too, for the mask and where a cache
    is made: at most two more a token."""
    done = on_sim(room.sample, **WAYS[way])
    assert_same(room.sample(**WAYS[way], device="cpu"), done)
    assert done.counts["looks"] >= done.counts["longest"]
    most = (3 if done.numbers["way"] == "cache" else 1) * done.counts["looks"]
    assert sum(done.waits.values()) <= most, done.report()


@pytest.mark.parametrize("at_once", [None, 8])
def test_steps_of_fixed_shapes_wait_for_no_token(at_once: int | None, on_sim: Callable[..., Done]) -> None:
    """The host looks once in eight tokens who has ended, and once in the end how long the longest is."""
    done = on_sim(room.sample, static=True, at_once=at_once)
    assert done.numbers["static"]
    assert_same(room.sample(static=True, at_once=at_once, device="cpu"), done)
    assert sum(done.waits.values()) <= done.counts["looks"] + 1, done.report()
    if at_once is None:
        assert done.counts["looks"] <= done.counts["longest"] // LOOK_EVERY + 2
