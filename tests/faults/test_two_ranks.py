"""R4 and W7: another number of ranks, and a rank whose reward function fails, with torchrun and gloo."""

import json
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.distributed.strategy import Strategy
from llm_pg.run.guard import RunStopped
from llm_pg.run.ranks import Ranks, merge_metrics
from llm_pg.run.saving import checkpoint_files
from tests.faults.conftest import lines
from tests.faults.tiny_run import LIGHT, SIZES, make

pytestmark = pytest.mark.faults
# The native engine draws each completion from a stream of its own; transformers' generate draws for a whole batch.
CHANGES = {"max_steps": 4, "save_steps": 2, "log_completions": 4, "reward_in_process": True, "engine": "native"}


def first_half(folder: Path, step: int) -> list[tuple[int, list[int], list[float]]]:
    """Prompt, completion and advantages of the rows that the first rank wrote down."""
    path = folder / "completions" / f"step-{step:06d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][:8]
    return [(row["prompt_index"], row["ids"], row["tokens"]["weight"]) for row in rows]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_prompts_samples_and_advantages(
    two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """One rank to the end; two ranks from its checkpoint of step 2; and one rank again from that of the two."""
    make({"out": str(tmp_path), "name": "one", "changes": {**CHANGES, "max_steps": 4}}).train()
    both = two_ranks("two", changes=CHANGES)
    assert both.status == 0, both.output
    for step in (3, 4):
        for a, b in zip(first_half(tmp_path / "one", step), first_half(tmp_path / "two", step), strict=True):
            assert a[:2] == b[:2]
            assert a[2] == pytest.approx(b[2], abs=1e-6)
    (tmp_path / "one" / "checkpoints" / "step-000004" / "manifest.json").unlink()
    (tmp_path / "two" / "checkpoints" / "step-000004" / "manifest.json").unlink()
    more = two_ranks("one", changes=CHANGES, resume=True)
    assert more.status == 0, more.output
    make({"out": str(tmp_path), "name": "two", "changes": CHANGES}).train(resume=True)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("reward", "grad_norm", "tokens", "entropy", "policy_loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


@pytest.mark.slow
def test_two_ranks_train_the_critic_that_one_rank_trains(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """A step of warm-up, then both: values, targets, both gradients and the explained variance."""
    changes = {**CHANGES, "max_steps": 3, "save_steps": 0, "critic_warmup_steps": 1, "truncated": "bootstrap"}
    make({"out": str(tmp_path), "name": "one", "algorithm": "ppo", "changes": changes}).train()
    both = two_ranks("two", algorithm="ppo", changes=changes)
    assert both.status == 0, both.output
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("reward", "grad_norm", "critic_grad_norm", "value_loss", "policy_loss", "explained_variance"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["whole", "shards"])
@pytest.mark.parametrize("passes", [{}, {"num_iterations": 2, "per_device_train_batch_size": 1}])
def test_two_ranks_balance_the_experts_that_one_rank_balances(
    passes: dict[str, int], env: dict[str, str], two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """The loss is a product of two means over the step, so that ranks tell each other which experts they chose."""
    sizes = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes.update(router_aux_loss_coef=1.0, initializer_range=0.5, num_key_value_heads=2)
    changes = {**CHANGES, "max_steps": 3, "save_steps": 0, **passes}
    make({"out": str(tmp_path), "name": "one", "sizes": sizes, "changes": changes}).train()
    both = two_ranks("two", sizes=sizes, changes=changes, env=env)
    assert both.status == 0, both.output
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("reward", "grad_norm", "aux_loss", "policy_loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


def test_a_nan_on_one_rank_skips_the_step_on_both(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """R12: the ranks would else hold different weights from then on; the run goes on with the step after it."""
    broken = ranks("broken", changes=CHANGES, fault="nan on the second rank once", at=2)
    assert broken.status == 0, broken.output
    found = lines(tmp_path / "broken")
    assert [line["skipped_updates"] for line in found] == [0, 1, 0, 0]
    assert "grad_norm" in found[1]["nan"]
    assert all(line["grad_norm"] is not None for n, line in enumerate(found) if n != 1)
    assert found[2]["sampler_gap"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_step_and_saves(
    number: int, launch: Callable[..., Any], two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """R10: torchrun hands it to its workers; the run goes on from there to the numbers of one never stopped."""
    changes = {**CHANGES, "max_steps": 8, "save_steps": 0}
    process = launch("cut", changes={**changes, "save_steps": 100}, fault="slow steps", at=0)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert "ended after step" in output, output
    done = len(lines(tmp_path / "cut"))
    assert 2 <= done < 8
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    more = two_ranks("cut", changes={**changes, "save_steps": 100}, resume=True)
    assert more.status == 0, more.output
    whole = two_ranks("whole", changes=changes)
    assert whole.status == 0, whole.output
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"engine": "transformers"}, {"engine": "native", "steps_per_generation": 2}])
def test_another_number_of_ranks_is_refused_where_it_would_change_the_run(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**CHANGES, "surrogate": "clip", "max_steps": 2, **changes}
    make({"out": str(tmp_path), "name": "r", "changes": changes}).train()
    trainer = make({"out": str(tmp_path), "name": "r", "changes": changes})
    manifest = tmp_path / "r" / "checkpoints" / "step-000002" / "manifest.json"
    found = json.loads(manifest.read_text())
    assert found["identity"]["ranks"] == 1
    found["identity"]["ranks"] = 2
    manifest.write_text(checkpoint_files.manifest_text(found))
    with pytest.raises(ConfigError, match=r"\n  ranks +2 +1\n"):
        trainer.train(resume=True)


@pytest.mark.parametrize("fault", ["raises", "exits", "hangs"])
def test_a_reward_that_fails_on_one_rank_ends_both_with_its_cause(fault: str, ranks: Callable[..., Any]) -> None:
    """Deadline 1 s; no launcher ends the other rank."""
    changes = {"reward_timeout": 1.0, "max_steps": 2, "num_generations": 2, "prompts_per_step": 2}
    begin = time.monotonic()
    ended = ranks("r", changes=changes, reward=f"{LIGHT}:on_rank_1", env={"FAULT": fault})
    assert ended.status != 0
    assert time.monotonic() - begin < 150
    assert "Rank 1 ended the run: RewardError: Reward function on_rank_1 could not score" in ended.output
    if fault == "raises":
        assert "injected on rank 1" in ended.output


class TwoRanks(Strategy):
    num_ranks = 2


@pytest.mark.fake
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_plus_plus"])
def test_a_rank_without_any_score_goes_on_and_both_take_the_steps_of_one_rank(
    algorithm: str, ranks: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {**CHANGES, "max_steps": 3, "save_steps": 0, "num_eval_prompts": 0}
    options = {"algorithm": algorithm, "changes": changes, "reward": f"{LIGHT}:first_half"}
    ended = ranks("two", **options)
    assert ended.status == 0, ended.output
    make({"out": str(tmp_path), "name": "one", **options}).train()
    assert any(line["grad_norm"] > 0 for line in lines(tmp_path / "two"))
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["unscorable"] == two["unscorable"] == 0.5
        for name in ("reward", "reward_std", "reward/first_half", "rewards/first_half/std", "grad_norm", "tokens"):
            assert one[name] == pytest.approx(two[name], abs=1e-5), name


@pytest.mark.slow
def test_ranks_that_have_no_score_at_all_end_together_with_one_cause(ranks: Callable[..., Any]) -> None:
    changes = {**CHANGES, "max_steps": 1, "save_steps": 0, "num_eval_prompts": 0}
    ended = ranks("r", changes=changes, reward=f"{LIGHT}:on_no_rank")
    assert ended.status != 0
    assert ended.output.count("RewardError: No completion of step 1 has a score, on any of 2 ranks") == 2


def test_a_rank_ends_with_the_cause_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(TwoRanks("cpu"))
    monkeypatch.setattr(ranks, "any_of", lambda flags: [True])
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "KeyError: broken"])
    with pytest.raises(RunStopped, match="Rank 1 ended the run: KeyError: broken"):
        ranks.together(lambda: 1)
    with pytest.raises(ZeroDivisionError):  # its own comes first
        ranks.together(lambda: 1 // 0)


def test_metrics_of_ranks_add_up_as_those_of_one_batch() -> None:
    """Rewards 1, 1, 0 (one of four unscorable) on one rank and 0, 0, 0, 0 on the other: 2 of 7."""
    own, other = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    lengths, kl = ([2, 3, 5, 2], [6, 4, 2, 8]), (0.25, 0.5)
    parts = [
        {
            **{"step": 3, "reward": 2 / 3, "unscorable": 0.25, "tokens": 10, "memory": 5.0, "policy_loss": 0.25},
            **{"reward_std": statistics.stdev(own), "completion_length": statistics.mean(lengths[0]), "kl": kl[0]},
        },
        {
            **{"step": 3, "reward": 0.0, "unscorable": 0.0, "tokens": 20, "memory": 7.0, "policy_loss": 0.5},
            **{"reward_std": statistics.stdev(other), "completion_length": statistics.mean(lengths[1]), "kl": kl[1]},
        },
    ]
    merged = merge_metrics(parts, rows=[4, 4])
    assert merged["reward"] == pytest.approx(2 / 7)
    assert merged["reward_std"] == pytest.approx(statistics.stdev(own + other))
    assert merged["kl"] == pytest.approx((12 * kl[0] + 20 * kl[1]) / 32)
    assert (merged["step"], merged["tokens"], merged["memory"], merged["policy_loss"]) == (3, 30, 7.0, 0.75)
