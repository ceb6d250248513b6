"""What never changes while a run goes on."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from ..algorithms.spec import AlgorithmSpec
from ..config import Config, ConfigError
from ..config.check import BatchPlan, plan_batch, resolve_spec
from ..config.combinations import require_teacher
from ..distributed.launch import (
    check_ahead,
    check_backend,
    check_count,
    cpu_asked,
    make_strategy,
    parent_command,
    scales_losses,
    without_deepspeed,
)
from ..distributed.network import INTERFACE, choose_interface
from ..distributed.strategy import Strategy
from ..metrics import Clock
from ..model.loading import incoming_half
from ..model.precision import compute_in, products_of
from ..terminal import Terminal, make_terminal
from .logs.redact import Redactor
from .logs.tracker_kinds import check_trackers
from .ranks import Ranks
from .saving.folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """Of one run in this process.

    Attributes:
        config: the settings. spec: the algorithm's row, with the changes of the config.
        plan: how a step is cut. folder: where the run writes. ranks: its processes.
        accelerator: accelerate's, which starts the ranks, and for mixed precision and trackers.
        strategy: how an update is spread over the ranks.
        terminal: where progress is printed; silent on all ranks but the first.
        redactor: hides secrets. clock: seconds by phase.
    """

    config: Config
    spec: AlgorithmSpec
    plan: BatchPlan
    folder: RunFolder
    ranks: Ranks
    accelerator: Any
    strategy: Strategy
    terminal: Terminal
    redactor: Redactor
    clock: Clock

    @property
    def autocast(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """Context of the forward passes. accelerate's own computes float16 as float32 on a CPU, without a word."""
        half = products_of(self.config)
        device = self.accelerator.device.type
        return contextlib.nullcontext if half is None else functools.partial(torch.autocast, device, half)

    @property
    def critic_only_steps(self) -> int:
        """First steps of the run in which only the critic learns."""
        return self.config.critic.critic_warmup_steps if self.spec.needs_critic else 0


def make_context(
    config: Config, model: Any, *, terminal: Terminal | None = None, clock: Clock | None = None
) -> RunContext:
    """Starts accelerate as config and launcher say. Raises ConfigError where they ask for what cannot be had.

    Args:
        config: checked settings; those that the launcher decides are filled in.
        model: as it is given to a trainer; its type decides what is computed in.
        terminal: None = one that fits standard output. clock: with phases that ended before.
    """
    config.train.use_cpu = config.train.use_cpu or cpu_asked(os.environ, parent_command())
    spec = resolve_spec(config)
    check_trackers(config)
    try:
        require_teacher(spec, config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    compute_in(config, incoming_half(model, config.model), scales_losses=scales_losses(config))
    check_backend(config, needs_critic=spec.needs_critic)
    # accelerate keeps the first Accelerator's precision for the whole process; a second trainer may want another.
    AcceleratorState._reset_state()
    interface = choose_interface()
    if interface is not None:
        os.environ[INTERFACE] = interface
    with without_deepspeed():
        accelerator = Accelerator(
            mixed_precision="bf16" if config.train.bf16 else "fp16" if config.train.fp16 else "no",
            cpu=config.train.use_cpu,
            # Given, as a launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide gradients; sums are ours.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            project_dir=config.run.output_dir,
        )
    check_count(accelerator.num_processes)
    strategy = make_strategy(accelerator)
    check_ahead(config, strategy)
    ranks = Ranks(strategy, accelerator)
    terminal = (terminal or make_terminal()) if ranks.is_main else Terminal.silent()
    clock = clock or Clock()
    clock.watch = terminal.phase
    return RunContext(
        config=config,
        spec=spec,
        plan=plan_batch(config, ranks.count),
        folder=RunFolder(config),
        ranks=ranks,
        accelerator=accelerator,
        strategy=strategy,
        terminal=terminal,
        redactor=Redactor(config.model_dump(mode="json")),
        clock=clock,
    )
