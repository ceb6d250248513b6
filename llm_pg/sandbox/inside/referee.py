"""The side of the tests: run each against the solution at the other end of the socket, and print a verdict for each.

A verdict is a line of standard output that begins with the nonce. The model's code is not in this process, so nothing
that it defines, patches or prints can write one.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import sys

import wire  # type: ignore[import-not-found]  # laid beside this program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

channel = wire.Channel()


class SolutionGone(BaseException):
    """The solution ended, hung up, or sent nonsense. Not an Exception: a test that expects one must not take it."""


class CannotJudge(BaseException):
    """The test does something that cannot cross to the solution."""


def refuse(name: str) -> Callable[..., Any]:
    def method(self: Remote, *others: Any) -> Any:
        raise TypeError(f"an object of the solution's own has no {name} in a test: its answer could be anything")

    return method


def forward(name: str) -> Callable[..., Any]:
    def method(self: Remote, *arguments: Any) -> Any:
        return ask(name, self, arguments, {})

    return method


class Remote:
    """An object that is not plain data and stays with the solution. What it says of itself decides nothing."""

    __slots__ = ("number",)

    def __init__(self, number: Any) -> None:
        if type(number) is not int:
            raise ValueError("not a handle")
        self.number = number

    def __getattr__(self, name: str) -> Any:
        return ask("attribute", self, [name], {})

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return ask("call", self, arguments, keywords)

    for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "contains", "hash", "index"):
        locals()[f"__{_name}__"] = refuse(f"__{_name}__")
    for _name in ("str", "repr", "len", "iter", "getitem", "setitem", "delitem", "int", "float"):
        locals()[f"__{_name}__"] = forward(f"__{_name}__")
    del _name


def opaque(value: Any) -> dict[str, int]:
    if type(value) is Remote:
        return {"handle": value.number}
    raise CannotJudge(f"it passes a {type(value).__name__} to the solution; plain data can be passed")


def ask(operation: str, target: Remote, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    request = {
        "do": operation,
        "on": target.number,
        "arguments": [wire.encode(argument, opaque) for argument in arguments],
        "keywords": {name: wire.encode(argument, opaque) for name, argument in keywords.items()},
    }
    reply = exchange(request)
    if "error" in reply:
        raise as_exception(reply)
    try:
        value = wire.decode(reply["value"], Remote)
        if value is None and "arguments" in reply:
            # An in-place function: the caller's containers get the new contents. Only then, so that a function which
            # returns a value cannot change what the test compares it with.
            for before, after in zip(arguments, reply["arguments"], strict=True):
                put_back(before, wire.decode(after, Remote))
    except Exception as error:  # noqa: BLE001  whatever nonsense was sent
        raise SolutionGone(f"it sent something that is no value: {error}") from None
    return value


def exchange(request: dict[str, Any]) -> dict[str, Any]:
    try:
        channel.send(request)
        reply = channel.receive()
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise SolutionGone(f"the solution ended: {error}") from None
    if not isinstance(reply, dict):
        raise SolutionGone("it sent something that is no reply")
    return reply


def as_exception(reply: dict[str, Any]) -> Exception:
    """The solution's exception, if it is an ordinary one: a StopIteration would end a loop over the cases early."""
    kind = getattr(builtins, str(reply["error"]), None)
    text = str(reply.get("text", ""))[:1000]
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RuntimeError(f"{str(reply['error'])[:100]}: {text}")
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return RuntimeError(f"{kind.__name__}: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like need more arguments
        return RuntimeError(text)


def put_back(before: Any, after: Any) -> None:
    if isinstance(before, (list, bytearray)):
        before[:] = after
    elif isinstance(before, (dict, set)):
        before.clear()
        before.update(after)


def same(given: Any, expected: Any, tolerance: float) -> bool:
    """Equality for cases: lists, tuples and iterators alike, floats within the tolerance."""
    if type(given) is Remote:
        return False
    if hasattr(given, "__next__"):
        given = list(given)
    if isinstance(given, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(same(a, b, tolerance) for a, b in zip(given, expected, strict=True))
    if isinstance(given, dict) and isinstance(expected, dict):
        return given.keys() == expected.keys() and all(same(given[key], expected[key], tolerance) for key in expected)
    if isinstance(given, float) or isinstance(expected, float):
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (given, expected))
        return numbers and math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)
    return bool(given == expected)


def find(name: str) -> Any:
    reply = exchange({"do": "name", "name": name})
    if "value" not in reply:
        raise SolutionGone(f"{name}: {reply.get('missing', reply.get('text', 'nothing'))}")
    return wire.decode(reply["value"], Remote)


def judge(spec: dict[str, Any], test: Any, names: list[str]) -> tuple[str, str]:
    """The verdict on one test, "pass", "fail" or "cannot", and why."""
    try:
        solution = {name: find(name) for name in names}
        if isinstance(test, str):
            namespace: dict[str, Any] = {"__name__": "tests"}
            exec(compile(spec["setup"], "setup.py", "exec"), namespace)  # noqa: S102  in the sandbox
            namespace.update(solution)
            exec(compile(test, "test.py", "exec"), namespace)  # noqa: S102
            return "pass", ""
        arguments, keywords, expected = (wire.decode(part, Remote) for part in test)
        given = solution[names[0]](*arguments, **keywords)
        return ("pass", "") if same(given, expected, spec["tolerance"]) else ("fail", "another value was returned")
    except CannotJudge as error:
        return "cannot", str(error)
    except BaseException as error:  # noqa: BLE001  whatever the test raises
        return "fail", f"{type(error).__name__}: {error}"


def main() -> None:
    with open("tests.json", encoding="utf-8") as file:
        spec = json.load(file)
    os.unlink("tests.json")
    verdicts = sys.stdout.fileno()
    for test in spec["tests"]:
        verdict, reason = judge(spec, test, spec["names"])
        sys.stdout.flush()
        os.write(verdicts, f"\n{spec['nonce']} {verdict} {reason[:200]!a}\n".encode())


main()
