"""A simulated accelerator for machines without one. Its import changes torch for the whole process: see `conftest`.

A tensor says device `sim:0` and holds its numbers on the CPU. It raises where it meets a CPU tensor, as CUDA would.
Counted is, with the line of ours that asked, each time that the host would wait for a real device: a number read, a
size that hangs on numbers, a copy back, and a copy there that is not `non_blocking` (CUDA's waits for all work before).

It shows wrong devices, waits and the number of operations. It cannot show speed, kernels, memory, streams or graphs.
torch's python backend, which carries it, is experimental.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import llm_pg

PACKAGE = str(Path(llm_pg.__file__).parent) + "/"
WAITS: collections.Counter[tuple[str, str]] = collections.Counter()  # (kind, file:line) -> times
OPERATIONS: collections.Counter[str] = collections.Counter()

_CPU = torch.device("cpu")
# Indices of the CPU are taken, after a copy that waits.
_INDEXED = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default")
_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        _count("synchronize")

    def empty_cache(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("sim", backend_module=_Module())
DEVICE = torch.device("sim:0")


class Sim(torch.Tensor):
    """A tensor on `sim:0`; its numbers are `data_`, on the CPU."""

    data_: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Sim:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, data: torch.Tensor, requires_grad: bool = False) -> None:
        self.data_ = data

    def __repr__(self, **_: Any) -> str:
        return f"Sim({self.data_})"

    def __getitem__(self, key: Any) -> Any:
        """Lists as indices, of which torch would make a tensor there by a way that its python backend lacks."""
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, list) for part in parts):
            key = tuple(torch.tensor(part, device=DEVICE) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(key)

    def tolist(self) -> Any:
        _count("tolist")
        return self.data_.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _count(kind: str) -> None:
    """With the innermost line of the package; of a library that it called, that line too."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            WAITS[kind, f"llm_pg/{path[len(PACKAGE) :]}:{frame.f_lineno}{library}"] += 1
            return
        _, found, rest = path.partition("site-packages/")
        if found and not library and not rest.startswith("torch/"):
            library = f" in {rest}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    WAITS[kind, f"outside of the package{library}"] += 1


@contextlib.contextmanager
def waits() -> Iterator[collections.Counter[tuple[str, str]]]:
    """The waits inside the block, known after it."""
    before = collections.Counter(WAITS)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    yield found
    found.update({key: n - before[key] for key, n in WAITS.items() if n > before[key]})


def _is_sim(device: Any) -> bool:
    return device is not None and torch.device(device).type == "sim"


def _look_for_waits(func: Any, args: Any, sims: list[Sim]) -> None:
    name = str(func)
    if not sims:
        return
    if name in _INDEXED:
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                if name == "aten.index.Tensor" or args[2].numel() > 1:  # one number is filled in by the mask
                    _count("index by a mask")
            elif not isinstance(index, Sim):
                _count("index of the host")
    elif any(tag in func.tags for tag in _DEPENDENT):
        _count(name)


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`_to_copy` and `copy_`, between the devices or on one."""
    if str(func) == "aten.copy_.default":
        target, source = args[0], args[1]
        patient = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
        _between(source, isinstance(target, Sim), patient)
        plain = source.data_ if isinstance(source, Sim) else source
        (target.data_ if isinstance(target, Sim) else target).copy_(plain)
        return target
    source, to = args[0], kwargs.get("device")
    there = _is_sim(to) if to is not None else isinstance(source, Sim)
    _between(source, there, not kwargs.get("non_blocking"))
    out = func(source.data_ if isinstance(source, Sim) else source, *args[1:], **{**kwargs, "device": _CPU})
    return Sim(out) if there else out


def _between(source: torch.Tensor, there: bool, patient: bool) -> None:
    if isinstance(source, Sim) and not there:
        _count("to the host")
    elif not isinstance(source, Sim) and there and patient:
        _count("to the device, blocking")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    OPERATIONS[name] += 1
    tensors = [a for a in tree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    sims = [a for a in tensors if isinstance(a, Sim)]
    if name in ("aten._to_copy.default", "aten.copy_.default"):
        return _copied(func, args, kwargs)
    _look_for_waits(func, args, sims)
    if sims and name not in _INDEXED and any(not isinstance(a, Sim) and a.dim() > 0 for a in tensors):
        shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"CPU and accelerator meet in {name}: {shapes}")

    def plain_of(a: Any) -> Any:
        if isinstance(a, Sim):
            return a.data_
        return _CPU if isinstance(a, torch.device) and a.type == "sim" else a

    out = func(*tree.tree_map(plain_of, args), **tree.tree_map(plain_of, kwargs))
    if not (sims or _is_sim(kwargs.get("device"))):
        return out
    known = {id(a.data_): a for a in sims}  # an operation in place gives its own tensor back

    def wrap(o: Any) -> Any:
        if not isinstance(o, torch.Tensor) or isinstance(o, Sim):
            return o
        return known[id(o)] if id(o) in known else Sim(o)

    return tree.tree_map(wrap, out)


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast is on, and casts nothing


def _made_there(make: Any, waits: str = "") -> Any:
    def factory(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if not _is_sim(device):
            return make(*args, device=device, **kwargs)
        if waits:
            _count(waits)
        return Sim(make(*args, **kwargs))

    return factory


torch.tensor = _made_there(torch.tensor, "to the device, blocking")
for _name in ("arange", "linspace", "randperm", "full", "eye", "rand", "randn", "randint"):
    setattr(torch, _name, _made_there(getattr(torch, _name)))

_module_to = torch.nn.Module.to


def _to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    with torch.no_grad():
        out = _module_to(self, *args, **kwargs)
    if hasattr(out, "tie_weights"):  # a tensor of another type is a new parameter, so a tie is lost
        out.tie_weights()
    return out


torch.nn.Module.to = _to  # type: ignore[method-assign, assignment]

_module_state_dict = torch.nn.Module.state_dict


def _state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """On the host: safetensors would look for a storage. Tied weights are one tensor there too."""
    state = _module_state_dict(self, *args, **kwargs)
    for name, x in list(state.items()):
        if isinstance(x, Sim):
            state[name] = x.data_
    return state


torch.nn.Module.state_dict = _state_dict  # type: ignore[method-assign, assignment]


def accelerate_on_sim() -> None:
    """Accelerator().device is `sim:0` from now on."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    for state in (PartialState, AcceleratorState):
        state.device = property(lambda self: DEVICE, lambda self, value: None)
