"""Calls of tools carried out, each bounded in time. Whatever goes wrong becomes an answer that the model reads.

A function that a worker process can load runs there, as reward functions do: one that hangs or dies costs its call.
Async functions, methods of environments and functions that no worker can load (lambdas, closures, notebooks) run in
the trainer's process. There a call that is late is interrupted between two steps of Python, which a call inside a
library written in C can delay.
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..rewards.loading import Target, load
from ..rewards.scorer import Scorer
from ..rewards.specs import resolve
from ..rewards.tally import RewardError
from .calls import ToolCall
from .toolbox import Tool

if TYPE_CHECKING:
    from ..rewards.asynchronous import Loop

GRACE = 1.0  # seconds beyond their own limit before async calls that hold the loop are given up


@dataclass(frozen=True)
class ToolResult:
    """What a tool answered.

    Attributes:
        text: as the model reads it. failed: it is the report of a failure. is_picture: the answer holds a picture,
            which no text says.
    """

    text: str
    failed: bool = False
    is_picture: bool = False


class _LateError(BaseException):
    """No Exception, so that a tool does not catch it."""


def failure(why: str) -> ToolResult:
    """A failure in the form in which TRL's trainers tell the model."""
    return ToolResult(str({"error": why}), failed=True)


def answered(value: Any) -> ToolResult:
    """The answer of a tool. A list of blocks, as TRL's tools may return it, is the text in them."""
    blocks = value if isinstance(value, list) and value and all(map(_is_block, value)) else [value]
    picture = any(block.get("type") != "text" if _is_block(block) else _is_picture(block) for block in blocks)
    if blocks is value and not picture:
        return ToolResult("\n".join(str(block.get("text", "")) for block in blocks))
    return ToolResult("" if picture else str(value), is_picture=picture)


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in ("text", "image", "video", "audio")


def _is_picture(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "PIL" for kind in type(value).__mro__)


class ToolRunner:
    """Runs tools. A context manager.

    Args:
        tools: by their names. timeout: seconds for one call. workers: processes.
        in_process: run all functions in this process.
    """

    def __init__(
        self, tools: Mapping[str, Tool], *, timeout: float = 10.0, workers: int = 2, in_process: bool = False
    ) -> None:
        self.tools, self.timeout = tools, timeout
        self._loop: Loop | None = None
        portable = {name: tool.target.to_json() for name, tool in tools.items() if tool.target is not None}
        self._workers: Scorer | None = None
        if portable and not in_process:
            function = resolve({"function": call_tool, "targets": portable})
            self._workers = Scorer(
                [replace(function, name="tools")], workers=workers, deadline=timeout, max_unscorable=1.0
            )

    def __enter__(self) -> ToolRunner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            self._workers.close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def reset(self, environment: Any, row: Mapping[str, Any]) -> str | None:
        """Begins an episode of a row; returns what is to be added to its prompt, None = nothing.

        Raises TypeError where `reset` returns anything else.
        """
        said = environment.reset(**row)
        if inspect.isawaitable(said):
            said = self._open_loop().result_of(said)
        if said is not None and not isinstance(said, str):
            raise TypeError(
                f"{type(environment).__name__}.reset returns a text, which is added to the prompt, or None; it "
                f"returned a {type(said).__name__}."
            )
        return said

    def _open_loop(self) -> Loop:
        from ..rewards.asynchronous import Loop

        self._loop = self._loop or Loop()
        return self._loop

    def run(
        self,
        calls: Sequence[ToolCall],
        environments: Sequence[Any],
        step: int = 0,
        tools: Sequence[Mapping[str, Tool]] | None = None,
    ) -> list[ToolResult]:
        """The answers to these calls, in their order.

        Args:
            calls: of all episodes that speak. environments: the object of each call's episode, or None.
            step: of the run; functions that draw numbers are seeded by it and by the call.
            tools: that each call's episode has, by their names; None = all.

        Raises:
            RewardError: a tool answered with a picture.
        """
        known = tools or [self.tools] * len(calls)
        results: list[ToolResult | None] = [None] * len(calls)
        sent: list[int] = []
        awaited: list[tuple[int, Callable[..., Any]]] = []
        for place, call in enumerate(calls):
            tool = known[place].get(call.name)
            if tool is None:
                results[place] = failure(f"Tool {call.name} not found. There are: {', '.join(known[place])}.")
            elif tool.target is not None and self._workers is not None:
                sent.append(place)
            else:
                function = tool.function or getattr(environments[place], tool.name)
                if tool.is_async:
                    awaited.append((place, function))
                else:
                    results[place] = self._run_here(function, call)
        for place, result in zip(sent, self._run_in_workers([calls[place] for place in sent], step), strict=True):
            results[place] = result
        for (place, _), result in zip(
            awaited, self._run_together([(function, calls[place]) for place, function in awaited]), strict=True
        ):
            results[place] = result
        found = [result for result in results if result is not None]
        for call, each in zip(calls, found, strict=True):
            if each.is_picture:
                raise RewardError(
                    f"The tool {call.name} answered with a picture, and only text can be read here: the models are "
                    "causal LMs without an image encoder. Let the tool return a text."
                )
        return found

    def _run_here(self, function: Callable[..., Any], call: ToolCall) -> ToolResult:
        try:
            with limited(self.timeout):
                return answered(function(**call.arguments))
        except _LateError:
            return self._late()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model reads it, and failures are counted
            return failure(str(error))

    def _run_in_workers(self, calls: Sequence[ToolCall], step: int) -> list[ToolResult]:
        if not calls:
            return []
        assert self._workers is not None
        rows = [{"tool_name": call.name, "tool_arguments": call.arguments} for call in calls]
        nothing = [""] * len(calls)
        scores = self._workers.grade(nothing, nothing, [[]] * len(calls), rows, {"global_step": step})
        columns = [scores.extra.get(name) or [None] * len(calls) for name in ("text", "failed", "is_picture")]
        return [
            self._late("or its process ended") if reward is None else ToolResult(text, bool(bad), bool(picture))
            for reward, text, bad, picture in zip(scores.reward, *columns, strict=True)
        ]

    def _run_together(self, calls: Sequence[tuple[Callable[..., Any], ToolCall]]) -> list[ToolResult]:
        if not calls:
            return []
        loop = self._open_loop()
        results: list[ToolResult] = [self._late()] * len(calls)

        def start(function: Callable[..., Any], call: ToolCall) -> Callable[[], Any]:
            async def call_one() -> dict[str, Any]:
                return {"result": answered(await function(**call.arguments))}

            return call_one

        def keep(place: int, answer: dict[str, Any]) -> None:
            if "result" in answer:
                results[place] = answer["result"]

        starts = [start(function, call) for function, call in calls]
        try:
            with limited(self.timeout + GRACE):
                loop.answer_all(starts, self.timeout, keep, lambda error: {"result": failure(str(error))})
        except _LateError:  # one of them does not give the loop back
            self._loop = None
        return results

    def _late(self, more: str = "") -> ToolResult:
        return failure(" ".join(f"The call took longer than {self.timeout:g} s {more}".split()))


def call_tool(
    completion: str,
    log_extra: Callable[[str, Any], None],
    targets: Mapping[str, Mapping[str, Any]],
    tool_name: str,
    tool_arguments: Mapping[str, Any],
) -> float:
    """Calls a tool in a worker, which has it as a reward function; what it says is logged.

    completion: of no use. targets: where each tool is.
    """
    function = load(Target(**targets[tool_name]))
    try:
        result = answered(function(**tool_arguments))
    except Exception as error:  # noqa: BLE001 - the model reads it, and failures are counted
        result = failure(str(error))
    log_extra("text", result.text)
    log_extra("failed", result.failed)
    log_extra("is_picture", result.is_picture)
    return 0.0


def _load_all(targets: Mapping[str, Mapping[str, Any]]) -> None:
    for target in targets.values():
        load(Target(**target))


setattr(call_tool, "prepare", _load_all)  # noqa: B010 - a function has no such attribute for the type checker


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Interrupts what is inside after so many seconds, in the main thread of a system with timers; else waits."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of somebody else's timer; 0 = none was running
        signal.signal(signal.SIGALRM, before)
