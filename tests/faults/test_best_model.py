"""The best model by a held-out metric is kept, survives a kill, and can take the place of the last."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_pg import GRPOConfig
from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.evaluate import Evaluation, Interval
from llm_pg.run.evaluator import Evaluator
from llm_pg.run.saving.best import Best, load_weights
from llm_pg.run.saving.folder import RunFolder
from llm_pg.terminal import Terminal
from tests.faults import tiny_run

CHANGES = {"eval_steps": 1, "metric_for_best_model": "eval/length", "greater_is_better": False, "save_steps": 2}


def of(greedy: float) -> Evaluation:
    return Evaluation(4, Interval(greedy, greedy, greedy), None, {}, 3.0, 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("greater", "kept"), [(True, 3), (False, 2)])
def test_the_best_is_kept_and_a_tie_keeps_the_earlier(greater: bool, kept: int, tmp_path: Path) -> None:
    saved: list[Path] = []

    def save(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text(str(len(saved)))
        saved.append(path)

    best = Best(tmp_path / "best", "eval/greedy", greater, save)
    for step, value in enumerate([0.5, 0.5, 0.2, 0.9, 0.9, 0.2]):
        best.observe(step, of(value))
    assert best.step == kept
    assert (tmp_path / "best" / "weights").read_text() == str(len(saved) - 1)
    again = Best(tmp_path / "best", "eval/greedy", greater, save)
    again.recall(newest_step=5)
    assert (again.step, again.value, again.evaluation) == (kept, best.value, best.evaluation)
    future = Best(tmp_path / "best", "eval/greedy", greater, save)
    future.recall(newest_step=kept - 1)
    assert future.step is None


def test_a_kill_while_the_best_is_replaced_leaves_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each removal and each renaming in turn: what a resumed run recalls has its weights."""

    def save(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("whole")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def made(folder: Path) -> Best:
        return Best(folder, "eval/greedy", True, save)

    remove, rename = shutil.rmtree, Path.rename
    for at in range(5):
        best, calls = made(tmp_path / str(at) / "best"), iter([*[None] * at, killed])
        best.folder.parent.mkdir()
        best.observe(1, of(0.5))
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(shutil, "rmtree", lambda *given, **n: (next(calls, None) or remove)(*given, **n))  # noqa: B023
            patched.setattr(Path, "rename", lambda *given: (next(calls, None) or rename)(*given))  # noqa: B023
            best.observe(2, of(0.9))
        again = made(best.folder)
        again.mend()
        again.recall(newest_step=2)
        assert again.step in (1, 2)
        assert (again.folder / "weights").read_text() == "whole"
        assert again.observe(3, of(0.95))


def test_a_full_disk_leaves_the_best_before_and_the_run_goes_on(tmp_path: Path) -> None:
    room = True

    def save(path: Path) -> None:
        path.mkdir()
        if not room:
            raise OSError(28, "No space left on device")
        (path / "weights").write_text("whole")

    best = Best(tmp_path / "best", "eval/greedy", True, save)
    assert best.observe(1, of(0.5))
    room = False
    assert not best.observe(2, of(0.9))
    assert (best.step, best.value, best.problem) == (1, 0.5, "No space left on device")
    assert (tmp_path / "best" / "weights").read_text() == "whole"
    room = True
    assert best.observe(3, of(0.8))
    assert (best.step, best.problem) == (3, "")


def test_all_ranks_judge_by_the_evaluation_of_the_first() -> None:
    """A reward that is late on one rank alone must not make that one alone save: shards are saved by all together."""
    seen: list[Evaluation] = []
    ranks = SimpleNamespace(together=lambda work: work(), gather=lambda value: [(of(0.9), {}), value])
    config = check_values({"num_eval_prompts": 1})
    context: Any = SimpleNamespace(ranks=ranks, config=config, folder=RunFolder(config), terminal=Terminal.silent())
    policy: Any = SimpleNamespace(gathered=contextlib.nullcontext)
    callbacks: Any = SimpleNamespace(by_name=None)
    second_rank = Evaluator(context, None, [None], policy, None, callbacks)  # type: ignore[arg-type, list-item]
    second_rank.evaluate = lambda title="", prompts=None: of(0.1)  # type: ignore[method-assign]
    second_rank.best = SimpleNamespace(observe=lambda _, result: seen.append(result), problem="")  # type: ignore[assignment]
    result = second_rank.after_training(1)
    assert result is not None
    assert result.greedy.mean == 0.9
    assert seen == [of(0.9)]


@pytest.mark.parametrize(("algorithm", "lora"), [("grpo", False), ("grpo", True), ("ppo", False), ("ppo", True)])
def test_a_run_ends_with_its_best_model(algorithm: str, lora: bool, tmp_path: Path) -> None:
    changes = {"eval_steps": 1, "load_best_model_at_end": True}
    if algorithm == "ppo":
        changes |= {"critic_kind": "model"}
    given = {"out": str(tmp_path), "name": "r", "changes": changes, "lora": lora, "algorithm": algorithm}
    trainer = tiny_run.make(given)
    kept: dict[str, torch.Tensor] = {}
    evaluate = trainer.evaluator.evaluate

    def noted(title: str) -> Evaluation:
        """Step 2 is made the best, whatever the model says."""
        result = evaluate(title)
        result.greedy = Interval(0.99, 0.9, 1.0) if title == "Step 2" else Interval(0.1, 0.0, 0.2)
        if title == "Step 2":
            kept.update({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        return result

    trainer.evaluator.evaluate = noted  # type: ignore[method-assign]
    summary = trainer.train()
    assert json.loads((trainer.folder.best / "best.json").read_text())["step"] == 2
    assert summary["pass_rate_after"] == 0.99
    last = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert kept.keys() == last.keys()
    assert all(torch.equal(last[name], value) for name, value in kept.items())
    if algorithm == "ppo":  # the critic of that step too, not of the last
        best, told = (
            load_file(folder / "critic.safetensors") for folder in (trainer.folder.best, trainer.folder.model)
        )
        assert all(torch.equal(best[name], value) for name, value in told.items())


def test_a_run_that_was_killed_keeps_the_same_best(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    whole = tiny("whole", changes=CHANGES)
    assert whole.status == 0, whole.output
    assert tiny("cut", changes=CHANGES, fault="kill", at=5).status == -9
    ended = tiny("cut", changes=CHANGES, resume=True)
    assert ended.status == 0, ended.output
    one, other = (json.loads((tmp_path / n / "best" / "best.json").read_text()) for n in ("whole", "cut"))
    assert one == other
    first, second = (weights(tmp_path / n / "best") for n in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


MOE = {"model_type": "qwen3_moe", "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", {}), ("gpt2", {}), ("llama", MOE)])
def test_saved_weights_come_back_to_the_bit(
    family: str, changes: dict[str, Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """A tied head stands once in the file, experts one by one; the model holds them otherwise."""
    saved, other = make_model(family, **changes), make_model(family, seed=1, **changes)
    saved.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in saved.state_dict().items())


def test_a_metric_that_no_evaluation_gives_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="eval/greedy"):
        GRPOConfig(metric_for_best_model="eval/gready")
    with pytest.raises(ConfigError, match="pass@8"):
        GRPOConfig(metric_for_best_model="eval/pass@8", eval_num_samples=4)
    with pytest.raises(ConfigError, match="num_eval_prompts"):
        GRPOConfig(load_best_model_at_end=True, num_eval_prompts=0)


def test_a_finished_run_that_is_resumed_still_has_its_steps_and_its_best_model(tmp_path: Path) -> None:
    def ended(resume: bool) -> Any:
        changes = {"eval_steps": 1, "eval_on_start": True, "load_best_model_at_end": True, "save_steps": 2}
        given = {"out": str(tmp_path), "name": "r", "changes": {**changes, "max_steps": 2}}
        trainer = tiny_run.make(given)
        evaluate = trainer.evaluator.evaluate

        def noted(title: str) -> Evaluation:
            """The model that was not trained at all is made the best."""
            result = evaluate(title)
            result.greedy = Interval(0.99, 0.9, 1.0) if title == "Before" else Interval(0.1, 0.0, 0.2)
            return result

        trainer.evaluator.evaluate = noted  # type: ignore[method-assign]
        return trainer.train(resume=resume), weights(trainer.folder.model)

    (first, kept), (second, again) = ended(False), ended(True)
    assert first["steps"] == second["steps"] == 2
    assert first["pass_rate_after"] == second["pass_rate_after"] == 0.99
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_reading_that_the_task_does_not_have_ends_the_run_at_the_first_evaluation(tmp_path: Path) -> None:
    best = Best(tmp_path / "best", "eval/strict", True, lambda path: None)
    with pytest.raises(ConfigError, match=r"eval/strict.*gives eval/greedy"):
        best.observe(0, of(0.5))
