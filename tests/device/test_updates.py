"""Every algorithm and layout with all tensors on an accelerator: the CPU's numbers, and how often the host waits.

At most 6 waits an optimiser step and, where rows are padded, 2 a forward pass, both of them transformers' look at the
mask. Where one is too many, the failure names its line.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_pg.algorithms.table import ALGORITHMS
from tests.device import room
from tests.device.room import Done

PER_STEP, PER_PADDED_PASS = 6, 2
QUICK = ("reinforce", "grpo", "ppo", "rloo")  # the others go through the same code, with other words of the table
LAYOUTS = [
    pytest.param(
        *(name, packing),
        id=f"{name}, {packing}",
        marks=[] if name in QUICK else [pytest.mark.ci],
    )
    for name in ALGORITHMS
    for packing in ("auto", "padded")
]
OTHERS: dict[str, dict[str, Any]] = {
    "a running mean over updates": {"algorithm": "reinforce", "updates": 2, "spec": {"beta": 0.1}},
    "a penalty that adapts": {"algorithm": "reinforce", "updates": 2, "spec": {"kl_target": 0.01}},
    "several passes and minibatches": {"algorithm": "grpo", "num_iterations": 2, "num_minibatches": 2, "updates": 2},
    "a bonus on the highest entropies": {
        "algorithm": "grpo", "spec": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    },
    "gradient noise": {"algorithm": "grpo", "noise_steps": 1},
    "an adapter with a reference": {"algorithm": "grpo", "lora": True, "spec": {"beta": 0.1}},
    "an adapter with a critic model": {"algorithm": "ppo", "lora": True},
    "a critic that sees what follows the limit": {"algorithm": "ppo", "spec": {"truncated": "bootstrap"}},
    "what an environment inserted": {"algorithm": "rloo", "inserted": True},
    "what an environment inserted, padded": {"algorithm": "rloo", "inserted": True, "packing": "padded"},
    "a window and a soft cap": {"algorithm": "grpo", "family": "gemma2"},
    "learned positions": {"algorithm": "grpo", "family": "gpt2"},
}  # fmt: skip


def assert_same(one: Done, other: Done) -> None:
    """Also where the accelerator takes another kernel; a number that only one has is a difference."""
    assert one.numbers.keys() == other.numbers.keys()
    for name, value in one.numbers.items():
        if isinstance(value, str | bool):
            assert value == other.numbers[name], name
        else:
            np.testing.assert_allclose(other.numbers[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def assert_few_waits(done: Done) -> None:
    passes = done.counts["passes"] if done.numbers["layout"] == "padded" else 0
    # The grouped layout takes transformers' cache, each layer of which is made from an empty list of numbers.
    waits = sum(number for (_, place), number in done.waits.items() if "transformers/cache_utils.py" not in place)
    assert waits <= PER_STEP * done.counts["steps"] + PER_PADDED_PASS * passes, done.report()


@pytest.mark.parametrize(("name", "packing"), LAYOUTS)
def test_every_algorithm_updates_there_as_on_the_cpu(name: str, packing: str, on_sim: Callable[..., Done]) -> None:
    done = on_sim(room.update, name, packing=packing)
    assert done.numbers["layout"] == ("padded" if packing == "padded" else "packed")
    assert_same(room.update(name, packing=packing, device="cpu"), done)
    assert_few_waits(done)


@pytest.mark.parametrize("name", OTHERS)
def test_what_belongs_to_an_update_is_there_as_on_the_cpu(name: str, on_sim: Callable[..., Done]) -> None:
    done = on_sim(room.update, **OTHERS[name])
    assert_same(room.update(**OTHERS[name], device="cpu"), done)
    assert_few_waits(done)


def test_flex_attention_computes_there_what_it_computes_on_the_cpu(on_sim: Callable[..., Done]) -> None:
    done = on_sim(room.flex)
    assert_same(room.flex(device="cpu"), done)
    assert sum(done.waits.values()) <= 1, done.report()
