"""The tools of a run: functions, addresses of functions, and the public methods of an environment of its own class.

What the model sees of a tool (its schema) comes from the function's name, type hints and docstring, by transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..rewards.loading import LoadError, Target, load, target_of
from ..words import choices, nearest
from .mcp_servers import McpServers
from .tools import TOOLS

NOT_TOOLS = ("reset", "get_reward")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: by which it is called. schema: as `apply_chat_template` takes it.
        function: the object; None = a method of each episode's own environment.
        target: where a worker finds it; None = it runs in the trainer's process.
        is_async: it is awaited, with the calls of the other episodes.
    """

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any] | None
    target: Target | None
    is_async: bool


class Toolbox:
    """The tools of a run.

    Args:
        tools: functions with type hints and a docstring, names of shipped ones (calculator, python), module:function
            or file.py:function.
        environment_factory: makes an object for each episode, with `reset(**row)`; its other public methods are tools.
        mcp_servers: by name, how each is started or reached; see `mcp_servers`.
    """

    def __init__(
        self,
        tools: Sequence[Any] = (),
        environment_factory: Any = None,
        mcp_servers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if isinstance(tools, str) or not isinstance(tools, Sequence):
            raise ConfigError(f"tools are a list of functions or of their addresses; got {tools!r}.")
        found = [make_tool(tool) for tool in tools]
        self.factory = _factory(environment_factory)
        self.free: list[Any] = []  # environments that no episode has now; made once, reset often
        if self.factory is not None:
            probe = self.factory()
            found += _methods(probe)
            self.free.append(probe)
            self.kind = type(probe)
        self.servers = McpServers(mcp_servers) if mcp_servers else None
        if self.servers is not None:
            found += [
                Tool(schema["function"]["name"], schema, call, None, True) for schema, call in self.servers.tools()
            ]
        self.tools: dict[str, Tool] = {}
        for tool in found:
            if tool.name in self.tools:
                raise ConfigError(f"Two tools are called {tool.name!r}; a model could not tell them apart. Rename one.")
            self.tools[tool.name] = tool
        if not self.tools:
            raise ConfigError("No tool: tools is empty, and environment_factory gives no public method beside reset.")

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of all tools, as the chat template shows them."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def reward(self) -> Callable[..., Any] | None:
        """A reward function that asks each episode's environment for its `get_reward`; None where it has none."""
        if self.factory is None or not callable(getattr(self.kind, "get_reward", None)):
            return None
        if inspect.iscoroutinefunction(self.kind.get_reward):

            async def rewards(environments: Any, **_: Any) -> list[Any]:
                return [await environment.get_reward() for environment in environments]

        else:

            def rewards(environments: Any, **_: Any) -> list[Any]:  # type: ignore[misc]
                return [environment.get_reward() for environment in environments]

        rewards.__name__ = rewards.__qualname__ = self.kind.__name__
        return rewards

    def close(self) -> None:
        """Ends MCP servers that were started here."""
        if self.servers is not None:
            self.servers.close()

    def take(self) -> Any:
        """An environment for an episode that begins; None where there is no factory."""
        if self.factory is None:
            return None
        return self.free.pop() if self.free else self.factory()

    def give_back(self, environment: Any) -> None:
        """An episode is scored and needs its environment no more."""
        if environment is not None:
            self.free.append(environment)


def make_tool(spec: Any) -> Tool:
    """A tool from a function, a `Tool`, the name of a shipped one, or an address."""
    if isinstance(spec, Tool):
        return spec
    if isinstance(spec, str):
        return _tool(_loaded(spec))
    if not callable(spec):
        raise ConfigError(f"A tool is a function or its address; got {spec!r}.")
    return _tool(spec)


def _tool(function: Callable[..., Any]) -> Tool:
    target = target_of(function)
    is_async = inspect.iscoroutinefunction(function)
    here = is_async or not isinstance(target, Target)
    name = getattr(function, "__name__", type(function).__name__)
    return Tool(name, schema_of(function), function, None if here else target, is_async)  # type: ignore[arg-type]


def _loaded(spec: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in TOOLS:
            raise ConfigError(
                f"There is no shipped tool {spec!r}; {choices(spec, list(TOOLS))} Your own is written "
                "module:function or file.py:function."
            )
        return TOOLS[spec]
    is_file = place.endswith(".py") or "/" in place
    file = str(Path(place).expanduser().resolve()) if is_file else None
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"The tool {spec!r}: there is no file {file}.")
    try:
        return load(Target(None if is_file else place, file, name))
    except LoadError as error:
        raise ConfigError(f"The tool {spec!r} cannot be loaded: {error}.{nearest(name, error.near)}") from None


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What a model sees of a function. Raises ConfigError where type hints or docstring are missing."""
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, TypeError) as error:
        raise ConfigError(
            f"The tool {getattr(function, '__name__', function)!r} cannot be shown to a model: {error} A tool needs a "
            "type hint for every argument, and a docstring with a line for each of them below `Args:`."
        ) from None
    return schema


def _factory(given: Any) -> Callable[[], Any] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        raise ConfigError(
            "environment_factory is a mapping of several environments, and one class plays all episodes of a run here. "
            "Give one class; its reset(**row) can read the column that tells the kinds apart."
        )
    made: Callable[[], Any] = _loaded(given) if isinstance(given, str) else given
    if not callable(made):
        raise ConfigError(f"environment_factory makes an environment when it is called; got {given!r}.")
    return made


def _methods(environment: Any) -> list[Tool]:
    kind = type(environment)
    if not callable(getattr(kind, "reset", None)):
        raise ConfigError(
            f"environment_factory made a {kind.__name__}, which has no method reset(**row); it begins each episode."
        )
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction)]
    methods = [getattr(environment, name) for name in names if not name.startswith("_") and name not in NOT_TOOLS]
    return [
        Tool(method.__name__, schema_of(method), None, None, inspect.iscoroutinefunction(method)) for method in methods
    ]
