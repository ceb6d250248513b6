"""Which prompts a step trains on: a function of (seed, step)."""

import hashlib
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.config import ConfigError
from llm_pg.prompts import Prompt, Prompts, permutation
from llm_pg.prompts.stream import epoch_order


def stream(size: int, per_step: int, seed: int = 0, shuffle: bool = True) -> Prompts:
    prompts = [Prompt(index, f"p{index}", None, (index,), {}) for index in range(size)]
    return Prompts(prompts, per_step=per_step, seed=seed, shuffle=shuffle)


def indices(source: Prompts, steps: range) -> list[int]:
    return [prompt.index for step in steps for prompt in source.take(step)]


sizes = st.integers(1, 12).flatmap(lambda per_step: st.tuples(st.integers(per_step, 60), st.just(per_step)))


@pytest.mark.faults
@settings(max_examples=150, deadline=None)
@given(shape=sizes, seed=st.integers(0, 2**40), shuffle=st.booleans())
def test_every_epoch_holds_each_prompt_exactly_once(shape: tuple[int, int], seed: int, shuffle: bool) -> None:
    size, per_step = shape
    seen = indices(stream(size, per_step, seed, shuffle), range(5 * size // per_step + 1))
    for epoch in range(5):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=150, deadline=None)
@given(shape=sizes, seed=st.integers(0, 2**40), shuffle=st.booleans())
def test_no_step_holds_a_prompt_twice_even_across_epochs(shape: tuple[int, int], seed: int, shuffle: bool) -> None:
    size, per_step = shape
    source = stream(size, per_step, seed, shuffle)
    for step in range(5 * size // per_step + 1):
        taken = [prompt.index for prompt in source.take(step)]
        assert len(set(taken)) == per_step == len(taken)


@pytest.mark.faults
@settings(max_examples=100, deadline=None)
@given(shape=sizes, seed=st.integers(0, 2**40), resume=st.integers(0, 40))
def test_a_fresh_stream_takes_up_at_any_step(shape: tuple[int, int], seed: int, resume: int) -> None:
    whole = stream(*shape, seed)
    before = [[p.index for p in whole.take(step)] for step in range(resume + 3)]
    epoch_order.cache_clear()
    resumed = stream(*shape, seed)
    assert [[p.index for p in resumed.take(step)] for step in range(resume, resume + 3)] == before[resume:]
    assert [p.index for p in whole.take(0)] == before[0]


@pytest.mark.faults
def test_sixteen_prompts_resumed_in_the_third_epoch_are_all_seen_three_times() -> None:
    first, second = stream(16, 3), stream(16, 3)
    seen = indices(first, range(11)) + indices(second, range(11, 16))
    assert sorted(seen) == sorted(list(range(16)) * 3)


def test_ranks_that_slice_a_step_cover_it() -> None:
    whole = [p.index for p in stream(20, 8).take(7)]
    ranks = [[p.index for p in stream(20, 8).take(7)[rank * 4 : rank * 4 + 4]] for rank in range(2)]
    assert ranks[0] + ranks[1] == whole


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert indices(stream(5, 2, shuffle=False), range(5)) == [0, 1, 2, 3, 4] * 2


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {permutation(30, seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_of_an_epoch_is_the_sort_by_hash() -> None:
    def key(place: int) -> bytes:
        return hashlib.blake2b(b"7/2/%d" % place, digest_size=16).digest()

    shuffled = random.Random(0).sample(range(50), 50)
    assert list(permutation(50, 7, 2)) == sorted(shuffled, key=key)


def test_the_order_depends_on_no_hash_seed_of_the_process() -> None:
    code = "from llm_pg.prompts import permutation; print(permutation(9, 3, 1))"
    out = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1] == f"{permutation(9, 3, 1)}\n"


def test_each_place_of_an_epoch_is_equally_likely_for_a_prompt() -> None:
    places = [permutation(4, seed, 0).index(0) for seed in range(2000)]
    counts = [places.count(place) for place in range(4)]
    chi_square = sum((count - 500) ** 2 / 500 for count in counts)
    assert chi_square < 16.27  # 99.9 % of a fair order's values, 3 degrees of freedom


def test_the_epoch_of_a_step_counts_prompts() -> None:
    assert stream(16, 4).epoch(6) == 1.5


@pytest.mark.faults
def test_fewer_prompts_than_a_step_needs_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"needs 4 prompts, and 3 are left.*lower prompts_per_step"):
        stream(3, 4)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        stream(3, 1).take(-1)
