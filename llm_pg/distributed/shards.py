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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


class Shards:
    """Cuts models over all ranks.

    Args:
        device: of this rank. num_ranks: all of them.
        reshard: give a layer's weights back after its forward pass and gather them again for the backward pass
            (ZeRO-3); False keeps them in between (ZeRO-2: more memory, a third fewer bytes on the wire).
        offload: weights, gradients and moments at rest in the host's memory.
        layer_names: classes that are gathered as one; none = those that transformers never splits.
    """

    def __init__(
        self,
        device: torch.device,
        num_ranks: int,
        *,
        reshard: bool = True,
        offload: bool = False,
        layer_names: Iterable[str] = (),
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (num_ranks,))
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

    def cut(self, model: Any) -> None:
        """Shard the weights of a language model in place; parameters keep their names. Make the optimiser after it."""
        self._cut(model, self.layers_of(model))

    def cut_critic(self, critic: Any) -> None:
        """The same for a `Critic`. Its head, which may be of a wider type than its body, is gathered by itself."""
        body = [] if critic.body is None else self.layers_of(critic.body)
        self._cut(critic, [*body, critic.head])

    def _cut(self, model: Any, layers: list[Any]) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        for module in layers:
            fully_shard(module, mesh=self.mesh, reshard_after_forward=self.reshard, offload_policy=policy)
        # The root holds what stands outside the layers (embedding, last norm, head), from its forward to its backward.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False, offload_policy=policy)
        for module in (*layers, model):  # neither setting reaches the modules inside
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor
        model.run_sharded = lambda work: work()
        register_fsdp_forward_method(model, "run_sharded")
        model.run_sharded(lambda: None)  # the first module that runs becomes the root, and keeps its weights gathered
        model.reshard()

    def through(self, model: Any, work: Callable[[], T]) -> T:
        """`work` as a forward pass of `model`, whatever parts of it are called. Its result has its tensors in tuples.

        Every rank must make the same number of such passes, each with its backward pass.
        """
        result: T = model.run_sharded(work)
        return result

    @contextlib.contextmanager
    def gathered(self, model: Any) -> Iterator[None]:
        """The whole weights on every rank inside the block, to read. Every rank must enter it."""
        from torch.distributed.fsdp import FSDPModule

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


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; its adapters are in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece, on every rank, which all must ask for it; any other as it is."""
    if isinstance(x, DTensor):
        return x.full_tensor()
    if not hasattr(x, "ds_tensor"):  # a parameter of which DeepSpeed's stage 3 holds a part here
        return x
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([x]):
        return x.detach().clone()


@contextlib.contextmanager
def writable(model: Any) -> Iterator[None]:
    """Inside the block weights of DeepSpeed's stage 3 are whole, and what the first rank writes to them is kept. Every
    rank must enter it."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters, modifier_rank=0):
        yield


def shape_of(x: Tensor) -> torch.Size:
    """Of the whole tensor, wherever its parts are."""
    return getattr(x, "ds_shape", x.shape)


@torch.no_grad()
def put(value: Tensor, target: Tensor) -> None:
    """Copy `value`, whole on this rank, into what this rank holds of `target`."""
    if hasattr(target, "ds_tensor"):
        target.ds_tensor.data.copy_(own_part(value, target))
    else:
        target.copy_(like(value, target))


def collect(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Sharded tensors in one piece in the host's memory, one after another; nothing on ranks that do not keep them. One
    that stands under two names, as tied embeddings do, is gathered once and stays one."""
    out: dict[str, Tensor] = {}
    pieces: dict[int, Tensor | None] = {}
    for name, value in tensors.items():
        if id(value) not in pieces:
            piece = whole(value if hasattr(value, "ds_tensor") else value.detach())
            pieces[id(value)] = piece.cpu() if keep else None
        kept = pieces[id(value)]
        if kept is not None:
            out[name] = kept
    return out


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, whole on this rank, cut as `target` is."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def own_part(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as the parts of `parameter` lie: flat, the last filled up with zeros."""
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    ranks, number = parameter.ds_process_group.size(), parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    flat = value.to(device=part.device, dtype=part.dtype).flatten()
    filled = torch.cat([flat, flat.new_zeros(ranks * part.numel() - len(flat))])
    return filled.view(ranks, -1)[number]
