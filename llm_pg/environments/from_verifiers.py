"""Environments of the verifiers library (0.1.12 up to 0.1.x), one rollout a time, a turn at a time.

The library's own rollout runs, and its model is us: it asks a client for a response, and gets the next turn. So stop
conditions, set-up, answers and rubric are the library's. Its prompts: `train_dataset=environment.get_dataset()`.

Not covered, with an error that says so: tools called through the fields of an API (a turn here is text), rubrics that
compare the rollouts of a group, environments that rewrite earlier messages. Those of 0.4 have agents instead of a
client: `from_verifiers_agents`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from .protocol import Environment, Reply
from .stepped import SteppedTask

COLUMNS = ("prompt", "answer", "task", "info", "example_id")


def make_verifiers(env_id: str, env_args: Mapping[str, Any] | None = None) -> Environment:
    """An environment of the verifiers that is installed, 0.1.12 up to 0.1.x or 0.4, by its id."""
    import verifiers

    if hasattr(verifiers, "Client"):
        return VerifiersEnvironment(env_id, env_args)
    if find_spec("verifiers.v1") is not None and importlib.metadata.version("verifiers").startswith("0.4."):
        from .from_verifiers_agents import AgentsEnvironment

        return AgentsEnvironment(env_id, env_args)
    raise ValueError(
        f"verifiers {verifiers.__version__} is installed, and its environments are driven here of 0.1.12 up to 0.1.x "
        "and of 0.4: pip install 'verifiers>=0.1.12,<0.2' or 'verifiers>=0.4,<0.5'."
    )


class VerifiersEnvironment:
    """A verifiers environment by its id. It needs conversational prompts.

    The rubric's reward falls at the last turn. A rubric's function that raises is 0 there, as the library has it.

    Args:
        env_id: what `verifiers.load_environment` takes. env_args: its keyword arguments.
    """

    def __init__(self, env_id: str, env_args: Mapping[str, Any] | None = None) -> None:
        self.rollout: SteppedTask | None = None
        self.environment = _loaded(env_id, json.dumps(dict(env_args or {}), sort_keys=True))

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self._close()
        self.client, self.heard = _client(), 0
        given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
        given.setdefault("example_id", 0)
        self.rollout = SteppedTask(self.environment.rollout(given, self.client, "policy", {}))
        self.rollout.run_until(self.client.asked)
        task = self.rollout.task
        if task.done():
            raise RuntimeError(f"The environment's rollout ended before a turn: {task.result()['error']!r}")

    def step(self, text: str) -> Reply:
        assert self.rollout is not None
        self.heard = len(self.client.prompt) + 1
        self.client.say(text)
        self.rollout.run_until(self.client.asked)
        if not self.rollout.task.done():
            return self._reply(text)
        state = self.rollout.task.result()
        if state.get("error") is not None:
            raise RuntimeError(f"The environment's rollout failed: {state['error']!r}")
        self.rollout.run(self.environment.rubric.score_rollout(state))
        self._close()
        return Reply(reward=float(state["reward"]), done=True)

    def _reply(self, turn: str) -> Reply:
        messages = [_plain(message) for message in self.client.prompt]
        if len(messages) < self.heard or messages[self.heard - 1] != ("assistant", turn):
            raise ValueError(
                "The environment rewrote the conversation. What was sampled cannot be changed afterwards: use one that "
                "only adds messages."
            )
        new = messages[self.heard :]
        roles = {role for role, _ in new}
        return Reply("\n".join(text for _, text in new), role=roles.pop() if len(roles) == 1 else "user")

    def _close(self) -> None:
        if self.rollout is not None:
            self.rollout.close()
            self.rollout = None

    def __del__(self) -> None:
        self._close()


@lru_cache(maxsize=4)
def _loaded(env_id: str, env_args: str) -> Any:
    import verifiers

    return verifiers.load_environment(env_id, **json.loads(env_args))


def _client() -> Any:
    """A client of the library whose responses are our turns."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    class Turns(Client):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(None)
            self.prompt: list[Any] = []
            self.asked, self.answered, self.turn = asyncio.Event(), asyncio.Event(), ""

        def say(self, text: str) -> None:
            self.turn = text
            self.asked.clear()
            self.answered.set()

        async def get_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Any:
            self.prompt = list(prompt)
            self.asked.set()
            await self.answered.wait()
            self.answered.clear()
            message = ResponseMessage(content=self.turn, finish_reason="stop", is_truncated=False)
            return Response(id="", created=0, model=model, message=message)

        def setup_client(self, config: Any) -> Any:
            raise NotImplementedError("this client has no server")

        async def close(self) -> None: ...

        to_native_tool = to_native_prompt = get_native_response = setup_client
        raise_from_native_response = from_native_response = setup_client

    return Turns()


def _plain(message: Any) -> tuple[str, str]:
    """Role and text of a message, a mapping or an object."""
    values = message if isinstance(message, Mapping) else message.model_dump()
    content = values.get("content") or ""
    if values.get("tool_calls") or not isinstance(content, str):
        raise ValueError("The environment speaks in more than text (tool calls, pictures); only text can be a turn.")
    return values["role"], content
