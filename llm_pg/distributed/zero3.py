"""DeepSpeed's ZeRO, stage 3: weights in parts too, read in the two ways in which `shards` reads those of FSDP2.

Passes with a gradient run inside the engine's own forward pass: its hooks gather a layer before it is used and give it
back; what stands outside the layers (embedding, last norm, head) is told to the engine as used by the whole pass, since
the loss here calls parts of the model. Passes without a gradient run on weights that were gathered once for the phase,
with the hooks at rest: ranks then need not make the same passes, which the engine would take for an error.

A reference stays whole on every rank. Source: Rajbhandari et al. 2020 (arXiv:1910.02054); DeepSpeed 0.19 for what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .shards import core_of, own_part
from .zero import MOMENTS, Zero

T = TypeVar("T")


class Pass(nn.Module):
    """The module that the engine holds: a pass through whatever parts of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


class Zero3(Zero):
    """`Zero` of stage 3, and what a `Policy` asks of `Shards`. Arguments as there."""

    def __init__(self, model: Any, optimizer: torch.optim.AdamW, *, max_grad_norm: float, num_ranks: int) -> None:
        super().__init__(3, Pass(model), optimizer, max_grad_norm=max_grad_norm, num_ranks=num_ranks)
        from deepspeed.runtime.zero import register_external_parameter

        names = frozenset(core_of(model)._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                register_external_parameter(self.engine.module, parameter)
        self._depth = 0

    @property
    def told(self) -> str:
        return "weights, gradients and moments"

    def through(self, model: Any, work: Callable[[], T]) -> T:
        """`work` as a pass with a gradient; every rank must make the same number, each with its backward pass."""
        result: T = self.engine(work)
        return result

    @contextlib.contextmanager
    def gathered(self, model: Any) -> Iterator[None]:
        """The whole weights on every rank inside the block, to read. Every rank must enter it."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = [p for p in model.parameters() if in_parts(p)]
        if self._depth or not parameters:  # a reference is whole
            yield
            return
        self._depth += 1
        try:
            with GatheredParameters(parameters), self._hooks_at_rest():
                yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def _hooks_at_rest(self) -> Iterator[None]:
        from deepspeed.runtime.zero import parameter_offload

        hooks = self.engine.optimizer.parameter_offload
        hooks.pre_sub_module_forward_function = parameter_offload.FWD_MODULE_STACK.append  # it is popped after each
        hooks.post_sub_module_forward_function = lambda module: None
        try:
            yield
        finally:
            del hooks.pre_sub_module_forward_function, hooks.post_sub_module_forward_function

    def moments(self, weights: Mapping[str, nn.Parameter], keep: bool) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        for name, parameter in weights.items():
            state = self._state_of(parameter)
            if not state:  # before the first step
                continue
            told = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if keep:
                told["step"] = state["step"].clone()
                out.update({f"{name}.{moment}": value.clone() for moment, value in told.items()})
        return out

    def restore(self, weights: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]) -> None:
        """The moments, and the weights that the engine steps from, from those that stand in the parts."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in weights.items():
            safe_set_local_fp32_param(parameter, parameter.ds_tensor.data)  # type: ignore[attr-defined]
            if f"{name}.step" not in moments:
                continue
            state, flat = self._state_of(parameter), self._flat(parameter)
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(flat))
            state["step"] = moments[f"{name}.step"].clone()
            for moment in MOMENTS:
                safe_set_local_optimizer_state(parameter, own_part(moments[f"{name}.{moment}"], parameter), moment)

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        engine = self.engine.optimizer
        flat: Tensor = engine.fp32_partitioned_groups_flat[engine.grad_position[engine.get_param_id(parameter)][0]]
        return flat

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.state[self._flat(parameter)]
        return state


def in_parts(x: Any) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(x, "ds_tensor")
