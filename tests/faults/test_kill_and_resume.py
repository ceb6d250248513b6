"""R1, R2, R3: a run that is killed and goes on ends as the run that was not, bit for bit."""

import io
import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llm_pg.metrics import read_metrics
from llm_pg.run.saving import checkpoint_files
from llm_pg.terminal import LiveTerminal
from tests.faults.conftest import lines, weights
from tests.faults.tiny_run import NUM_TRAINED, inject, make
from tests.seams import Steps, raising

pytestmark = pytest.mark.faults

REUSE = {"num_iterations": 2, "steps_per_generation": 2, "surrogate": "clip", "beta": 0.05}


@pytest.mark.parametrize(
    "algorithm, changes, lora",
    [
        ("reinforce", {"baseline": "running_mean"}, False),
        ("rloo", {"lr_scheduler_type": "linear"}, False),
        ("grpo", REUSE, False),
        ("grpo", REUSE, True),
        (
            "grpo",
            {**REUSE, "sync_ref_model": True, "ref_model_sync_steps": 2, "kl_target": 0.01, "loss_type": "grpo"},
            False,
        ),
        ("remax", {"beta": 0.05}, False),
        ("a2c", {"critic_warmup_steps": 4, "truncated": "bootstrap", "lr_scheduler_type": "linear"}, False),
        ("ppo", {**REUSE, "critic_kind": "model", "lam_value": 1.0}, False),
        ("ppo", {**REUSE, "critic_warmup_steps": 2, "critic_trunk_gradient": True}, True),
    ],
    ids=[
        "reinforce",
        "rloo",
        "grpo reused",
        "grpo reused, adapter with dropout",
        "grpo reused, the reference and the penalty move",
        "remax",
        "a2c, killed as the warm-up ends",
        "ppo reused, a critic of its own",
        "ppo reused, adapter with dropout",
    ],
)
def test_a_run_killed_where_nothing_was_saved_ends_as_the_one_that_was_not(
    algorithm: str, changes: dict[str, Any], lora: bool, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL after step 5, in the second epoch; the newest checkpoint is that of step 3, in the first."""
    options = {"algorithm": algorithm, "changes": {**changes, "save_steps": 3}, "lora": lora}
    whole = tiny("whole", **options)
    assert whole.status == 0, whole.output
    assert tiny("cut", fault="kill", at=5, **options).status == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed = tiny("cut", resume=True, **options)
    assert resumed.status == 0, resumed.output
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_a_resumed_run_goes_on_with_the_loss_scale_that_was_found(tmp_path: Path) -> None:
    """8 at first, doubled after every second step: 16 and half way to 32 when step 3 is saved."""

    def scale_after(steps: int, resume: bool) -> float:
        changes = {"max_steps": 4, "save_steps": 3, "reward_in_process": True, "max_grad_norm": 0}
        trainer = make({"out": str(tmp_path), "name": "r", "changes": changes})
        trainer.context.strategy.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def ends(step: int) -> None:
            trainer.callbacks.control.should_training_stop = step == steps

        trainer.add_callback(Steps(after=ends))
        trainer.train(resume=resume)
        return float(trainer.context.strategy.scaler.get_scale())

    assert scale_after(3, resume=False) == 16.0
    assert scale_after(4, resume=True) == 32.0


def test_a_resume_in_the_third_epoch_sees_each_prompt_once_an_epoch(tmp_path: Path) -> None:
    """16 prompts, 4 a step, so epochs of 4 steps; interrupted after step 10 of 16."""

    class Killed(Exception):
        pass

    def run(name: str, resume: bool = False, stop: int = 0) -> None:
        changes = {"max_steps": 16, "save_steps": 5, "reward_in_process": True, "log_completions": 4}
        trainer = make({"out": str(tmp_path), "name": name, "changes": changes})
        trainer.add_callback(Steps(after=raising(Killed, stop)))
        trainer.train(resume=resume)

    run("whole")
    with pytest.raises(Killed):
        run("cut", stop=11)
    run("cut", resume=True)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    for epoch in range(4):
        seen: Counter[int] = Counter()
        for step in range(4 * epoch + 1, 4 * epoch + 5):
            path = tmp_path / "cut" / "completions" / f"step-{step:06d}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            seen.update({row["group"]: row["prompt_index"] for row in rows}.values())
        assert seen == Counter(range(NUM_TRAINED))


@pytest.mark.parametrize("named", [True, False], ids=["named", "the later ones damaged"])
def test_going_on_from_an_older_checkpoint_keeps_what_is_saved_from_there(named: bool, tmp_path: Path) -> None:
    """Checkpoints of later steps are neither the newest of the run that goes on, nor do they push its own out."""

    class Killed(Exception):
        pass

    def run(resume: bool | Path = False, stop: int = 0, limit: int | None = 1) -> None:
        changes = {"save_steps": 1, "save_total_limit": limit, "reward_in_process": True}
        trainer = make({"out": str(tmp_path), "name": "r", "changes": changes})
        trainer.add_callback(Steps(before=raising(Killed, stop)))
        trainer.train(resume=resume)

    run(limit=None)
    saved, whole = tmp_path / "r" / "checkpoints", (lines(tmp_path / "r"), weights(tmp_path / "r"))
    for step in () if named else (3, 4, 5, 6):
        (saved / f"step-{step:06d}" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(Killed):
        run(saved / "step-000002" if named else True, stop=5)
    assert checkpoint_files.whole(saved) == [4]
    assert (saved / "step-000006.replaced" / "manifest.json").exists()
    run(resume=True)
    assert (lines(tmp_path / "r"), weights(tmp_path / "r")) == whole


def test_a_run_that_goes_on_reports_seconds_curves_and_the_first_pass_rate_of_the_whole_run(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_on_start": True, "reward_in_process": True}
    options = {"out": str(tmp_path), "name": "r", "changes": changes}
    first = make(options)
    inject(first, "raise", 3)
    with pytest.raises(RuntimeError, match="injected"):
        first.train()
    folder = tmp_path / "r"
    before = json.loads((folder / "before.json").read_text())["greedy"]["mean"]
    out = io.StringIO()
    live = LiveTerminal(console=Console(file=out, force_terminal=True, width=100, height=50))
    again = make(options, terminal=live)
    summary = again.train(resume=True)

    seconds, steps = summary["seconds_by_phase"], read_metrics(folder / "metrics.jsonl")
    for phase in ("sample", "update"):
        assert seconds[phase] == pytest.approx(sum(line[f"seconds/{phase}"] for line in steps), abs=0.01)
    own = again.context.clock.seconds["load"] - first.context.clock.seconds["load"]
    assert 0 < own < seconds["load"]
    assert live.board is not None
    assert [step for step, _ in live.board.history["reward"]] == [1, 2, 3, 4]
    assert live.board.history["pass rate"] == [
        (0, before),
        (2, steps[1]["eval/greedy"]),
        (4, summary["pass_rate_after"]),
    ]
    assert "Before the first step" in out.getvalue()
    assert f"{summary['seconds_total'] / 60:.1f} minutes" in (folder / "report.html").read_text()
