"""The side of the model's code: define what it defines, then answer calls until the referee hangs up."""

from __future__ import annotations

import sys
import types

import wire  # type: ignore[import-not-found]  # laid beside this program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    channel = wire.Channel()
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    objects: list[Any] = []
    try:
        with open("answer.py", encoding="utf-8", errors="surrogatepass") as file:
            source = file.read()
        # As its own file would be: this file's `annotations` is not its import, and what fails to load defines nothing.
        exec(compile(source, "answer.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    except BaseException as error:  # noqa: BLE001  whatever the model's code raises
        fault = f"{type(error).__name__}: {error}"
    else:
        fault = ""
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        try:
            reply = serve(request, module, objects, fault)
        except BaseException as error:  # noqa: BLE001
            reply = {"error": error_name(error), "text": str(error)[:1000]}
        try:
            channel.send(reply)
        except (wire.Unsupported, RecursionError, ValueError) as error:
            channel.send({"error": "ValueError", "text": f"the value returned cannot travel: {error}"})


def serve(request: dict[str, Any], module: types.ModuleType, objects: list[Any], fault: str) -> dict[str, Any]:
    def opaque(value: Any) -> dict[str, int]:
        objects.append(value)
        return {"handle": len(objects) - 1}

    operation = request["do"]
    if operation == "name":
        if fault:
            return {"fault": fault}
        owner = module
        if request["method_of"] and not hasattr(module, request["name"]):
            owner = getattr(module, request["method_of"])()
        return (
            {"value": wire.encode(getattr(owner, request["name"]), opaque)} if hasattr(owner, request["name"]) else {}
        )
    target = objects[request["on"]]
    arguments = [wire.decode(value, objects.__getitem__) for value in request["arguments"]]
    keywords = {name: wire.decode(value, objects.__getitem__) for name, value in request["keywords"].items()}
    if operation == "call":
        value = target(*arguments, **keywords)
    elif operation == "attribute":
        value = getattr(target, *arguments)
    else:
        value = getattr(type(target), operation)(target, *arguments)
    reply = {"value": wire.encode(value, opaque)}
    if value is None:
        reply["arguments"] = [wire.encode(argument, opaque) for argument in arguments]
    return reply


def error_name(error: BaseException) -> str:
    """The nearest class that the referee has too."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


main()
