"""Tensors of which ranks hold parts, and whole ones, by the same calls: where nothing is cut, nothing is done.

Parts are those of torch's `fully_shard` (a `DTensor`) or of DeepSpeed's stage 3 (a parameter with `ds_tensor`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; its adapters are in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def class_of(module: Any) -> Any:
    """The class of a module, without the one that `fully_shard` gives it."""
    return type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)


def can_be_copied(model: Any) -> bool:
    """False for a model that `fully_shard` has cut."""
    return not isinstance(model, FSDPModule)


def is_partitioned(x: Any) -> bool:
    """Whether DeepSpeed's stage 3 holds this parameter."""
    return hasattr(x, "ds_tensor")


def whole(x: Tensor) -> Tensor:
    """A tensor in one piece; where it is in parts, on every rank, which all must ask for it."""
    if isinstance(x, DTensor):
        return x.full_tensor()
    if not is_partitioned(x):
        return x
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([x]):
        return x.detach().clone()


@contextlib.contextmanager
def writable(model: Any) -> Iterator[None]:
    """Inside the block weights of DeepSpeed's stage 3 are whole, and what the first rank writes to them is kept. Every
    rank must enter it."""
    parameters = [p for p in model.parameters() if is_partitioned(p)]
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
    if is_partitioned(target):
        target.ds_tensor.data.copy_(own_part(value, target))  # type: ignore[attr-defined]
    else:
        target.copy_(like(value, target))


def collect(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors in one piece in the host's memory, one after another; nothing on ranks that do not keep them. One that
    is under two names, as tied embeddings do, is gathered once and stays one."""
    out: dict[str, Tensor] = {}
    pieces: dict[int, Tensor | None] = {}
    for name, value in tensors.items():
        if id(value) not in pieces:
            piece = whole(value if is_partitioned(value) else value.detach())
            pieces[id(value)] = piece.cpu() if keep else None
        kept = pieces[id(value)]
        if kept is not None:
            out[name] = kept
    return out


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, whole on this rank or held as `target` is, as `target` is held."""
    if is_partitioned(value):
        return whole(value)
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
