"""Whole runs: what is learned, what is refused, what is written, and the command line."""

from __future__ import annotations

import argparse
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from curves import band, episode_band

from llm_pg.control import cli
from llm_pg.control.adviser import advise, check, collapsed
from llm_pg.control.environments import inspect
from llm_pg.control.prepare import prepare
from llm_pg.control.record import ControlRun, reward_hacking
from llm_pg.control.runs import train_in_folder, train_seeds
from llm_pg.control.settings import SPECS, resolve
from llm_pg.control.train import train
from llm_pg.doctor import examine_run
from llm_pg.doctor.evidence import read_run
from llm_pg.metrics import metric, read_metrics
from llm_pg.report import write_report
from llm_pg.report.charts import charts

CART = inspect("CartPole-v1")
PENDULUM = inspect("Pendulum-v1")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(words))


# --- learning


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_passes_195_on_cartpole_within_20_000_steps(seed: int) -> None:
    """Mean return of 40 episodes; a random push lasts 22 steps."""
    changes = {"threshold": 195.0, "window": 40, "total_steps": 20_000, "stop_when_solved": True}
    run = train(resolve("cartpole", "ppo", seed=seed, **changes))
    assert run.solved_steps is not None


def test_reinforce_learns_the_best_arm_of_the_bandit() -> None:
    run = train(resolve("bandit", "reinforce", baseline="running_mean", total_steps=8_000))
    assert run.policy is not None
    probability = run.policy.actor[0].weight[:, 0].detach().softmax(0)
    assert int(probability.argmax()) == int(np.random.default_rng(0).standard_normal(10).argmax())
    assert float(probability.max()) > 0.8


@pytest.mark.parametrize("algorithm", sorted(SPECS.keys() - {"a3c"}))
def test_every_row_of_the_table_improves_on_the_grid(algorithm: str) -> None:
    """After 400 episodes the mean return of the last 50 is far above that of a random walk, -3.2."""
    run = train(resolve("gridworld", algorithm, total_episodes=400, window=50))
    assert run.points[-1]["return_mean"] > -1.5


def test_the_same_seed_makes_the_same_run_and_another_seed_another() -> None:
    def returns(seed: int) -> list[float]:
        return train(resolve("cartpole", "a2c", seed=seed, total_steps=1_500)).returns

    torch.manual_seed(123)
    first = returns(4)
    torch.manual_seed(456)  # nothing of a run hangs on the state outside it
    assert returns(4) == first != returns(5)


def test_a_run_leaves_the_state_of_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    train(resolve("cartpole", "a2c", total_steps=300))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_asynchronous_workers_learn_and_their_staleness_is_counted() -> None:
    run = train(resolve("cartpole", "a3c", num_workers=2, total_steps=6_000))
    assert len(run.staleness) > 50
    assert min(run.staleness) >= 0
    # A worker waits for nobody, so updates of the other one come in between: about one each in the mean.
    assert 0 < np.mean(run.staleness) < 8
    assert sum(run.lengths) <= run.steps
    assert run.points[-1]["return_mean"] > 22


def test_a_worker_that_fails_is_heard() -> None:
    settings = resolve("cartpole", "a3c", num_workers=1, total_steps=500, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises((RuntimeError, FloatingPointError)):
        train(settings)


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_cause() -> None:
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        train(resolve("cartpole", "ppo", reward_scale=1e25, total_steps=3_000))


# --- refusals


REFUSED = [
    ("MountainCarContinuous-v0", "reinforce", {}, "over 500 the variance"),
    ("Pendulum-v1", "ppo", {"head": "softmax"}, "softmax head chooses"),
    ("CartPole-v1", "ppo", {"head": "gaussian"}, "discrete actions"),
    ("CartPole-v1", "reinforce", {"num_steps": 8}, "whole episodes"),
    ("CartPole-v1", "rloo", {"group_size": 1}, "nothing to compare"),
    ("CartPole-v1", "rloo", {"num_envs": 10}, "groups of 8"),
    ("CartPole-v1", "a2c", {"num_epochs": 4}, "stale"),
    ("CartPole-v1", "ppo", {"num_workers": 2}, "take a3c"),
    ("CartPole-v1", "ppo", {"gamma": 1.5}, "gamma cannot be 1.5; it must be above 0 and at most 1"),
    ("CartPole-v1", "ppo", {"learning_rate": math.nan}, "learning_rate"),
    ("CartPole-v1", "reinforce", {"baseline_per_step": True}, "leave_one_out or group_mean"),
    ("CartPole-v1", "ppo", {"num_envs": 1, "num_steps": 2, "num_minibatches": 8}, "fewer minibatches"),
]


@pytest.mark.parametrize("env, algorithm, changes, words", REFUSED)
def test_what_cannot_work_is_refused(env: str, algorithm: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(resolve(env, algorithm, **changes))


def test_an_environment_without_a_time_limit_cannot_be_asked_for_whole_episodes() -> None:
    endless = CART.__class__(**{**CART.__dict__, "horizon": None})
    with pytest.raises(ValueError, match="may never end"):
        check(resolve("cartpole", "reinforce", baseline="value"), endless)
    check(resolve("cartpole", "a2c"), endless)


def test_force_goes_on_where_it_is_only_unwise() -> None:
    mountain = inspect("MountainCarContinuous-v0")
    check(resolve("mountaincar", "reinforce", force=True), mountain)
    check(resolve("mountaincar", "reinforce", baseline="value"), mountain)
    check(resolve("cartpole", "reinforce"), CART)  # 500 steps are not over 500


@pytest.mark.parametrize(
    "make, near",
    [
        (lambda: resolve("cartpole", "reinfroce"), "Did you mean 'reinforce'"),
        (lambda: resolve("cartpole", "ppo", learning_rat=0.1), "Did you mean 'learning_rate'"),
    ],
)
def test_an_unknown_word_gets_the_nearest_one(make: Any, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        make()


def test_entropy_collapse_is_flagged_without_a_bonus_and_for_discrete_actions_only() -> None:
    assert collapsed(resolve("cartpole", "ppo"), CART, 0.09)
    assert not collapsed(resolve("cartpole", "ppo"), CART, 0.11)
    assert not collapsed(resolve("cartpole", "ppo", entropy_coef=0.01), CART, 0.09)
    assert not collapsed(resolve("pendulum", "ppo"), PENDULUM, -1.0)
    run = train(resolve("sigmoid-bandit", "reinforce", total_steps=2_000, learning_rate=2.0))
    assert [finding.rule for finding in run.findings] == ["entropy-collapse"]


def test_the_adviser_knows_the_head_and_the_algorithm() -> None:
    advice = {
        name: {a.setting: a.value for a in advise(inspect(name))} for name in ("llm_pg/GridWorld-v0", "Pendulum-v1")
    }
    assert advice["llm_pg/GridWorld-v0"]["algorithm"] == "reinforce"
    assert advice["llm_pg/GridWorld-v0"]["baseline"] == "running_mean"
    assert advice["Pendulum-v1"]["algorithm"] == "ppo"
    assert advice["Pendulum-v1"]["head"] == "gaussian"


# --- what is reported


def test_reward_hacking_is_found_by_the_true_return() -> None:
    run = train(resolve("hackable-gridworld", "reinforce", baseline="running_mean", total_episodes=600))
    assert "reward-hacking" in [finding.rule for finding in run.findings]
    assert run.points[-1]["return_mean"] > 2.0
    assert run.points[-1]["true_return_mean"] < -2.0


def _points(trained: list[float], true: list[float]) -> list[dict[str, float]]:
    return [
        {"steps": float(i), "return_mean": a, "true_return_mean": b}
        for i, (a, b) in enumerate(zip(trained, true, strict=True))
    ]


def test_a_true_return_that_rises_with_the_trained_one_is_no_hacking() -> None:
    up, down = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 1.0, 0.0, -1.0, -1.0, -1.0]
    assert reward_hacking(_points(up, up)) is None
    assert reward_hacking(_points(down, down)) is None  # both fall: it learns nothing, it hacks nothing
    found = reward_hacking(_points(up, down))
    assert found is not None
    assert "from 0.50 to 6.50" in found.evidence


def test_a_band_is_the_median_and_quartiles_of_the_seeds() -> None:
    curves = [[{"steps": 0.0, "x": 0.0}, {"steps": 10.0, "x": float(k)}] for k in range(5)]
    found = band(curves, "x", num_columns=11)
    assert found is not None
    assert found.median[-1] == 2.0
    assert found.low[-1] == 1.0
    assert found.high[-1] == 3.0
    assert found.median.tolist() == pytest.approx(np.linspace(0, 2, 11).tolist())
    assert band(curves, "y") is None


def test_episode_bands_are_means_and_deviations_of_a_window() -> None:
    mean, std = episode_band([[0.0, 2.0, 4.0, 6.0]], 2)
    assert mean.median.tolist() == [1.0, 3.0, 5.0]
    assert std.median.tolist() == [1.0, 1.0, 1.0]
    assert mean.steps.tolist() == [2, 3, 4]


# --- the command line


def test_a_command_trains_and_writes_a_run_folder_of_the_main_track(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ("gridworld", "--algorithm", "reinforce", "--baseline", "running_mean", "--total-episodes", "60")
    assert command(*words, "--folder", str(folder)) == 0
    said = capsys.readouterr().out
    assert "mean of the last 100 episodes" in said
    assert "steps a second" in said
    assert "episodes 60/60  return" in said  # a line of the terminal, which counts what ends the run
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[-1]["episodes"] >= 60
    assert lines[-1]["step"] == 60  # one episode an update
    assert lines[-1]["progress"] == 1.0
    assert all(metric(name) or name == "nan" for line in lines for name in line)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["algorithm"]["baseline"] == "running_mean"
    assert settings["run"] == {"seed": 0}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["episodes"] == lines[-1]["episodes"]
    assert sum(summary["seconds_by_phase"].values()) == pytest.approx(summary["seconds_total"], abs=0.01)
    replay = (folder / "replay.txt").read_text()
    assert "the policy" in replay
    assert "@" in replay
    page = (folder / "report.html").read_text()
    assert "Return" in page
    assert "The run goes on." not in page
    (session,) = [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]
    assert session["host"] == socket.gethostname()
    assert "Where the numbers come from" in page
    assert session["versions"]["torch"] in page


def test_a_control_run_that_is_interrupted_has_a_page_that_says_so(tmp_path: Path) -> None:
    seen: list[str] = []

    def interrupt(point: Any) -> None:
        seen.append((tmp_path / "r" / "report.html").read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_folder(resolve("sigmoid-bandit", "reinforce", total_steps=200), tmp_path / "r", on_point=interrupt)
    assert "Waiting for the first step." in seen[0]  # there from the beginning
    assert "Interrupted from the keyboard." in (tmp_path / "r" / "report.html").read_text()


def test_a_folder_that_holds_a_run_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sigmoid-bandit", "--total-steps", "100", "--plain", "--folder", str(tmp_path / "run"))
    assert command(*words) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert command(*words, "--seed", "5") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert command(*words, "--seed", "5", "--overwrite") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed"] == 5


def test_seeds_side_by_side_are_the_same_runs_as_one_by_one(tmp_path: Path) -> None:
    settings = resolve("cartpole", "a2c", total_steps=1_200, seed=3)
    heard: list[int] = []
    together = train_seeds(
        settings, 2, folder=tmp_path / "run", num_processes=2, on_point=lambda number, point: heard.append(number)
    )
    alone = [train(resolve("cartpole", "a2c", total_steps=1_200, seed=seed)) for seed in (3, 4)]
    assert [run.returns for run in together] == [run.returns for run in alone]
    for number, run in enumerate(together):
        lines = read_metrics(tmp_path / f"run-seed{3 + number}" / "metrics.jsonl")
        assert [line["steps"] for line in lines] == [point["steps"] for point in run.points]
        assert heard.count(number) == len(lines)
    assert (tmp_path / "run-seed3" / "replay.gif").read_bytes()[:3] == b"GIF"


def test_a_seed_that_fails_in_its_process_ends_the_command_with_its_cause() -> None:
    settings = resolve("cartpole", "ppo", reward_scale=1e25, total_steps=3_000)
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        train_seeds(settings, 2, num_processes=2)


def test_the_report_shows_seeds_side_by_side_with_their_median(tmp_path: Path) -> None:
    train_seeds(resolve("bandit", "reinforce", total_steps=800), 3, folder=tmp_path / "control", num_processes=1)
    folders = sorted(tmp_path.glob("control-*"))
    page = write_report(folders).read_text()
    for wanted in ("Return over seeds", "Spread of the return", "Entropy", "nats/step", "llm_pg/KArmedBandit-v0"):
        assert wanted in page, wanted
    assert "800 of 800 steps" in page
    runs = [read_run(folder) for folder in folders]
    chart = next(chart for chart in charts(runs) if chart.title == "Return over seeds")
    last = [json.loads((folder / "summary.json").read_text())["return_mean"] for folder in folders]
    assert chart.series[0].points[-1] == (800.0, pytest.approx(float(np.median(last))))
    assert chart.series[0].band[-1][1:] == pytest.approx(tuple(np.percentile(last, [25, 75])))


def test_the_doctor_reads_of_a_run_what_it_found_itself(tmp_path: Path) -> None:
    settings = resolve("sigmoid-bandit", "reinforce", total_steps=2_000, learning_rate=2.0)
    train_seeds(settings, 1, folder=tmp_path / "run")
    assert [finding.rule for finding in examine_run(tmp_path / "run")] == ["entropy-collapse"]


def test_a_gaussian_whose_entropy_is_negative_is_no_collapse(tmp_path: Path) -> None:
    settings = resolve("pendulum", "ppo", log_std=-3.0, total_steps=16_000)
    run = train_seeds(settings, 1, folder=tmp_path / "run")[0]
    assert run.points[-1]["entropy"] < 0
    assert "entropy-collapse" not in [finding.rule for finding in examine_run(tmp_path / "run")]


COMMANDS = [
    ("cartpole", "--algorithm", "ppo", "--total-steps", "2100"),
    ("cartpole", "--algorithm", "rloo", "--baseline-per-step", "--num-envs", "8", "--total-steps", "300"),
    ("cartpole", "--algorithm", "trpo_penalty", "--total-steps", "1100", "--hidden", "16"),
    ("acrobot", "--algorithm", "a2c", "--total-steps", "300", "--entropy-coef", "0.01", "--entropy-coef-final", "0"),
    ("pendulum", "--algorithm", "ppo", "--head", "tanh_gaussian", "--total-steps", "1700"),
    ("mountaincar", "--algorithm", "ppo", "--total-steps", "2100", "--threshold", "90"),
    ("sigmoid-bandit", "--total-steps", "100"),
    ("bandit", "--algorithm", "grpo", "--num-envs", "8", "--total-steps", "100"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words[:3]))
def test_each_command_runs(words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words, "--folder", str(tmp_path), "--plain") == 0
    out = capsys.readouterr().out
    assert "return, mean of the last" in out
    assert all(ord(c) < 128 for c in out.replace(str(tmp_path), ""))


BAD = [
    (("cartpol",), "Did you mean cartpole"),
    (("cartpole", "--algorithm", "poo"), "Did you mean 'ppo'"),
    (("cartpole", "--algorithm", "a2c", "--baseline", "valu"), "Did you mean 'value'"),
    (("cartpole", "--algorithm", "ppo", "--hidden", "64;64"), "widths above 0"),
    (("cartpole", "--algorithm", "ppo", "--seeds", "0"), "at least 1"),
    (("pendulum", "--algorithm", "ppo", "--head", "softmax"), "gaussian or tanh_gaussian"),
    (("mountaincar", "--algorithm", "reinforce"), "--force"),
]


@pytest.mark.parametrize("words, says", BAD, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_bad_input_ends_with_one_paragraph_and_code_2(
    words: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_gets_its_install_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    assert command("cartpole") == 2
    assert 'pip install "llm-policy-gradient[control]"' in capsys.readouterr().err


def test_advice_is_given_without_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("pendulum", "--advise") == 0
    assert "gaussian" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_whole_episodes_start_together_and_every_row_has_one() -> None:
    run, collector, _ = prepare(resolve("cartpole", "reinforce", num_envs=12))
    assert isinstance(run, ControlRun)
    stretch = collector.collect()
    assert stretch.mask_BT[:, 0].all()
    assert len(collector.episodes.returns) == 12
    assert (stretch.terminated_BT.sum(1) == 1).all()
    last_B = stretch.mask_BT.sum(1) - 1
    assert (stretch.terminated_BT.long().argmax(1) == last_B).all()
    # Steps after the end bring nothing.
    assert float((stretch.reward_BT * ~stretch.mask_BT).sum()) == 0
