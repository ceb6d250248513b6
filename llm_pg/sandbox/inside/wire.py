"""Values between the referee and the solution: JSON with a few tags. Plain data only, whatever the other side sends."""

from __future__ import annotations

import os
from itertools import islice

try:  # what `json` is made of: importing that takes longer than starting the interpreter, for parts unused here
    import _json as fast
except ImportError:
    import json

    fast = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_MESSAGE = 8 << 20
MAX_ITEMS = 100_000  # taken from an iterator
_EXACT_FLOAT = 1 << 53


class Unsupported(Exception):
    """A value that cannot travel."""


class _Plain:
    """How JSON is read: the scanner takes its settings from attributes."""

    strict, memo, object_hook, object_pairs_hook = True, {}, None, None  # type: ignore[var-annotated]
    parse_float, parse_int = float, int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__


def dumps(value: Any) -> str:
    """JSON of what `encode` gives."""
    if fast is None:
        return json.dumps(value)
    escape: Any = fast.encode_basestring_ascii
    encoder = fast.make_encoder(None, None, escape, None, ": ", ", ", False, False, True)  # type: ignore[arg-type]
    return "".join(encoder(value, 0))


def loads(text: str) -> Any:
    """The value of JSON without white space around it. Raises ValueError for what is none."""
    if fast is None:
        return json.loads(text)
    try:
        value, end = fast.make_scanner(_Plain)(text, 0)  # type: ignore[arg-type]
    except StopIteration:
        raise ValueError("no JSON") from None
    if end != len(text):
        raise ValueError("more than one value")
    return value


class Channel:
    """Messages over descriptor 3: four bytes of length, then JSON."""

    def __init__(self) -> None:
        self.fd = 3

    def send(self, message: dict[str, Any]) -> None:
        data = dumps(message).encode()
        if len(data) > MAX_MESSAGE:
            raise Unsupported(f"a value of more than {MAX_MESSAGE} bytes")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        while view:
            view = view[os.write(self.fd, view) :]

    def receive(self) -> Any:
        length = int.from_bytes(self._exactly(4), "big")
        if length > MAX_MESSAGE:
            raise EOFError("a message of more than the allowed length")
        return loads(self._exactly(length).decode())

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
        for kind in type(value).__mro__:  # found by name: importing both takes longer than most runs
            if (kind.__module__, kind.__name__) in _EXACT:
                return {kind.__name__: str(value)}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return walk(value.tolist())
        if hasattr(type(value), "__next__"):
            return {"iterator": [walk(item) for item in islice(value, MAX_ITEMS)]}
        return opaque(value)

    return walk(value)


def decode(value: Any, handle: Callable[[Any], Any]) -> Any:
    """The value that `encode` wrote; `handle` makes the substitute of an opaque one."""
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
    "Decimal": lambda text: __import__("decimal").Decimal(text),
    "Fraction": lambda text: __import__("fractions").Fraction(text),
}
_EXACT = (("decimal", "Decimal"), ("fractions", "Fraction"))
_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "iterator": iter,
}
