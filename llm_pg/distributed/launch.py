"""What the launcher was asked for, what came of it, and what of it cannot run here."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError
from ..config.engines import ENGINES
from ..config.vllm import check_vllm
from .data_parallel import DataParallel
from .fully_sharded import FullySharded
from .strategy import Strategy
from .zero import Zero
from .zero3 import Zero3

FORMS = (
    "On GPUs: `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`. On a CPU: the same "
    "two with use_cpu: true in the launcher's config file or train.use_cpu=true (gloo); `accelerate launch --cpu` "
    "starts one process whatever its --num_processes is."
)
# Tasks that a cluster's starter counted; torchrun and accelerate set WORLD_SIZE over them.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


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


def check_ahead(config: Config, strategy: Strategy) -> None:
    """ConfigError where servers would be brought older weights by ranks that hold shards."""
    rollout = config.rollout
    if rollout.max_staleness and ENGINES[rollout.engine].older_weights == "copy" and strategy.shards_weights:
        raise ConfigError(
            f"rollout.max_staleness is {rollout.max_staleness}, the engine is {rollout.engine}, and the weights are "
            f"cut over {strategy.num_ranks} ranks: servers get older weights from a copy of the model, and shards "
            "cannot be copied. "
            "Use DDP (configs/accelerate/ddp.yaml), engine native, or rollout.max_staleness=0."
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


def _read_arguments(arguments: list[str]) -> tuple[Any, Any]:
    """What the command line of `accelerate launch` says, and its config file (None where it names none)."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(arguments)
    return given, None if given.config_file is None else load_config_from_file(given.config_file)


def _of_accelerate(arguments: list[str]) -> int:
    given, file = _read_arguments(arguments)
    if given.num_processes is None and file is not None:
        return int(file.num_processes)
    return int(given.num_processes or 1)


def cpu_asked(env: Mapping[str, str], parent: Sequence[str]) -> bool:
    """Whether the launcher was asked to stay on the CPU. `accelerate launch` passes it on to a single process only, so
    that its command line and config file are read for several."""
    if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    arguments = _launch_arguments(parent)
    if arguments is None:
        return False
    given, file = _read_arguments(arguments)
    return bool(given.cpu or getattr(given, "use_cpu", False) or (file is not None and file.use_cpu))


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
    """ConfigError where launcher or config asked for something that cannot be had. Before accelerate is started."""
    check_vllm(config)
    if deepspeed_asked():
        _check_deepspeed(config, needs_critic=needs_critic)
    for name, backend in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "accelerate's parallelism_config"),
    ):
        if _on(name):
            raise ConfigError(
                f"The launcher asked for {backend}, which has not been run here, so it is refused. FSDP2 cuts weights, "
                "gradients and moments over the ranks: use configs/accelerate/fsdp2.yaml."
            )
    if not sharding_asked():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    reasons = {
        f"fsdp_version is {version}; version 1 keeps flat parameters that no other part of a run can read. Set "
        "fsdp_version: 2": version != "2",
        "train.fp16 needs one loss scale over all shards. Use train.bf16": config.train.fp16,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"Under FSDP2: {reason}.")


def _check_deepspeed(config: Config, *, needs_critic: bool) -> None:
    stage = zero_stage()
    reasons = {
        f"zero_stage is {stage}. Stages 1, 2 and 3 run here; stage 0 is DDP (configs/accelerate/ddp.yaml)": (
            stage not in (1, 2, 3)
        ),
        "a deepspeed_config_file is given, of which nothing is read: steps, types and clipping are the run's own. "
        "Give zero_stage alone": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none",
        "moments in the host's memory have not been run here. Leave offload_optimizer_device out, or use FSDP2 with "
        "fsdp_offload_params": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none",
        "train.fp16 needs a loss scale of its own there. Use train.bf16": config.train.fp16,
        f"algorithm.name is {config.algorithm.name}, and its engine clips one norm over policy and critic, where each "
        "is held to max_grad_norm by itself. Use DDP or FSDP2": needs_critic,
        "the package deepspeed is not here: pip install deepspeed": importlib.util.find_spec("deepspeed") is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"Under DeepSpeed: {reason}.")


def sharding_asked() -> bool:
    return _on(_FSDP)


def deepspeed_asked() -> bool:
    return _on(_DEEPSPEED)


def scales_losses(config: Config) -> bool:
    """Whether a loss can be scaled for float16 here: on CUDA, with whole weights on every rank."""
    import torch

    return torch.cuda.is_available() and not (config.train.use_cpu or sharding_asked() or deepspeed_asked())


def zero_stage() -> int:
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


@contextlib.contextmanager
def _unsaid(*names: str) -> Iterator[None]:
    asked = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def without_deepspeed() -> contextlib.AbstractContextManager[None]:
    """Inside the block accelerate is made as for DDP: the engine is ours to make, and mixed precision torch's own."""
    return _unsaid(_DEEPSPEED)


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Inside the block a second trainer of this process meets accelerate as under DDP, whatever was asked for."""
    from accelerate.state import AcceleratorState

    if not (sharding_asked() or deepspeed_asked()):
        yield
        return
    state = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    try:
        with _unsaid(_FSDP, _DEEPSPEED):
            yield
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(state)


def make_strategy(accelerator: Any) -> Strategy:
    """How an update is spread over the processes that accelerate has started, as the launcher asked for it."""
    import torch

    device = accelerator.device
    # accelerate makes none on a CPU, where float16 needs one as well.
    scaler = torch.amp.GradScaler(device.type) if accelerator.mixed_precision == "fp16" else None
    if accelerator.num_processes == 1:
        return Strategy(device, scaler)
    if sharding_asked():
        from accelerate.utils import FullyShardedDataParallelPlugin

        # On a CPU accelerate runs two ranks as DDP would and leaves its plugin out; the settings are its launcher's.
        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        return FullySharded(
            device,
            reshard=bool(plugin.reshard_after_forward),
            offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true",
            layer_names=plugin.transformer_cls_names_to_wrap or (),
        )
    if deepspeed_asked():
        return Zero3(device) if zero_stage() == 3 else Zero(device, zero_stage())
    return DataParallel(device, scaler)
