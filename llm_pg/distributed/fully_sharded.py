"""Weights in shards over the ranks (FSDP2: torch's `fully_shard`), and the two ways in which a run reads them.

At rest a rank holds 1/N of every weight, of its gradient and of its moments. Passes with a gradient gather one layer at
a time. Passes without one (sampling, the reference, log-probabilities before an update) run on weights that were
gathered once for the whole phase: ranks then need not make the same number of passes, and a token costs no message.

The losses here have the denominators of the whole batch, so gradients are summed over ranks, where FSDP divides by
their number. Weights and gradients travel in the type in which weights are kept (float32 under train.bf16 too), so that
autocast computes what it does without shards.

Source: Zhao et al. 2023 (arXiv:2304.11277) for the idea; torch.distributed.fsdp.fully_shard for what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils import _pytree

from .sharded import Sharded, check_reference
from .tensors import core_of

T = TypeVar("T")


class FullySharded(Sharded):
    """Every rank holds 1/N of all weights, gradients and moments.

    Args:
        device: of this rank.
        reshard: give a layer's weights back after its forward pass and gather them again for the backward pass
            (ZeRO-3); False keeps them in between (ZeRO-2: more memory, a third fewer bytes on the wire).
        offload: weights, gradients and moments at rest in the host's memory.
        layer_names: classes that are gathered as one; none = those that transformers never splits.
    """

    shards_weights = True

    def __init__(
        self,
        device: torch.device | str,
        *,
        reshard: bool = True,
        offload: bool = False,
        layer_names: Iterable[str] = (),
    ) -> None:
        super().__init__(device)
        self.mesh = init_device_mesh(self.device.type, (self.num_ranks,))
        self.reshard, self.offload, self.layer_names = reshard, offload, frozenset(layer_names)

    def layers_of(self, model: Any) -> list[Any]:
        """The modules of a language model that are gathered as one. ValueError where none is known."""
        names = self.layer_names or frozenset(core_of(model)._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(
                f"FSDP2 needs to know which modules of {type(core_of(model)).__name__} are its layers, and none is "
                f"called {', '.join(sorted(names)) or 'anything it declares'}. Give the class of the layers as "
                "fsdp_transformer_layer_cls_to_wrap in accelerate's config."
            )
        return layers

    @property
    def description(self) -> str:
        return (
            f"FSDP2: weights, gradients and moments in shards over {self.num_ranks} ranks, each with its part of the "
            "memory above; each rank has whole weights while it samples."
        )

    def place(self, model: Any) -> None:
        """Nothing: each layer goes to its device when it is cut."""

    def shard(self, policy: Any) -> None:
        """Cuts policy, reference and critic in place; parameters keep their names."""
        check_reference(policy)
        policy.use(self)
        for model in (policy.model, policy.reference):
            if model is not None:
                self._cut(model, self.layers_of(model))
        if policy.critic is not None:  # its head may be of a wider type than its body, so it is gathered by itself
            body = [] if policy.critic.body is None else self.layers_of(policy.critic.body)
            self._cut(policy.critic, [*body, policy.critic.head])

    def _cut(self, model: Any, layers: list[Any]) -> None:
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        for module in layers:
            fully_shard(module, mesh=self.mesh, reshard_after_forward=self.reshard, offload_policy=policy)
        # The root holds what is outside the layers (embedding, last norm, head), from its forward to its backward.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False, offload_policy=policy)
        for module in (*layers, model):  # neither setting reaches the modules inside
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor
        model.run_sharded = lambda work: work()
        register_fsdp_forward_method(model, "run_sharded")
        model.run_sharded(lambda: None)  # the first module that runs becomes the root, and keeps its weights gathered
        model.reshard()

    def forward(self, model: Any, work: Callable[[], T]) -> T:
        """`work` as a forward pass of `model`; every rank makes the same number, each with its backward pass."""
        # Copies, as the hooks on what a pass returns are not those of what it is a view of.
        result: T = model.run_sharded(lambda: _pytree.tree_map(torch.clone, work()))
        return result

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Nothing: they are summed as the passes make them."""

    @contextlib.contextmanager
    def gathered(self, model: Any) -> Iterator[None]:
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(self.reshard and part is not model, recurse=False)
                part.reshard()
