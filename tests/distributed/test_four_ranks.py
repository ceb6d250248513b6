"""Four gloo ranks, and prompts that they cannot share equally, against one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config.check import plan_batch, share
from llm_pg.config.load import check_values
from llm_pg.run.ranks import merge_metrics
from tests.distributed.sameness import NUMBERS, distance, forget_the_last
from tests.faults.conftest import lines
from tests.faults.tiny_run import make

pytestmark = pytest.mark.faults
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Seven prompts over four ranks: 1, 2, 2 and 2. Micro-batches of three rows end at other places on each.
CHANGES = {
    **{"max_steps": 4, "save_steps": 2, "prompts_per_step": 7, "num_generations": 3, "per_device_train_batch_size": 3},
    **{"reward_in_process": True, "engine": "native", "beta": 0.1, "num_iterations": 2, "surrogate": "clip"},
    **{"adam_epsilon": 1e-3, "num_eval_prompts": 5},
}
OF_BATCH = ("reward_std", "completion_length", "uniform_groups", "unscorable", "truncated", "kl")


def same(one: Path, many: Path) -> None:
    """Numbers of every step, and the weights after the last."""
    for a, b in zip(lines(one), lines(many), strict=True):
        assert a["tokens"] == b["tokens"]
        for name in (*NUMBERS, *OF_BATCH):
            assert a[name] == pytest.approx(b[name], abs=1e-6), (a["step"], name)
    model = Path("model") / "model.safetensors"
    assert distance(many / model, one / model) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_plus_plus", "rloo"])
def test_four_ranks_with_unequal_shares_train_as_one_process(
    algorithm: str, ranks: Callable[..., Any], tmp_path: Path
) -> None:
    make({"out": str(tmp_path), "name": "one", "algorithm": algorithm, "changes": CHANGES}).train()
    four = ranks("four", count=4, algorithm=algorithm, changes=CHANGES)
    assert four.status == 0, four.output
    same(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
def test_four_ranks_in_shards_sample_ahead_as_one_process_and_three_go_on(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Three ranks take 2, 2 and 3 of the groups that four had sampled."""
    changes = {**CHANGES, "max_staleness": 1}
    make({"out": str(tmp_path), "name": "one", "inside": True, "changes": changes}).train()
    four = ranks("four", count=4, changes=changes, env=FSDP)
    assert four.status == 0, four.output
    same(tmp_path / "one", tmp_path / "four")
    forget_the_last(tmp_path / "four")
    three = ranks("four", count=3, inside=True, changes=changes, resume=True)
    assert three.status == 0, three.output
    same(tmp_path / "one", tmp_path / "four")
    assert [line["staleness"] for line in lines(tmp_path / "four")] == [0, 1, 1, 1]


@pytest.mark.parametrize("things", [4, 5, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_every_place_once_in_order_and_differ_by_one_at_most(things: int, count: int) -> None:
    own = [share(things, number, count) for number in range(count)]
    assert [place for each in own for place in each] == list(range(things))
    assert max(map(len, own)) - min(map(len, own)) <= 1
    plan = plan_batch(check_values({"prompts_per_step": things, "num_generations": 2}), count)
    assert plan.rows_per_rank == 2 * max(map(len, own))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts_per_step": 3}, "prompts_per_step 3 is fewer than 4 ranks.* Take 4"),
        (
            {"prompts_per_step": 6, "steps_per_generation": 2, "surrogate": "clip"},
            "6 does not divide by 4 ranks, and steps_per_generation is 2.* Take 4 prompts",
        ),
    ],
)
def test_shares_that_cannot_be_are_refused_with_what_can(changes: dict[str, Any], message: str) -> None:
    config = check_values({**changes, "num_generations": 4})
    with pytest.raises(ValueError, match=message):
        plan_batch(config, 4)


def test_metrics_of_unequal_ranks_count_by_completions() -> None:
    """One completion of length 4 beside three of mean length 8, all truncated."""
    parts = [
        {"completion_length": 4.0, "truncated": 0.0, "tokens": 4, "reward": 1.0, "unscorable": 0.0, "reward_std": 0.0},
        {"completion_length": 8.0, "truncated": 1.0, "tokens": 24, "reward": 0.0, "unscorable": 0.0, "reward_std": 0.0},
    ]
    merged = merge_metrics(parts, [1, 3])
    assert (merged["completion_length"], merged["truncated"], merged["tokens"]) == (7.0, 0.75, 28)
    assert (merged["reward"], merged["reward_std"]) == (0.25, 0.5)  # 1, 0, 0, 0
