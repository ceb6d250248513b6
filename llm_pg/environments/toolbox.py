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
WHICH = "environment"  # the column that names a row's environment where there are several


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


class Environments:
    """Environments of one class: made once, reset often.

    Args:
        factory: makes one when it is called.

    Attributes:
        kind: their class. tools: its public methods.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory = factory
        probe = factory()
        self.kind = type(probe)
        self.tools = {tool.name: tool for tool in _methods(probe)}
        self.free = [probe]  # those that no episode has now

    def take(self) -> Any:
        """One for an episode that begins."""
        return self.free.pop() if self.free else self.factory()


class Toolbox:
    """The tools of a run.

    Args:
        tools: functions with type hints and a docstring, names of shipped ones (calculator, python), module:function
            or file.py:function.
        environment_factory: makes an object for each episode, with `reset(**row)`; its other public methods are tools.
            A mapping of several by name: the column `environment` of a row says which of them plays its episodes.
        mcp_servers: by name, how each is started or reached; see `mcp_servers`.

    Attributes:
        shared: tools of all episodes, by name. environments: by the name in the column `environment`; of a single one
            the name is None. chooses: there are several.
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
        self.chooses = isinstance(environment_factory, Mapping)
        factories = environment_factory if self.chooses else {None: environment_factory}
        self.environments: dict[str | None, Environments] = {
            name: Environments(_factory(factory)) for name, factory in factories.items() if factory is not None
        }
        self.servers = McpServers(mcp_servers) if mcp_servers else None
        if self.servers is not None:
            found += [
                Tool(schema["function"]["name"], schema, call, None, True) for schema, call in self.servers.tools()
            ]
        self.shared = {tool.name: tool for tool in found}
        for name in self.names:
            names = [tool.name for tool in found]
            names += self.environments[name].tools if name in self.environments else []
            twice = next((each for each in names if names.count(each) > 1), None)
            if twice is not None:
                raise ConfigError(f"Two tools are called {twice!r}; a model could not tell them apart. Rename one.")
            if not names:
                raise ConfigError(
                    "No tool: tools is empty, and environment_factory gives no public method beside reset."
                )

    @property
    def names(self) -> list[str | None]:
        """Of the environments; of a run without one or with a single one [None]."""
        return list(self.environments) or [None]

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """Which environment plays the episodes of a row.

        Raises ConfigError where there are several, and the row names none of them.
        """
        if not self.chooses:
            return None
        name = row.get(WHICH)
        if name not in self.environments:
            given = f"{name!r}" if WHICH in row else "missing"
            raise ConfigError(
                f"environment_factory has several environments, and the column {WHICH!r} of a row is {given}; "
                f"{choices(str(name), [str(each) for each in self.environments])}"
            )
        return str(name)

    def tools_of(self, name: str | None) -> dict[str, Tool]:
        """The tools of an episode, by their names. name: as `name_of` gives it."""
        return {**self.shared, **(self.environments[name].tools if name in self.environments else {})}

    def schemas_of(self, name: str | None) -> list[dict[str, Any]]:
        """Of the tools of an episode, as the chat template shows them."""
        return [tool.schema for tool in self.tools_of(name).values()]

    @property
    def tools(self) -> dict[str, Tool]:
        """All tools by name; of several environments' tools of one name the first."""
        found: dict[str, Tool] = {}
        for name in reversed(self.names):
            found = {**found, **self.tools_of(name)}
        return found

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of all tools, as the chat template shows them."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def rewards(self) -> list[Callable[..., Any]]:
        """A reward function for each class of environment that has `get_reward`: asks the episodes' environments for
        it, and does not apply to those of other classes."""
        kinds = {each.kind: None for each in self.environments.values()}  # a class under two names is asked once
        return [_reward_of(kind) for kind in kinds if callable(getattr(kind, "get_reward", None))]

    def close(self) -> None:
        """Ends MCP servers that were started here."""
        if self.servers is not None:
            self.servers.close()

    def take(self, name: str | None) -> Any:
        """An environment for an episode that begins; None where there is none."""
        return self.environments[name].take() if name in self.environments else None

    def give_back(self, name: str | None, environment: Any) -> None:
        """An episode is scored and needs its environment no more."""
        if environment is not None:
            self.environments[name].free.append(environment)


def _reward_of(kind: Any) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(kind.get_reward):

        async def rewards(environments: Any, **_: Any) -> list[Any]:
            return [await each.get_reward() if type(each) is kind else None for each in environments]

    else:

        def rewards(environments: Any, **_: Any) -> list[Any]:  # type: ignore[misc]
            return [each.get_reward() if type(each) is kind else None for each in environments]

    rewards.__name__ = rewards.__qualname__ = kind.__name__
    return rewards


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


def _factory(given: Any) -> Callable[[], Any]:
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
