"""Environments of verifiers 0.4, whose one agent is us: `Env.run` asks it for turns, and gets those that were sampled.

The library's own agent would start a program, which calls a model over HTTP. What needs that program is refused by
name: tool servers, containers, files, several agents, rewritten messages. Control flow, game and rewards are the
library's. A row holds the data of its task: `verifiers_rows` makes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import lru_cache
from typing import Any

from .protocol import Reply
from .stepped import SteppedTask

TASK = "verifiers_task"  # the column with the data of a row's task


def verifiers_rows(env_id: str, count: int, env_args: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows to train on, one for each of an environment's first tasks.

    Args:
        env_id: the id of its taskset. count: rows at most. env_args: settings of the taskset.
    """
    environment = _loaded(env_id, json.dumps(dict(env_args or {}), sort_keys=True))
    return [row_of(task) for task in itertools.islice(environment.taskset, count)]


def row_of(task: Any) -> dict[str, Any]:
    """The row of a task: its opening as messages, and its data."""
    data = task.data
    if data.prompt is None:
        raise ValueError("The task has no prompt: its user speaks first, which an episode here does not.")
    said = [("system", data.system_prompt)] if data.system_prompt else []
    opening = [("user", data.prompt)] if isinstance(data.prompt, str) else [(m.role, m.content) for m in data.prompt]
    if not all(isinstance(content, str) for _, content in opening):
        raise ValueError("The task's prompt holds more than text; only text can be read.")
    messages = [{"role": role, "content": content} for role, content in [*said, *opening]]
    return {"prompt": messages, TASK: data.model_dump(mode="json")}


class AgentsEnvironment:
    """An environment of verifiers 0.4 by the id of its taskset. It needs conversational prompts.

    The rewards of the task and of the environment fall at the last turn, weighted and summed as the library does.

    Args:
        env_id: the id of its taskset. env_args: settings of the taskset.
    """

    def __init__(self, env_id: str, env_args: Mapping[str, Any] | None = None) -> None:
        self.episode: SteppedTask | None = None
        self.environment = _loaded(env_id, json.dumps(dict(env_args or {}), sort_keys=True))

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        if TASK not in row:
            raise ValueError(f"The row has no column {TASK!r}: make the rows with `verifiers_rows`.")
        self._close()
        kind, settings = self.environment._task_cls, self.environment.taskset.config.task
        task = kind(kind.data_type().model_validate(row[TASK]), settings)
        check_task(task)
        self.asked, self.seat = asyncio.Event(), _Seat(self._turn)
        self.episode = SteppedTask(self._play(task))
        self._until_asked()
        if self.episode.task.done():
            self.episode.task.result()  # raises what failed
            raise RuntimeError("The environment ended before a turn.")

    def step(self, text: str) -> Reply:
        assert self.episode is not None
        trace = self.seat.trace
        heard = len(trace.nodes) + 1
        self.answer.set_result(text)
        self._until_asked()
        if not self.episode.task.done():
            new = [str(node.message.content) for node in trace.nodes[heard:]]
            return Reply("\n".join(new))
        self.episode.task.result()
        self._close()
        return Reply(reward=float(trace.reward), done=True)

    async def _play(self, task: Any) -> None:
        from verifiers.v1 import Episode
        from verifiers.v1.trace import TraceTask

        agents = _Agents(self.seat)
        await self.environment.setup(agents)
        await self.environment.run(task, agents)
        record = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        await self.environment.finalize(task, Episode(task=record, traces=[self.seat.trace]))

    async def _turn(self) -> str:
        assert self.episode is not None
        self.answer: asyncio.Future[str] = self.episode.future()
        self.asked.set()
        return await self.answer

    def _until_asked(self) -> None:
        """Runs the episode until it wants a turn or has ended."""
        assert self.episode is not None
        self.episode.run_until(self.asked)
        self.asked.clear()

    def _close(self) -> None:
        if self.episode is not None:
            self.episode.close()
            self.episode = None

    def __del__(self) -> None:
        self._close()


def check_task(task: Any) -> None:
    """Raises ValueError naming what of a task needs the program and the machine of an agent of the library."""
    from verifiers.v1 import Task
    from verifiers.v1.utils.decorators import discover_decorated

    kind = type(task)
    scored_by = [*task.hooks("metric"), *task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    refusals = {
        "runs in a container": kind.NEEDS_CONTAINER or task.data.image is not None,
        "has tool servers (rollout.mcp_servers calls such)": bool(kind.toolsets(task.config)),
        "prepares or reads files (setup, finalize)": kind.setup is not Task.setup or kind.finalize is not Task.finalize,
        "is scored in its machine (a reward with `runtime`)": any(map(_needs_machine, scored_by)),
        "ends turns itself (@stop)": bool(task.hooks("stop")),
        "rewrites messages (@intercept)": bool(discover_decorated(task, "intercept")),
    }
    for what, holds in refusals.items():
        if holds:
            raise ValueError(
                f"The verifiers task {kind.__name__} {what}. Only tasks of text are played here, without the "
                "library's agents; use another environment, or train with the library's own server."
            )


def _needs_machine(function: Callable[..., Any]) -> bool:
    given = inspect.signature(function).parameters.get("runtime")
    return given is not None and given.default is inspect.Parameter.empty


@lru_cache(maxsize=4)
def _loaded(env_id: str, env_args: str) -> Any:
    from verifiers.v1 import Env
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    environment = load_environment(resolve_env_config({"taskset": {**json.loads(env_args), "id": env_id}}))
    kind = type(environment)
    several = len(environment._agent_specs) > 1
    shares = kind.start is not Env.start or bool(environment.taskset.toolsets(environment.taskset.config))
    if several or shares:
        what = f"has several agents ({', '.join(environment._agent_specs)})" if several else "has servers of its own"
        raise ValueError(f"The verifiers environment {env_id!r} {what}; here one model plays one agent, with text.")
    return environment


class _Agents:
    """The agents of an episode: whatever its name, it is us."""

    def __init__(self, seat: _Seat) -> None:
        self._seat = seat

    def __getattr__(self, name: str) -> _Seat:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._seat


class _Seat:
    """In the place of the library's Agent."""

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, str]]) -> None:
        self.ask, self.trainable = ask, True
        self.trace: Any = None

    @contextlib.asynccontextmanager
    async def interaction(self, task: Any, **_: Any) -> AsyncIterator[_Talk]:
        from verifiers.v1 import AgentConfig, Trace
        from verifiers.v1.state import state_cls
        from verifiers.v1.trace import AgentInfo, TraceTask

        if self.trace is not None:
            raise ValueError("The environment begins a second conversation in its episode; here it has one.")
        record = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        info = AgentInfo(config=AgentConfig())
        self.trace = Trace(task=record, agent=info, state=state_cls(type(task))())
        yield _Talk(self.trace, self.ask)
        self.trace.stop("user_closed")
        await task.score(self.trace)
        self.trace.ok = True

    async def run(self, task: Any, **_: Any) -> Any:
        async with self.interaction(task) as talk:
            await talk.turn()
        return self.trace


class _Talk:
    """In the place of the library's Interaction."""

    def __init__(self, trace: Any, ask: Callable[[], Coroutine[Any, Any, str]]) -> None:
        self.trace, self.ask = trace, ask

    async def turn(self, message: str | None = None) -> Any:
        from verifiers.v1 import Segment
        from verifiers.v1.types import AssistantMessage, SystemMessage, UserMessage

        kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
        if message is not None and not isinstance(message, str):
            raise ValueError("The environment speaks in more than text; only text can be a turn.")
        opening = row_of(self.trace.task)["prompt"] if message is None else [{"role": "user", "content": message}]
        for said in opening:
            self._add(kinds[said["role"]](content=said["content"]))
        self._add(AssistantMessage(content=await self.ask()), sampled=True)
        return Segment(messages=[self.trace.nodes[-1].message])

    def _add(self, message: Any, sampled: bool = False) -> None:
        from verifiers.v1 import MessageNode

        nodes = self.trace.nodes
        nodes.append(MessageNode(parent=len(nodes) - 1 if nodes else None, message=message, sampled=sampled))
