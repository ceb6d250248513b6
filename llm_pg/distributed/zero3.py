"""DeepSpeed's ZeRO, stage 3: weights in parts too, read in the two ways in which `fully_sharded` reads those of FSDP2.

Passes with a gradient run inside the engine's own forward pass: its hooks gather a layer before it is used and give it
back; what is outside the layers (embedding, last norm, head) is registered with the engine as used by the whole pass,
since the loss here calls parts of the model. Passes without a gradient run on weights that were gathered once for the
phase, with the hooks at rest: ranks then need not make the same passes, which the engine would take for an error.

A reference stays whole on every rank. Source: Rajbhandari et al. 2020 (arXiv:1910.02054); DeepSpeed 0.19 for what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .sharded import check_reference
from .tensors import core_of, is_partitioned, own_part
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
    """`Zero` of stage 3."""

    parts, shards_weights = "weights, gradients and moments", True

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device, 3)
        self._depth = 0

    def _start(self, module: Any) -> None:
        super()._start(Pass(module))
        from deepspeed.runtime.zero import register_external_parameter

        names = frozenset(core_of(module)._no_split_modules or ())
        layers = [each for each in module.modules() if type(each).__name__ in names]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in inside:
                register_external_parameter(self.engine.module, parameter)

    def shard(self, policy: Any) -> None:
        """Only a check: the engine cuts the weights when it gets the optimiser."""
        check_reference(policy)

    def forward(self, model: Any, work: Callable[[], T]) -> T:
        """`work` as a pass of the engine; every rank makes the same number, each with its backward pass."""
        result: T = self.engine(work)
        return result

    @contextlib.contextmanager
    def gathered(self, model: Any) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        parameters = [p for p in model.parameters() if is_partitioned(p)]
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

    def moments(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        for name, parameter in self._moved(weights).items():
            state = self._state_of(parameter)
            if not state:  # before the first step
                continue
            reported = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if self.is_main:
                reported["step"] = state["step"].clone()
                out.update({f"{name}.{moment}": value.clone() for moment, value in reported.items()})
        return out

    def restore(self, weights: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]) -> None:
        """The moments, and the weights that the engine steps from, from those that are in the parts."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in self._moved(weights).items():
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
