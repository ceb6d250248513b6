"""D9: the ranks of a run leave together, after everything is written, and none of them aborts at its exit."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_fsdp import FSDP

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
KINDS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": FSDP, "zero2": ZERO}
SHORT = {"max_steps": 1, "save_steps": 1, "num_eval_prompts": 2, "noise_steps": 0, "reward_in_process": True}
TIMES = 3
CAUSE = "ValueError: injected: the model cannot be written"


def skip_without(kind: str) -> None:
    if kind == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install deepspeed")


def times(output: str, word: str) -> list[float]:
    return [float(time) for time in re.findall(rf"{word} at ([\d.]+)", output)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_leaves_while_another_writes(kind: str, ranks: Callable[..., Any]) -> None:
    skip_without(kind)
    ended = ranks("r", changes=SHORT, env=KINDS[kind], slow_writes=True)
    assert ended.status == 0, ended.output
    assert len(times(ended.output, "left")) == 2
    assert min(times(ended.output, "left")) > max(times(ended.output, "written"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_no_rank_while_another_writes(kind: str, ranks: Callable[..., Any]) -> None:
    """Without that, the status of the rank that has nothing to write makes a launcher end the one that saves."""
    skip_without(kind)
    changes = {**SHORT, "max_steps": 3, "save_steps": 0}
    ended = ranks("r", changes=changes, env=KINDS[kind], slow_writes=True, fault="sigterm", at=1)
    assert ended.status == 128 + 15, ended.output
    assert len(times(ended.output, "written")) == 1
    assert min(times(ended.output, "left")) > max(times(ended.output, "written"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_of_a_launcher_end_in_order_each_time(
    kind: str, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    skip_without(kind)
    for number in range(TIMES):
        ended = two_ranks(f"r{number}", changes=SHORT, env=KINDS[kind])
        assert ended.status == 0, ended.output
        assert "terminate called" not in ended.output
        assert (tmp_path / f"r{number}" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True], ids=["at the end", "the best so far"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_model_that_the_first_rank_cannot_save_ends_every_rank_with_the_cause(
    kind: str, best: bool, ranks: Callable[..., Any]
) -> None:
    """The second rank ended with "Connection closed by peer", and where a group has no sockets it would have waited."""
    changes = {**SHORT, "save_steps": 0, "save_at_end": False}
    changes |= {"metric_for_best_model": "eval/greedy", "eval_steps": 1} if best else {"num_eval_prompts": 0}
    fault = {"fault": "the first rank cannot save the model", "at": 1}
    ended = ranks("r", algorithm="ppo", changes=changes, env=KINDS[kind], **fault)
    assert ended.status != 0
    assert CAUSE in ended.output
    assert f"RunStopped: Rank 0 ended the run: {CAUSE}" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_that_fails_on_the_first_rank_ends_every_rank_with_the_cause(
    kind: str, ranks: Callable[..., Any]
) -> None:
    """Not a full disk, of which the run warns and goes on."""
    fault = {"fault": "the first rank cannot write a checkpoint", "at": 1}
    ended = ranks("r", changes={**SHORT, "max_steps": 2, "num_eval_prompts": 0}, env=KINDS[kind], **fault)
    assert ended.status != 0
    assert CAUSE in ended.output
    assert f"RunStopped: Rank 0 ended the run: {CAUSE}" in ended.output
