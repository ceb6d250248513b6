"""A coroutine that is run a turn at a time: the rollout of a library that waits for what the model says."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class SteppedTask:
    """A coroutine on an event loop of its own, which stands still between our calls.

    Args:
        coroutine: begins with the first call of `run_until`.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self.task = self._loop.create_task(coroutine)

    def future(self) -> asyncio.Future[Any]:
        """A future of its loop."""
        return self._loop.create_future()

    def run_until(self, asked: asyncio.Event) -> None:
        """Runs it until the event is set or it has ended."""

        async def wait() -> None:
            waiting = asyncio.ensure_future(asked.wait())
            await asyncio.wait({self.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

        self._loop.run_until_complete(wait())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs another one to its end."""
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        """Cancels it, where it has not ended; may be called again."""
        if not self._loop.is_closed():
            self.task.cancel()
            self._loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))
            self._loop.close()
