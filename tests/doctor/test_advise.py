"""What `llm-pg advise` proposes can be run, and what cannot work is refused."""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_pg.advise import Task, advise, as_yaml, episodes_for, parse_range
from llm_pg.cli import main
from llm_pg.config import ConfigError, load_config
from llm_pg.control.cli import add_arguments
from llm_pg.doctor import examine_config

TOKENS = [Task("tokens", h, *r) for h in (16, 300, 4000) for r in ((None, None), (0.0, 1.0), (-200.0, 0.0))]
CONTROL = [
    Task(a, h, low, high) for a in ("discrete", "continuous") for h in (10, 300, None) for low, high in ((-200.0, 0.0),)
]


@pytest.mark.parametrize("task", TOKENS, ids=str)
def test_the_yaml_for_tokens_loads_and_the_doctor_has_nothing_against_it(task: Task, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(as_yaml(task, advise(task)))
    config = load_config(tmp_path / "a.yaml", ["data.task=sort_letters"])
    assert config.rollout.max_completion_length == task.horizon
    assert examine_config(config, memory_bytes=10**12) == []


@pytest.mark.parametrize("task", CONTROL, ids=str)
def test_the_flags_for_control_are_flags_of_the_command(task: Task) -> None:
    text = as_yaml(task, advise(task))
    command = next(line for line in text.splitlines() if line.startswith("# llm-pg control "))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = vars(parser.parse_args(shlex.split(command.removeprefix("# llm-pg control "))))
    values = yaml.safe_load(text)
    assert given["algorithm"] == values["algorithm"]
    assert given["reward_scale"] == pytest.approx(1 / 200)
    assert {name: given[name] for name in values} == values


def test_heads_baselines_and_horizon_go_together() -> None:
    long, short = (yaml.safe_load(as_yaml(t, advise(t))) for t in (Task("continuous", 300), Task("discrete", 20)))
    assert (long["head"], long["baseline"], long["num_steps"]) == ("gaussian", "value", 128)
    assert (short["head"], short["baseline"], short["num_steps"]) == ("softmax", "running_mean", 0)
    assert (short["entropy_coef"], short["entropy_coef_final"]) == (0.01, 0)


def test_the_head_is_proposed_with_its_number_of_parameters() -> None:
    """64 hidden units and a bias for each of 2 scores; 4·64 + 64 + 64·64 + 64 below them; a σ for each coordinate."""
    texts = [as_yaml(t, advise(t)) for t in (Task("discrete", 300, num_inputs=4), Task("continuous", 300))]
    assert "2 discrete actions; 130 parameters, 4,610 with hidden layers 64,64" in texts[0]
    assert "V(s) has 4,545 parameters" in texts[0]
    assert "132 parameters (with hidden layers 64,64)" in texts[1]
    tokens = Task("tokens", 300)
    assert "# policy head: softmax over the vocabulary" in as_yaml(tokens, advise(tokens))


def test_the_batch_is_the_smallest_power_of_two_that_is_precise_enough() -> None:
    for error in (0.2, 0.1, 0.03):
        number = episodes_for(error)
        assert 0.5 / math.sqrt(number) <= error < 0.5 / math.sqrt(number / 2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--horizon", "501", "--algorithm", "reinforce"], "without a baseline"),
        (["--horizon", "501", "--algorithm", "reinforce", "--baseline", "none"], "over 500"),
        (["--actions", "continuous", "--horizon", "9", "--head", "softmax"], "gaussian"),
        (["--horizon", "0"], "at least 1"),
        (["--num-actions", "0"], "--num-actions must be at least 1"),
        (["--num-inputs", "-3"], "--num-inputs must be at least 1"),
        (["--reward-range", "3:1"], "lower first"),
        (["--reward-range", "high"], "LOW:HIGH"),
    ],
)
def test_what_cannot_work_is_refused_in_a_paragraph(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_reinforce_with_a_baseline_is_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--horizon", "501", "--algorithm", "reinforce", "--baseline", "running_mean"]) == 0


def test_a_range_that_begins_with_a_minus_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--reward-range", "-200:0"], ["--reward-range=-200:0"]):
        assert main(["advise", "--horizon", "300", "--actions", "continuous", *given]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["reward_scale"] == 0.005


def test_a_range_is_read_with_its_signs() -> None:
    assert parse_range("-200:0") == (-200.0, 0.0)
    with pytest.raises(ConfigError):
        parse_range("nan:1")


def test_advice_needs_neither_torch_nor_gymnasium() -> None:
    code = "import sys, llm_pg.advise; assert not {'torch', 'gymnasium', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
