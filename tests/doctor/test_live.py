"""Every live rule fires on a run's folder that shows its symptom and is silent on the run without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_pg.config import ConfigError, load_config
from llm_pg.doctor import LIVE_RULES, examine_run
from llm_pg.doctor.evidence import read_run

STEPS = 60
HEALTHY = {
    "reward": lambda t: 0.3 + 0.3 * t,
    "reward_std": lambda t: 0.45,
    "uniform_groups": lambda t: 0.3,
    "unscorable": lambda t: 0.0,
    "truncated": lambda t: 0.02,
    "completion_length": lambda t: 40.0,
    "kl": lambda t: 0.05 * t,
    "entropy": lambda t: 0.8 - 0.3 * t,
    "entropy_coef": lambda t: 0.0,
    "clip_fraction": lambda t: 0.01,
    "sampler_gap": lambda t: 1e-6,
    "grad_norm": lambda t: 0.7,
    "skipped_updates": lambda t: 0.0,
    "reward/right": lambda t: 0.3 + 0.3 * t,
    "reward/format": lambda t: 0.5 + 0.3 * t,
}
BEFORE = {"greedy": {"mean": 0.4, "low": 0.35, "high": 0.45}, "num_prompts": 256}


def write_run(folder: Path, changes: dict[str, Any], rows: list[dict[str, Any]] | None = None, **summary: Any) -> Path:
    """A run's folder: metrics are functions of t, the share of the run that is done."""
    folder.mkdir(parents=True)
    config = load_config(None, ["data.task=sort_letters", f"max_steps={STEPS}"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    curves = {**HEALTHY, **changes}
    lines = [{"step": s, **{name: f((s - 1) / (STEPS - 1)) for name, f in curves.items()}} for s in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "before.json").write_text(json.dumps(BEFORE))
    (folder / "summary.json").write_text(json.dumps({"pass_rate_after": 0.6, **summary}))
    (folder / "completions").mkdir()
    some = rows if rows is not None else [{"reward": 0.0}, {"reward": 1.0}]
    (folder / "completions" / "step-000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def constant(value: float) -> Any:
    return lambda t: value


# rule -> (what makes it fire, the nearest run on which it must be silent)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uniform-groups": (
        {"uniform_groups": constant(0.9), "reward": constant(0.05)},
        {"uniform_groups": constant(0.9), "reward": constant(0.97)},
    ),
    "truncation": ({"truncated": constant(0.4)}, {"truncated": lambda t: 0.4 * (1 - t)}),
    "entropy-collapse": (
        {"entropy": lambda t: 0.5 * (1 - t)},
        {"entropy": lambda t: 0.5 * (1 - t), "reward": lambda t: 0.3 + 0.65 * t},
    ),
    "kl-runaway": ({"kl": lambda t: 0.01 * 1000**t}, {"kl": lambda t: min(1.5, 15 * t)}),
    "sampler-drift": ({"sampler_gap": constant(0.1)}, {"sampler_gap": constant(0.01)}),
    "clipped": ({"clip_fraction": constant(0.5)}, {"clip_fraction": constant(0.1)}),
    "noisy-gradient": (
        {"gradient_signal": constant(0.001), "gradient_noise": constant(1.0)},
        {"gradient_signal": constant(0.1), "gradient_noise": constant(1.0)},
    ),
    "unscorable": ({"unscorable": constant(0.1)}, {"unscorable": constant(0.001)}),
    "skipped-updates": ({"skipped_updates": lambda t: float(t == 0)}, {"skipped_updates": constant(0.0)}),
    "format-only": (
        {"reward/right": constant(0.1), "reward/format": lambda t: 0.2 + 0.7 * t},
        {"reward/right": lambda t: 0.1 + 0.2 * t, "reward/format": lambda t: 0.2 + 0.7 * t},
    ),
    "form-ignored": ({"eval/strict": constant(0.1)}, {"eval/strict": constant(0.55)}),  # 0.6 pass at the end
    "reward-hacking": ({}, {}),
    "threshold-unreached": ({"eval/highest_score": constant(0.7)}, {"eval/highest_score": constant(1.0)}),
    "no-gradient": ({"grad_norm": constant(0.0)}, {"grad_norm": constant(1e-4)}),
}
SUMMARIES = {"reward-hacking": ({"pass_rate_after": 0.2}, {"pass_rate_after": 0.36})}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(LIVE_RULES)


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_fires_on_its_symptom_and_no_other_does(rule: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CASES[rule][0], **SUMMARIES.get(rule, ({},))[0])
    findings = examine_run(run)
    assert [finding.rule for finding in findings] == [rule]
    assert all(len(t) > 10 for f in findings for t in (f.cause, f.evidence, f.change, f.source))


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_is_silent_on_the_nearest_run_without_it(rule: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CASES[rule][1], **SUMMARIES.get(rule, ({}, {}))[1])
    assert examine_run(run) == []


def test_a_strict_score_that_rises_alone_is_format_only(tmp_path: Path) -> None:
    rises, stays = {"log/strict": lambda t: 0.8 * t}, {"log/lenient": constant(0.6)}
    assert [f.rule for f in examine_run(write_run(tmp_path / "a", {**rises, **stays}))] == ["format-only"]
    both = {**rises, "log/lenient": lambda t: 0.3 + 0.6 * t}
    assert examine_run(write_run(tmp_path / "b", both)) == []


def test_a_reward_with_another_range_is_solved_at_its_own_top(tmp_path: Path) -> None:
    low, top = [{"reward": -1.0}, {"reward": 1.0}], {"uniform_groups": constant(0.9), "reward": constant(-0.9)}
    assert [f.rule for f in examine_run(write_run(tmp_path / "run", top, low))] == ["uniform-groups"]


def test_the_groups_of_a_step_are_counted_where_the_batch_was_given_in_passes(tmp_path: Path) -> None:
    """8 completions × 32 passes on two ranks in groups of 8: 64 groups, of whose gradients one tells enough."""
    noise = {"gradient_signal": constant(0.01), "gradient_noise": constant(1.0), "tokens": constant(512 * 40.0)}
    run = write_run(tmp_path / "run", noise)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"] |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 32}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(run).prompts_per_step == 64
    assert examine_run(run) == []
    few = write_run(tmp_path / "few", {**noise, "tokens": constant(64 * 40.0)})
    (finding,) = examine_run(few)
    assert (finding.rule, "8 groups a step" in finding.evidence) == ("noisy-gradient", True)


def test_groups_without_differences_are_not_silent_where_a_teacher_speaks(tmp_path: Path) -> None:
    given = {**CASES["uniform-groups"][0], "teacher_kl": constant(0.3)}
    assert examine_run(write_run(tmp_path / "run", given)) == []


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "opo", "pass_at_k"])
def test_groups_without_differences_are_found_under_every_group_baseline(algorithm: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CASES["uniform-groups"][0])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["algorithm"]["name"] = algorithm
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert [finding.rule for finding in examine_run(run)] == ["uniform-groups"]


def test_a_policy_that_waits_for_its_critic_is_not_a_gradient_of_zero(tmp_path: Path) -> None:
    waits = {"grad_norm": constant(0.0), "critic_grad_norm": constant(0.5), "learning_rate": constant(0.0)}
    assert examine_run(write_run(tmp_path / "warm-up", waits)) == []
    late = write_run(tmp_path / "after", {**waits, "learning_rate": constant(1e-3)})
    assert [f.rule for f in examine_run(late)] == ["no-gradient"]


def test_a_run_of_few_steps_gets_no_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"truncated": constant(1.0), "grad_norm": constant(0.0)})
    lines = (run / "metrics.jsonl").read_text().splitlines()[:3]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert examine_run(run) == []


def test_a_line_half_written_by_a_running_process_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"truncated": constant(0.4)})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "trunc')
    (run / "summary.json").write_text('{"pass_ra')
    assert [f.rule for f in examine_run(run)] == ["truncation"]


def test_a_folder_of_runs_is_answered_with_their_names(tmp_path: Path) -> None:
    write_run(tmp_path / "first", {})
    with pytest.raises(ConfigError, match=r"no config\.yaml.*first"):
        examine_run(tmp_path)
