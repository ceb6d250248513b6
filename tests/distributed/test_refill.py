"""Refills and a curriculum on two real ranks, against one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import lines
from tests.faults.tiny_run import make

CHANGES = {
    **{"max_steps": 4, "save_steps": 2, "reward_in_process": True, "engine": "native", "num_eval_prompts": 4},
    **{"dynamic_sampling_max_rounds": 3, "curriculum": "pass_rate", "num_generations": 2},
}
SAME = (
    *("reward", "grad_norm", "tokens", "entropy", "policy_loss", "uniform_groups", "sampled_reward"),
    *("groups_dropped", "refill_rounds", "prompts_tried", "prompt_pass_rate"),
)


@pytest.mark.slow
@pytest.mark.faults
def test_two_ranks_refill_and_learn_of_prompts_as_one_rank_does(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """One rank to the end; and two from its checkpoint of step 2, with the curriculum's counts in it."""
    make({"out": str(tmp_path), "name": "one", "changes": CHANGES}).train()
    whole = lines(tmp_path / "one")
    assert sum(line.get("groups_dropped", 0) for line in whole[2:]) > 0
    both = two_ranks("two", changes=CHANGES)
    assert both.status == 0, both.output
    (tmp_path / "one" / "checkpoints" / "step-000004" / "manifest.json").unlink()
    more = two_ranks("one", changes=CHANGES, resume=True)
    assert more.status == 0, more.output
    for name in ("one", "two"):
        for a, b in zip(whole, lines(tmp_path / name), strict=True):
            for metric in SAME:
                assert a.get(metric) == pytest.approx(b.get(metric), abs=1e-5), (name, metric)
