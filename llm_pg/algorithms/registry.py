"""An algorithm of your own: a function from rollouts to advantages, or a row, beside those of the table. No torch.

    @register_algorithm(name="centred", source="me, 2026")
    def centred(rollouts):                       # llm_pg.rollouts.Rollouts of one step, this rank's whole groups
        returns_B = rollouts.reward_BT.sum(1)
        return returns_B - returns_B.mean()      # (B,), or (B, T) with one weight a step

In the process that ran this, `algorithm="centred"` names it; from a file, `algorithm.name: my.py:centred`. What it is
worth: `llm-pg prove --advantage my.py:centred`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from ..files import load_file
from ..words import one_of
from .spec import AlgorithmSpec
from .table import ALGORITHMS

_SPEC = "llm_pg_row"  # attribute of a registered function


def register_algorithm(
    spec: AlgorithmSpec | None = None, *, name: str | None = None, source: str = "", **changes: Any
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Add an algorithm to the table: an `AlgorithmSpec`, or, as a decorator, one whose advantages a function computes.

    Args:
        spec: the row to add; `register_algorithm(AlgorithmSpec("mine", "me", baseline="batch_mean"))`.
        name: of the decorated function's row; None = the function's name.
        source: where the algorithm comes from.
        changes: other fields of the row. Without them the reduction is the exact one (tokens summed, completions
            averaged) and the ratio is clipped as PPO does, so that only the advantage can be at fault.

    Raises:
        ValueError: a name that another algorithm has, or unknown fields.
    """
    if spec is not None:
        _add(spec)

    def decorate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        known = {field.name for field in dataclasses.fields(AlgorithmSpec)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"register_algorithm got {', '.join(unknown)}; a row has {', '.join(sorted(known))}.")
        own = AlgorithmSpec(**{"name": name or function.__name__, "source": source, "advantage": function, **changes})
        _add(own)
        setattr(function, _SPEC, own)
        return function

    return decorate


def _add(spec: AlgorithmSpec) -> None:
    known = ALGORITHMS.get(spec.name)
    # A file that is loaded again, or a notebook's cell that is run again, replaces what it made before.
    if known is not None and not _is_own(known):
        raise ValueError(f"There is an algorithm {spec.name!r} already ({known.source}); give yours another name.")
    ALGORITHMS[spec.name] = spec
    _OWN.add(spec.name)


_OWN: set[str] = set()


def _is_own(spec: AlgorithmSpec) -> bool:
    return spec.name in _OWN


def is_path(name: str) -> bool:
    """Whether an algorithm's name is the address of a function: `file.py:function` or `module:function`."""
    return ":" in name


def find_spec(algorithm: str | AlgorithmSpec, changes: Mapping[str, Any] = MappingProxyType({})) -> AlgorithmSpec:
    """The row of a name of the table or of an address, or the row given; with changed fields.

    Raises:
        ValueError: an unknown name or field, with the nearest that is known, or a word that is not one of its field's.
    """
    if isinstance(algorithm, str) and not is_path(algorithm):
        one_of("algorithm.name", algorithm, list(ALGORITHMS))
        spec = ALGORITHMS[algorithm]
    else:
        spec = load_spec(algorithm) if isinstance(algorithm, str) else algorithm
    known = [field.name for field in dataclasses.fields(AlgorithmSpec)]
    for name in changes:
        one_of("a field of an algorithm", name, known)
    changes = dict(changes)
    if is_path(str(changes.get("surrogate", ""))):
        changes["loss"] = load_function(changes.pop("surrogate"), "algorithm.surrogate")
    return dataclasses.replace(spec, **changes) if changes else spec


def load_function(address: str, setting: str) -> Callable[..., Any]:
    """The function at `file.py:function` or `module:function`. ValueError where there is none."""
    place, _, name = address.rpartition(":")
    found = getattr(_module(place, address, setting), name, None)
    if not callable(found):
        raise ValueError(f"{setting} {address!r}: {place} has no function {name!r}.")
    return found  # type: ignore[no-any-return]


def load_spec(address: str) -> AlgorithmSpec:
    """The row at `file.py:function` or `module:function`; it may also be an `AlgorithmSpec`.

    Raises:
        ValueError: no such file, module or name, or something that is neither function nor row.
    """
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise ValueError(f"algorithm.name {address!r} is not of the form file.py:function or module:function.")
    found = getattr(_module(place, address, "algorithm.name"), name, None)
    if isinstance(found, AlgorithmSpec):
        return found
    if callable(found):
        own = getattr(found, _SPEC, None)
        return own if own is not None else AlgorithmSpec(name, address, advantage=found)
    what = "has no such name" if found is None else f"holds a {type(found).__name__} there"
    raise ValueError(
        f"algorithm.name {address!r}: {place} {what}; give a function from rollouts to advantages, or an AlgorithmSpec."
    )


def _module(place: str, address: str, setting: str) -> ModuleType:
    try:
        return load_file(Path(place).resolve()) if place.endswith(".py") else import_module(place)
    except Exception as error:
        raise ValueError(f"{setting} {address!r}: loading {place} raised {type(error).__name__}: {error}.") from error
