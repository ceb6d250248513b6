"""Values between the referee and the solution: JSON with a few tags. Plain data only, whatever the other side sends."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from fractions import Fraction
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_MESSAGE = 8 << 20
MAX_ITEMS = 100_000  # taken from an iterator
_EXACT_FLOAT = 1 << 53


class Unsupported(Exception):
    """A value that cannot travel."""


class Channel:
    """Messages over descriptor 3: four bytes of length, then JSON."""

    def __init__(self) -> None:
        self.fd = 3

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE:
            raise Unsupported(f"a value of more than {MAX_MESSAGE} bytes")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        while view:
            view = view[os.write(self.fd, view) :]

    def receive(self) -> Any:
        length = int.from_bytes(self._exactly(4), "big")
        if length > MAX_MESSAGE:
            raise EOFError("a message of more than the allowed length")
        return json.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = os.read(self.fd, count - len(data))
            if not chunk:
                raise EOFError("the other side is gone")
            data += chunk
        return bytes(data)


def encode(value: Any, opaque: Callable[[Any], Any]) -> Any:
    """A value as JSON. Subclasses of plain types become the plain type; `opaque` encodes, or refuses, anything else."""

    def walk(value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            value = int(value)
            return value if abs(value) < _EXACT_FLOAT else {"int": hex(value)}
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, list):
            return [walk(item) for item in list.__iter__(value)]
        if isinstance(value, dict):
            return {"dict": [[walk(key), walk(item)] for key, item in dict.items(value)]}
        for kind in _ITERABLES:
            if isinstance(value, kind):
                return {kind.__name__: [walk(item) for item in kind.__iter__(value)]}
        if isinstance(value, (bytes, bytearray)):
            return {"bytearray" if isinstance(value, bytearray) else "bytes": bytes(value).hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, (Decimal, Fraction)):
            return {"Decimal" if isinstance(value, Decimal) else "Fraction": str(value)}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return walk(value.tolist())
        if hasattr(type(value), "__next__"):
            return {"iterator": [walk(item) for item in islice(value, MAX_ITEMS)]}
        return opaque(value)

    return walk(value)


def decode(value: Any, handle: Callable[[Any], Any]) -> Any:
    """The value that `encode` wrote; `handle` makes what stands for an opaque one."""
    if isinstance(value, list):
        return [decode(item, handle) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "handle":
        return handle(content)
    if tag in _SCALARS:
        return _SCALARS[tag](content)
    items = [decode(item, handle) for item in content]
    return _CONTAINERS[tag](items)


_ITERABLES: tuple[Any, ...] = (tuple, set, frozenset)
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "Decimal": Decimal,
    "Fraction": Fraction,
}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "iterator": iter,
}
