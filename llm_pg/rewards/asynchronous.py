"""Async reward functions: one event loop for a process, and many completions waited for at the same time.

A module of its own because importing asyncio is half of what a worker's start costs, and few functions need it.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Answer = dict[str, Any]


class Loop:
    """One event loop for all async functions of a process, so that clients they keep (HTTP sessions) stay usable."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def result_of(self, awaitable: Awaitable[Any]) -> Any:
        """What an awaitable returns; it runs in a helper thread where this thread has a loop running (a notebook)."""
        if not _loop_is_running():
            return self._run(awaitable)
        results: list[Any] = []
        errors: list[BaseException] = []

        def target() -> None:
            try:
                results.append(self._run(awaitable))
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                errors.append(error)

        thread = threading.Thread(target=target, name="async-rewards")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def answer_all(
        self,
        calls: Sequence[Callable[[], Awaitable[Answer]]],
        deadline: float,
        answered: Callable[[int, Answer], None],
        failure: Callable[[BaseException], Answer],
    ) -> None:
        """Start all calls at once, and report each one's answer, or failure, when it is there.

        deadline: seconds for each. What `answered` raises, and what `failure` raises again, ends all calls.
        """

        async def one(place: int) -> None:
            start = time.monotonic()
            try:
                answer = await asyncio.wait_for(calls[place](), deadline)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - reported by failure()
                late = isinstance(error, (TimeoutError, asyncio.TimeoutError))
                late = late and time.monotonic() - start >= deadline
                answer = {"cause": "deadline", "trace": ""} if late else failure(error)
            answered(place, answer)

        async def everything() -> None:
            tasks = [asyncio.ensure_future(one(place)) for place in range(len(calls))]
            try:
                await asyncio.gather(*tasks)
            finally:  # nothing of this job may go on in the loop, which outlives it
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        self.result_of(everything())

    def close(self) -> None:
        self._loop.close()

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await awaitable

        try:
            return self._loop.run_until_complete(awaited())
        except asyncio.CancelledError as error:
            raise RuntimeError("the coroutine was cancelled") from error


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
