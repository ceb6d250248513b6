"""One job carried out: a loaded reward function called on some completions, every answer sent as soon as it is there.

This runs in the worker processes and, for functions that no worker can load, in the trainer's own process.
"""

import inspect
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

from llm_pg.rewards.contract import BadValueError, Signature, read_batch, read_plain, shown
from llm_pg.rewards.forks import OneProcess

if TYPE_CHECKING:
    from llm_pg.rewards.asynchronous import Loop

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


class Performer:
    """Carries out jobs in this process, one after the other.

    prepare: called with the completion's place before each call of a function.
    """

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._loop: Loop | None = None

    def perform(self, loaded: Loaded, job: dict[str, Any], send: Send) -> None:
        """Carry out one job and send its answers.

        job: {"indices", "state"} with, for the plain form, "items" (the keyword arguments of each) and "deadline"
        (seconds for each item of an async function); for the batch form, "arguments". Each item of the plain form is
        answered by {"index", "reward", "parts", "extra", "metrics"} or {"index", "cause", "trace"}; a batch as a whole
        by {"rewards", "extra", "metrics"} or {"cause", "trace"}. A value that breaks the contract is answered by
        {"bad"} and ends the job.
        """
        try:
            if loaded.signature.form == "batch":
                self._batch(loaded, job, send)
            elif loaded.signature.is_async:
                self._together(loaded, job, send)
            else:
                self._each(loaded, job, send)
        except BadValueError as error:
            send({"bad": str(error)})

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _each(self, loaded: Loaded, job: dict[str, Any], send: Send) -> None:
        for index, item in zip(job["indices"], job["items"], strict=True):
            self._prepare(index)
            call = _RewardCall(loaded, item, job["state"])
            try:
                with OneProcess():
                    answer = call.answer(loaded.function(**call.arguments))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - reported, counted by name, and limited
                answer = failure(error)
            send({"index": index, **answer})

    def _together(self, loaded: Loaded, job: dict[str, Any], send: Send) -> None:
        def start(index: int, item: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
            async def call_one() -> dict[str, Any]:
                self._prepare(index)
                call = _RewardCall(loaded, item, job["state"])
                try:
                    with OneProcess():
                        return call.answer(await loaded.function(**call.arguments))
                except SystemExit as error:  # beyond this frame asyncio would end the loop with it
                    return failure(error)

            return call_one

        self._open_loop().answer_all(
            [start(index, item) for index, item in zip(job["indices"], job["items"], strict=True)],
            job["deadline"],
            lambda place, answer: send({"index": job["indices"][place], **answer}),
            failure,
        )

    def _batch(self, loaded: Loaded, job: dict[str, Any], send: Send) -> None:
        count = len(job["indices"])
        self._prepare(job["indices"][0])
        call = _RewardCall(loaded, job["arguments"], job["state"])
        try:
            with OneProcess():
                result = loaded.function(**call.arguments)
                if inspect.isawaitable(result):
                    result = self._open_loop().result_of(result)
            rewards = read_batch(result, count)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            send(failure(error))
            return
        for column, values in call.extra.items():
            if not isinstance(values, list) or len(values) != count:
                raise BadValueError(
                    f"must log {count} values to the extra column {column!r}; it logged {shown(values)}."
                )
        send({"rewards": rewards, "extra": call.extra, "metrics": call.metrics})

    def _open_loop(self) -> "Loop":
        from llm_pg.rewards.asynchronous import Loop  # only now: see its head

        if self._loop is None:
            self._loop = Loop()
        return self._loop


class _RewardCall:
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


def failure(error: BaseException) -> dict[str, Any]:
    """The answer for a call that raised: the exception's name as the cause, and its traceback from the user's frame on.

    A BadValueError is raised again: it is a mistake in the function, which ends the job.
    """
    if isinstance(error, BadValueError):
        raise error
    own: TracebackType | None = error.__traceback__
    while own is not None and own.tb_frame.f_globals.get("__package__") == __package__:
        own = own.tb_next
    text = "".join(traceback.format_exception(type(error), error, own, chain=False))
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
