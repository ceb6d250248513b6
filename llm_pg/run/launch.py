"""What the launcher was asked for, what came of it, and what of it cannot run here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError

FORMS = (
    "On GPUs: `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`. On a CPU: the same "
    "two with train.use_cpu=true (gloo); `accelerate launch --cpu` starts one process whatever its --num_processes is."
)
# Tasks that a cluster's starter counted; torchrun and accelerate set WORLD_SIZE over them.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_count(num_processes: int) -> None:
    """ConfigError where fewer processes run together than were asked for.

    Each would train a whole run of its own, in the same folder. Known: WORLD_SIZE, the counts of srun and mpirun, and
    the command line of `accelerate launch`, which tells its child nothing of the number.
    """
    asked, by = asked_processes(os.environ, parent_command())
    if asked > num_processes:
        raise ConfigError(
            f"{asked} processes were asked for ({by}), and this one runs in a group of {num_processes}. {FORMS}"
        )


def check_ahead(config: Config, num_processes: int) -> None:
    """ConfigError where completions would be sampled ahead on several ranks."""
    if config.rollout.max_staleness and num_processes > 1:
        raise ConfigError(
            f"rollout.max_staleness is {config.rollout.max_staleness} and {num_processes} ranks run together (DDP or "
            "FSDP2): sampling ahead has been built and tested for one process. Use rollout.max_staleness=0 there, or "
            "one process with engine vllm over several servers."
        )


def asked_processes(env: Mapping[str, str], parent: Sequence[str]) -> tuple[int, str]:
    """The largest number of processes that anything asked for, and what did; (1, "") where nothing did."""
    found = [(1, "")]
    world = "WORLD_SIZE"
    for name in (world,) if env.get(world) else _TASKS:
        if env.get(name, "").isdigit():
            found.append((int(env[name]), f"{name}={env[name]}"))
    arguments = _launch_arguments(parent)
    if arguments is not None:
        count = _of_accelerate(arguments)
        found.append((count, f"accelerate launch with num_processes {count}"))
    return max(found)


def _launch_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch`, by any of its three names; None for another command."""
    for place, word in enumerate(command, 1):
        name = Path(word).name
        if name == "accelerate" and list(command[place : place + 1]) == ["launch"]:
            return list(command[place + 1 :])
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[place:])
    return None


def _of_accelerate(arguments: list[str]) -> int:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(arguments)
    if given.num_processes is None and given.config_file is not None:
        return int(load_config_from_file(given.config_file).num_processes)
    return int(given.num_processes or 1)


def parent_command() -> list[str]:
    """Words of the command that started this process; none where the system does not tell."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_backend(config: Config, *, needs_critic: bool) -> None:
    """ConfigError where the launcher asked for something that this run cannot do. Before accelerate is started."""
    for name, backend in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "accelerate's parallelism_config"),
    ):
        if _on(name):
            raise ConfigError(
                f"The launcher asked for {backend}, which has not been run here, so it is refused. FSDP2 shards the "
                "same three things as ZeRO-3 (weights, gradients, moments): use configs/accelerate/fsdp2.yaml, with "
                "fsdp_reshard_after_forward: false in place of ZeRO-2."
            )
    if not sharding_asked():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    reasons = {
        f"fsdp_version is {version}; version 1 keeps flat parameters that no other part of a run can read. Set "
        "fsdp_version: 2": version != "2",
        "train.fp16 needs one loss scale over all shards. Use train.bf16": config.train.fp16,
        f"algorithm.name is {config.algorithm.name}, and the critic's head and body are not cut. Use an algorithm "
        "without a critic, or DDP": needs_critic,
        "warm_start_steps is above 0, and its trainer would shard the model a second time. Do the warm start in a run "
        "of its own without FSDP and give its model": bool(config.warm_start.warm_start_steps),
        "rollout.engine is vllm, whose weights are written from whole ones. Use the native engine, or DDP": (
            config.rollout.engine == "vllm"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"Under FSDP2: {reason}.")


def sharding_asked() -> bool:
    return _on("ACCELERATE_USE_FSDP")


def make_shards(accelerator: Any) -> Any:
    """`Shards` as accelerate's FSDP settings say; None where the launcher asked for none, or there is one rank."""
    if not sharding_asked() or accelerator.num_processes == 1:
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    from ..training.shards import Shards

    # On a CPU accelerate runs two ranks as DDP would and leaves its plugin out; the settings are those of its launcher.
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    return Shards(
        accelerator.device,
        accelerator.num_processes,
        reshard=bool(plugin.reshard_after_forward),
        offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true",
        layer_names=plugin.transformer_cls_names_to_wrap or (),
    )
