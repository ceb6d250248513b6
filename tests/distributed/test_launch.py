"""Fewer processes than were asked for, and launchers whose wishes cannot be met, end the run before it begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from llm_pg.config import ConfigError
from llm_pg.config.check import resolve_spec
from llm_pg.config.load import check_values
from llm_pg.distributed.launch import asked_processes, check_backend, check_count

FILES = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))
SCRIPT = Path(__file__).parents[1] / "faults" / "tiny_run.py"
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
LAUNCH = ["/usr/bin/python3", "/usr/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    "env, parent, asked",
    [
        ({}, ["bash"], 1),
        ({}, [*LAUNCH, "--cpu", "--num_processes", "2", "run.py"], 2),
        ({}, [*LAUNCH, "--num_processes=4", "-m", "llm_pg.cli", "train", "--num_processes", "9"], 4),
        ({}, ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "run.py"], 2),
        ({}, ["python", "/usr/bin/accelerate-launch", "--cpu", "--num_processes", "2", "run.py"], 2),
        ({}, [*LAUNCH, "run.py", "--num_processes", "9"], 1),  # the script's own argument
        ({}, ["rocket", "launch", "--num_processes", "3"], 1),
        ({"WORLD_SIZE": "2"}, ["torchrun"], 2),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ["slurmstepd"], 8),
        ({"WORLD_SIZE": "16", "SLURM_STEP_NUM_TASKS": "2"}, ["python"], 16),  # a starter on each of two machines
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, ["python"], 1),  # two runs on purpose, each of one process
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ["orted"], 3),
    ],
)
def test_what_a_launcher_was_asked_for_is_known(env: dict[str, str], parent: list[str], asked: int) -> None:
    assert asked_processes(env, parent)[0] == asked


@pytest.mark.parametrize("path", [p for p in FILES if "cpu" in p.name], ids=lambda p: p.name)
def test_the_number_in_a_config_file_counts_as_asked_for(path: Path) -> None:
    assert asked_processes({}, [*LAUNCH, "--cpu", "--config_file", str(path), "run.py"])[0] == 2


def test_one_process_where_srun_started_two_is_refused_with_the_forms_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"2 processes.*SLURM_STEP_NUM_TASKS=2.*--multi_gpu.*torchrun.*gloo"):
        check_count(1)
    check_count(2)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [["--cpu", "--num_processes", "2"], ["--num_processes", "2"]])
def test_accelerate_that_starts_one_process_of_two_is_refused(launch: list[str], tmp_path: Path) -> None:
    given = f'{{"out": "{tmp_path}", "name": "r"}}'
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(SCRIPT), given]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert ended.returncode != 0
    assert "2 processes were asked for (accelerate launch with num_processes 2)" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_accelerate_reads_its_config_files_as_what_they_are_called(path: Path) -> None:
    config = load_config_from_file(str(path))
    sharded, zero = path.name.startswith("fsdp2"), path.name.startswith("deepspeed")
    kind = DistributedType.FSDP if sharded else DistributedType.DEEPSPEED if zero else DistributedType.MULTI_GPU
    assert config.distributed_type == kind
    if zero:
        assert config.deepspeed_config == {"zero_stage": 3 if "zero3" in path.name else 2}
    assert config.use_cpu == ("cpu" in path.name)
    if sharded:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] == ("keep" not in path.name)
    given = launch_command_parser().parse_args(["--config_file", str(path), "run.py"])
    _validate_launch_command(given)
    assert (given.use_fsdp, given.use_deepspeed, given.multi_gpu) == (sharded, zero, not (sharded or zero))


def test_there_is_a_file_for_each_way_to_run() -> None:
    assert {"ddp.yaml", "ddp_two_nodes.yaml", "fsdp2.yaml", "fsdp2_keep_weights.yaml", "two_cpu_ranks.yaml"} <= {
        path.name for path in FILES
    }


def checked(changes: dict[str, object]) -> None:
    config = check_values(changes)
    check_backend(config, needs_critic=resolve_spec(config).needs_critic)


@pytest.mark.parametrize(
    "env, changes, message",
    [
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "Under DeepSpeed: zero_stage is 0.*ddp.yaml"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "Under DeepSpeed: .*Give zero_stage alone"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "Under DeepSpeed: moments in the host"),
        (ZERO, {"fp16": True}, "Under DeepSpeed: train.fp16.*bf16"),
        (ZERO, {"name": "ppo"}, "Under DeepSpeed: algorithm.name is ppo.*Use DDP or FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM.*refused"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "Under FSDP2: fsdp_version is 1.*Set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"fp16": True}, "Under FSDP2: train.fp16.*bf16"),
    ],
)
def test_a_backend_that_cannot_do_it_is_refused_with_what_can(
    env: dict[str, str], changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        checked(changes)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        checked({})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    checked({})


@pytest.mark.parametrize(
    "changes", [{}, {"name": "ppo"}, {"engine": "vllm", "vllm_urls": ["http://host:1"]}, {"warm_start_steps": 3}]
)
def test_fsdp2_takes_critics_servers_and_warm_starts(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    checked(changes)
