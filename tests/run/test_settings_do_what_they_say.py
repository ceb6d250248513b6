"""Single settings of a run, each by a fact that it must leave or change in what the run writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.metrics import read_metrics
from llm_pg.sampling.native import NativeSampler
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]
SMALL = {
    "max_steps": 3,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_eval_prompts": 4,
    "eval_num_samples": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "reward_in_process": True,
    "run_name": "r",
    "overwrite": True,
}


def letters(completion: str, **row: Any) -> float:
    return sum(c.isalpha() for c in completion) / 4


@pytest.fixture
def run(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def go(**changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        trainer = GRPOTrainer(
            model=make_model("llama"),
            reward_funcs=letters,
            args=GRPOConfig(str(tmp_path), **{**SMALL, **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        )
        trainer.train()
        return trainer.folder.path, read_metrics(trainer.folder.metrics)

    return go


def numbers(lines: list[dict[str, Any]]) -> list[float]:
    return [line[name] for line in lines for name in ("reward", "grad_norm", "entropy")]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 3},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "prompts_per_step": None},
        {"packing": "padded"},
        {"rollout_batch_size": 4},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_concerns_only_memory_and_speed_leaves_the_run(changes: dict[str, Any], run: Callable[..., Any]) -> None:
    engine = "native" if "rollout_batch_size" in changes else "transformers"  # generate's draws hang on its batch
    expected = numbers(run(engine=engine)[1])
    assert numbers(run(engine=engine, **changes)[1]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_evaluations_sample_at_most_the_completions_they_are_told_at_once(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sample = [], NativeSampler.sample  # type: list[int], Any

    def counted(self: Any, prompt_ids: Any, num_generations: int, *given: Any) -> Any:
        rows.append(len(prompt_ids) * num_generations)
        return sample(self, prompt_ids, num_generations, *given)

    monkeypatch.setattr(NativeSampler, "sample", counted)
    settings = {"engine": "native", "max_steps": 1, "num_eval_prompts": 5, "eval_num_samples": 3, "pass_threshold": 0.5}
    told = []
    for at_once, most in ((1024, 16), (6, 16), (2, 16)):
        rows.clear()
        folder, _ = run(eval_batch_size=at_once, **settings)
        told.append(json.loads((folder / "summary.json").read_text()))
        before, after = rows[: rows.index(most)], rows[rows.index(most) + 1 :]
        assert before == after == {1024: [5, 15], 6: [5, 6, 6, 3], 2: [2, 2, 1, 3, 3, 3, 3, 3]}[at_once]
    shares = [{name: value for name, value in each.items() if name.startswith("pass")} for each in told]
    assert shares[0] == shares[1] == shares[2]
    assert shares[0]["pass_rate_after"] > 0


def test_bfloat16_autocast_runs_and_the_gap_to_the_sampler_is_in_the_metrics(run: Callable[..., Any]) -> None:
    _, lines = run(bf16=True)
    _, exact = run()
    assert all(0 < line["grad_norm"] < 100 for line in lines)
    assert all(line["sampler_gap"] < 0.05 for line in lines)
    assert max(line["sampler_gap"] for line in exact) < 1e-5


def test_masked_truncated_completions_have_weight_zero_and_penalised_ones_a_lower_weight(
    run: Callable[..., Any],
) -> None:
    def truncated_weights(**changes: Any) -> list[float]:
        folder, _ = run(max_steps=1, scale_rewards="none", **changes)
        rows = map(json.loads, (folder / "completions" / "step-000001.jsonl").read_text().splitlines())
        return [w for row in rows if row["truncated"] for w in row["tokens"]["weight"]]

    kept = truncated_weights()
    assert any(kept)
    assert not any(truncated_weights(truncated="mask"))
    assert not any(truncated_weights(mask_truncated_completions=True))
    penalised = truncated_weights(truncated="penalize", truncation_penalty=0.5)
    assert all(p <= k + 1e-6 for p, k in zip(penalised, kept, strict=True))


def test_the_entropy_bonus_moves_linearly_to_its_final_weight(run: Callable[..., Any]) -> None:
    _, lines = run(entropy_coef=0.3, entropy_coef_final=0.0)
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.3, 0.2, 0.1])


def test_the_learning_rate_warms_up_and_falls_linearly(run: Callable[..., Any]) -> None:
    _, lines = run(max_steps=6, warmup_steps=2, lr_scheduler_type="linear")
    expected = [0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)


def test_clipping_bounds_the_step_and_reports_the_norm_before(run: Callable[..., Any]) -> None:
    free, held = run(max_grad_norm=0.0)[1], run(max_grad_norm=1e-4)[1]
    assert held[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-5)


def test_a_launchers_accumulation_steps_do_not_divide_the_gradient(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(max_steps=1)[1]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # which accelerate reads
    assert run(max_steps=1)[1][0]["grad_norm"] == alone[0]["grad_norm"]


def test_without_beta_there_is_no_reference_and_with_it_the_kl_grows_from_zero(run: Callable[..., Any]) -> None:
    assert "kl" not in run()[1][0]
    lines = run(beta=0.01, learning_rate=1e-2, max_steps=4)[1]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert lines[-1]["kl"] > 1e-4


@pytest.mark.parametrize("changes", [{"top_k": 20, "temperature": 0.8}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_sampler_and_trainer_agree_under_every_filter(changes: dict[str, Any], run: Callable[..., Any]) -> None:
    assert max(line["sampler_gap"] for line in run(**changes)[1]) < 1e-4


def test_transformers_generate_can_sample_instead(run: Callable[..., Any]) -> None:
    _, lines = run(engine="transformers")
    assert max(line["sampler_gap"] for line in lines) < 1e-5


def test_tensorboard_gets_what_the_metrics_file_has(run: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, lines = run(report_to=["tensorboard"])
    events = next(path.parent for path in folder.parent.rglob("events.out.tfevents*") if path.stat().st_size > 500)
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.value for event in read.Scalars("reward")] == pytest.approx([line["reward"] for line in lines])


def test_only_the_tokens_of_largest_entropy_keep_their_weight(run: Callable[..., Any]) -> None:
    def rows(**changes: Any) -> list[dict[str, Any]]:
        folder, _ = run(max_steps=1, beta=0.1, prompts_per_step=8, **changes)
        return [json.loads(line) for line in (folder / "completions" / "step-000001.jsonl").read_text().splitlines()]

    whole, kept = rows(), rows(top_entropy_quantile=0.25)
    tokens = [token for row in whole for token in zip(row["tokens"]["entropy"], row["tokens"]["weight"], strict=True)]
    least = sorted(entropy for entropy, _ in tokens)[-len(tokens) // 4]
    expected = [weight if entropy >= least else 0.0 for entropy, weight in tokens]
    told = [weight for row in kept for weight in row["tokens"]["weight"]]
    assert 0 < sum(map(bool, told)) < 0.5 * sum(bool(weight) for _, weight in tokens)
    differ = sum(a != pytest.approx(b, abs=1e-4) for a, b in zip(told, expected, strict=True))
    assert differ <= 1  # the token at the quantile itself


def test_fp16_on_a_cpu_computes_in_float16_under_a_loss_scale(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model, types = make_model("llama"), set()

    def hears(module: Any, inputs: Any, output: torch.Tensor) -> None:
        types.update({output.dtype} if output.requires_grad else {})

    model.model.layers[0].mlp.down_proj.register_forward_hook(hears)
    args = GRPOConfig(str(tmp_path), **SMALL, fp16=True, save_steps=3)
    quiet = Terminal(quiet=True)
    trainer = GRPOTrainer(
        model=model, reward_funcs=letters, args=args, train_dataset=ROWS, processing_class=tokenizer, terminal=quiet
    )
    types.clear()  # of trials in other types
    trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert types == {torch.float16}
    assert all(line["sampler_gap"] < 0.01 for line in lines)
    numbers = json.loads((trainer.folder.checkpoints / "step-000003" / "numbers.json").read_text())
    assert numbers["scaler"]["scale"] > 1
