"""One job carried out: a loaded reward function called on some completions, every answer sent as soon as it is there.

This runs in the worker processes and, for functions that no worker can load, in the trainer's own process.
"""

import asyncio
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

from llm_pg.rewards.contract import BadValueError, Signature, read_batch, read_plain, shown

MAX_TRACE = 4_000  # characters of a traceback that are kept

Send = Callable[[dict[str, Any]], None]
Prepare = Callable[[int], None]


@dataclass(frozen=True)
class Loaded:
    """A callable with what is needed to call it: its name in messages, its signature, and fixed keyword arguments."""

    name: str
    function: Callable[..., Any]
    signature: Signature
    options: dict[str, Any] = field(default_factory=dict)


class Loop:
    """One event loop for all async functions of a process, so that clients they keep (HTTP sessions) stay usable."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end; in a helper thread where this thread has a loop running (a notebook)."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        if not _loop_is_running():
            return self._loop.run_until_complete(coroutine)
        results: list[Any] = []
        errors: list[BaseException] = []
        loop = self._loop

        def target() -> None:
            try:
                results.append(loop.run_until_complete(coroutine))
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                errors.append(error)

        thread = threading.Thread(target=target, name="async-rewards")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None


def perform(loaded: Loaded, job: dict[str, Any], send: Send, loop: Loop, prepare: Prepare) -> None:
    """Carry out one job and send its answers. `prepare(index)` is called before each call of the function.

    job: {"indices", "state"} with, for the plain form, "items" (the keyword arguments of each) and "deadline" (seconds
    for each item of an async function); for the batch form, "arguments". Each item of the plain form is answered by
    {"index", "reward", "parts", "extra", "metrics"} or {"index", "cause", "trace"}; a batch as a whole by {"rewards",
    "extra", "metrics"} or {"cause", "trace"}. A value that breaks the contract is answered by {"bad"} and ends the job.
    """
    try:
        if loaded.signature.form == "batch":
            _perform_batch(loaded, job, send, loop, prepare)
        elif loaded.signature.is_async:
            prepare(job["indices"][0])
            loop.run(_perform_together(loaded, job, send))
        else:
            _perform_each(loaded, job, send, prepare)
    except BadValueError as error:
        send({"bad": str(error)})


class _Call:
    """The arguments of one call, and what the function logs while it runs."""

    def __init__(self, loaded: Loaded, arguments: dict[str, Any], state: dict[str, Any]) -> None:
        self.extra: dict[str, Any] = {}
        self.metrics: list[tuple[str, float]] = []
        wanted = loaded.signature.arguments
        self.arguments = {**arguments, **loaded.options}
        if "trainer_state" in wanted:
            self.arguments["trainer_state"] = SimpleNamespace(**state)
        if "log_extra" in wanted:
            self.arguments["log_extra"] = self._log_extra
        if "log_metric" in wanted:
            self.arguments["log_metric"] = self._log_metric

    def _log_extra(self, column: str, values: Any) -> None:
        self.extra[str(column)] = loggable(values)

    def _log_metric(self, name: str, value: Any) -> None:
        self.metrics.append((str(name), float(value)))

    def answer(self, result: Any) -> dict[str, Any]:
        reward, parts = read_plain(result)
        return {"reward": reward, "parts": parts, "extra": self.extra, "metrics": self.metrics}


def _perform_each(loaded: Loaded, job: dict[str, Any], send: Send, prepare: Prepare) -> None:
    for index, item in zip(job["indices"], job["items"], strict=True):
        prepare(index)
        call = _Call(loaded, item, job["state"])
        try:
            answer = call.answer(loaded.function(**call.arguments))
        except BadValueError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - reported, counted by name, and limited
            answer = failure(error)
        send({"index": index, **answer})


def _perform_batch(loaded: Loaded, job: dict[str, Any], send: Send, loop: Loop, prepare: Prepare) -> None:
    count = len(job["indices"])
    prepare(job["indices"][0])
    call = _Call(loaded, job["arguments"], job["state"])
    try:
        result = loaded.function(**call.arguments)
        if inspect.isawaitable(result):
            result = loop.run(_awaited(result))
        rewards = read_batch(result, count)
    except BadValueError:
        raise
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
        send(failure(error))
        return
    for column, values in call.extra.items():
        if not isinstance(values, list) or len(values) != count:
            raise BadValueError(f"must log {count} values to the extra column {column!r}; it logged {shown(values)}.")
    send({"rewards": rewards, "extra": call.extra, "metrics": call.metrics})


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


async def _perform_together(loaded: Loaded, job: dict[str, Any], send: Send) -> None:
    async def one(index: int, item: dict[str, Any]) -> None:
        call = _Call(loaded, item, job["state"])
        start = time.monotonic()
        try:
            answer = call.answer(await asyncio.wait_for(loaded.function(**call.arguments), job["deadline"]))
        except BadValueError:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
            late = isinstance(error, (TimeoutError, asyncio.TimeoutError))
            late = late and time.monotonic() - start >= job["deadline"]
            answer = {"cause": "deadline", "trace": ""} if late else failure(error)
        send({"index": index, **answer})

    tasks = [asyncio.ensure_future(one(*pair)) for pair in zip(job["indices"], job["items"], strict=True)]
    try:
        await asyncio.gather(*tasks)
    finally:  # a broken contract ends the job: nothing of it may go on in the loop, which outlives it
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def failure(error: BaseException) -> dict[str, Any]:
    """The answer for a call that raised: the exception's name as the cause, and its traceback from the user's frame."""
    own: TracebackType | None = error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename == __file__:
        own = own.tb_next
    text = "".join(traceback.format_exception(type(error), error, own or error.__traceback__, chain=False))
    if len(text) > MAX_TRACE:
        text = f"{text[: MAX_TRACE // 2]}\n...\n{text[-MAX_TRACE // 2 :]}"
    return {"cause": type(error).__name__, "trace": text}


def loggable(value: Any) -> Any:
    """A value as it can be logged: numbers and texts as they are, arrays and sequences as lists, the rest as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(getattr(value, "tolist", None)):
        return loggable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [loggable(item) for item in value]
    return str(value)


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
