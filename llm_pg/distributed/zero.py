"""DeepSpeed's ZeRO under an update: gradients and moments in parts over the ranks, whole weights on each.

The engine owns what it is for: it sums gradients as passes make them, clips them and makes the optimiser's step. The
rest is as without it: a loss has the denominators of the whole batch, so gradients are to be summed where the engine
takes their mean; passes are counted here, and a step ends them (managed_gradient_accumulation off); moments are read
and put back one parameter at a time by the calls that DeepSpeed has for that, so a checkpoint is that of any other run.

Source: Rajbhandari et al. 2020 (arXiv:1910.02054) for the idea; DeepSpeed 0.19 for what runs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from .sharded import Sharded
from .strategy import Outcome

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Sharded):
    """Moments, and the gradients that steps are made by, in parts over all ranks.

    Args:
        device: of this rank.
        stage: 1 (moments) or 2 (gradients too); 3 is `zero3.Zero3`.
    """

    parts = "gradients and moments"

    def __init__(self, device: torch.device | str, stage: int) -> None:
        super().__init__(device)
        self.stage = stage

    @property
    def description(self) -> str:
        return f"DeepSpeed: {self.parts} in parts over {self.num_ranks} ranks."

    def prepare(self, policy: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Starts the engine. optimizer: AdamW over float32 weights of the policy; ConfigError where they are not."""
        super().prepare(policy, optimizer, max_grad_norm)
        self._start(policy.model)

    def _start(self, module: Any) -> None:
        import deepspeed

        _check_types(module.parameters())
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # The engine puts a flat part of each group in the place of its parameters.
        groups = enumerate(self.optimizer.param_groups)
        self.group_of = {p: number for number, group in groups for p in group["params"]}
        # A small weight is cut as well; what is gathered together with it costs one message more or less.
        persistence = {"stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used in its own reports alone
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.max_grad_norm,
            "zero_optimization": {"stage": self.stage, **persistence},
            "zero_allow_untested_optimizer": True,  # torch's AdamW, as everywhere else here
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self.engine = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)[0]

    def zero_grad(self) -> None:
        """Of the passes since the last step nothing is kept here: `step` ends with that."""
        self.engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.num_ranks)  # it divides by their number

    def step(
        self,
        own: Sequence[torch.nn.Parameter],
        critic: Sequence[torch.nn.Parameter] | None,
        *,
        has_rows: bool,
        is_finite: bool,
        spoil: Callable[[], None],
    ) -> Outcome:
        """One step by the sum that the engine made. It drops a gradient that is not finite on any rank on all."""
        if not has_rows:
            return Outcome(0.0, None, True)
        if not is_finite:
            spoil()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        made = bool(self.engine.was_step_applied()) and math.isfinite(norm)
        return Outcome(norm if made else math.nan, None, made)

    def moments(self, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        for name, parameter in self._moved(weights).items():
            state = self.optimizer.state.get(self._part(parameter))
            if not state:  # before the first step
                continue
            self._link(parameter)
            reported = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if self.is_main:
                reported["step"] = state["step"].clone()
                out.update({f"{name}.{moment}": value for moment, value in reported.items()})
        return out

    def restore(self, weights: Mapping[str, torch.nn.Parameter], moments: Mapping[str, Tensor]) -> None:
        """Puts the weights, as they are in the model, and moments back into the parts."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._moved(weights).items():
            safe_set_full_fp32_param(parameter, parameter.detach())
            if f"{name}.step" not in moments:
                continue
            part = self._part(parameter)
            state = self.optimizer.state[part]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(part))
            state["step"] = moments[f"{name}.step"].clone()
            self._link(parameter)
            for moment in MOMENTS:
                value = moments[f"{name}.{moment}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)

    def close(self) -> None:
        """Ends the engine and all process groups, and what DeepSpeed remembers of them."""
        from deepspeed import comm

        self.engine.destroy()
        del self.engine
        comm.destroy_process_group()

    def _moved(self, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
        """Those of the optimiser: a reference that moves has no moments."""
        return {name: parameter for name, parameter in weights.items() if parameter in self.group_of}

    def _link(self, parameter: torch.nn.Parameter) -> None:
        """Tell a parameter where its moments stand. DeepSpeed does so once, after the step of the first group, when
        those of the others are not there yet."""
        mapping, part = parameter._hp_mapping, self._part(parameter)  # type: ignore[attr-defined]
        if mapping is not None:  # else this rank holds nothing of it
            mapping.set_optim_state_fragment(part, self.optimizer.state[part])

    def _part(self, parameter: torch.nn.Parameter) -> Tensor:
        part: Tensor = self.optimizer.param_groups[self.group_of[parameter]]["params"][0]
        return part


def _check_types(parameters: Iterable[torch.nn.Parameter]) -> None:
    """ConfigError where weights are not float32: the engine would keep a wider copy, which no checkpoint here has."""
    other = sorted({str(p.dtype) for p in parameters if p.dtype != torch.float32})
    if other:
        raise ConfigError(
            f"Under DeepSpeed weights must be float32, and some are {', '.join(other)}: its steps are made on a copy "
            "in float32, which no checkpoint of this project holds. Use dtype=float32 with train.bf16, DDP or FSDP2."
        )
