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
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """An optimiser whose moments, and the gradients that it steps by, stand in parts over all ranks.

    Args:
        stage: 1 (moments) or 2 (gradients too: each pass is an exchange, so all ranks must make the same number); 3 is
            `zero3.Zero3`.
        model: whose weights it moves, float32. optimizer: AdamW over them. max_grad_norm: 0 = no clipping.
        num_ranks: of the run; its process group is there already.
    """

    def __init__(
        self, stage: int, model: Any, optimizer: torch.optim.AdamW, *, max_grad_norm: float, num_ranks: int
    ) -> None:
        import deepspeed

        _check_types(model.parameters())
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.optimizer, self.num_ranks = optimizer, num_ranks
        # The engine puts a flat part of each group in the place of its parameters.
        self.group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used in its own reports alone
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": max_grad_norm,
            # A small weight is cut as well; what is gathered together with it costs one message more or less.
            "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
            "zero_allow_untested_optimizer": True,  # torch's AdamW, as everywhere else here
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    @property
    def told(self) -> str:
        """What stands in parts."""
        return "gradients and moments"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the passes since the last step nothing is kept here: `step` ends with that."""
        self.engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` on this rank to the sum over ranks and passes."""
        self.engine.backward(loss * self.num_ranks)  # it divides by their number

    def step(self) -> tuple[float, bool]:
        """One step by the gradients since the last; their norm before clipping, and whether it was made. A gradient
        that is not finite on any rank is dropped on all, and its norm is NaN."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        made = bool(self.engine.was_step_applied()) and math.isfinite(norm)
        return (norm if made else math.nan), made

    def moments(self, weights: Mapping[str, torch.nn.Parameter], keep: bool) -> dict[str, Tensor]:
        """As `checkpoint.optimizer_tensors` names them, whole; nothing on ranks that do not keep them. All must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        for name, parameter in weights.items():
            state = self.optimizer.state.get(self._part(parameter))
            if not state:  # before the first step
                continue
            self._link(parameter)
            told = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if keep:
                told["step"] = state["step"].clone()
                out.update({f"{name}.{moment}": value for moment, value in told.items()})
        return out

    def restore(self, weights: Mapping[str, torch.nn.Parameter], moments: Mapping[str, Tensor]) -> None:
        """Put the weights, as they stand in the model, and moments back into the parts."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in weights.items():
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
        """End the engine and all process groups, and what DeepSpeed remembers of them. All ranks must call it."""
        from deepspeed import comm

        self.engine.destroy()
        del self.engine
        comm.destroy_process_group()

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
    """ValueError where weights are not float32: the engine would keep a wider copy, which no checkpoint here has."""
    other = sorted({str(p.dtype) for p in parameters if p.dtype != torch.float32})
    if other:
        raise ValueError(
            f"Under DeepSpeed weights must be float32, and some are {', '.join(other)}: its steps are made on a copy "
            "in float32, which no checkpoint of this project holds. Use dtype=float32 with train.bf16, DDP or FSDP2."
        )
