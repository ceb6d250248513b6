"""Requests spread over servers: the least busy one gets the next, a dead one's prompts go to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from .client import Client
from .errors import EngineError, TimedOut, Unreachable

T = TypeVar("T")
DEAD_AFTER = 3  # failures in a row
TRIES = 8  # of one request, on whatever servers
LONGEST_PAUSE = 8.0


@dataclass
class _Member:
    client: Client
    busy: int = 0
    failures: int = 0
    cause: str = ""

    @property
    def dead(self) -> bool:
        return self.failures >= DEAD_AFTER


class ServerPool:
    """Any number of servers.

    Args:
        clients: one a server. say: prints one line (a server that died or came back). pause: seconds before the first
            repeated try; doubled with each further one.
    """

    def __init__(self, clients: Sequence[Client], *, say: Callable[[str], None], pause: float = 0.5) -> None:
        if not clients:
            raise ValueError("A pool needs at least one server.")
        self.members = [_Member(client) for client in clients]
        self.say, self.pause = say, pause
        self._lock = threading.Lock()

    def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> tuple[T, str]:
        """The answer of some server, as `read` makes it of the JSON, and that server's address.

        `read` may raise Unreachable for an answer that another try may mend. EngineError: every server is dead, this
        request failed `TRIES` times, or the server refuses it.
        """
        for number in range(TRIES):
            member, failures = self._take()
            try:
                answer = read(member.client.post(path, body))
            except Unreachable as error:
                self._failed(member, error, failures)
                if not member.dead:
                    time.sleep(min(self.pause * 2**number, LONGEST_PAUSE))
            else:
                self._answered(member)
                return answer, member.client.url
            finally:
                with self._lock:
                    member.busy -= 1
        raise EngineError(f"A request failed {TRIES} times; the last: {member.cause}.")

    def tell_all(self, call: Callable[[Client], Any]) -> list[str]:
        """`call` with every server, dead ones included, which may be back; addresses of those that took it.

        The others count as dead until the next call that they take.
        """
        with ThreadPoolExecutor(len(self.members)) as threads:
            taken = list(threads.map(lambda member: self._tell(member, call), self.members))
        if not any(taken):
            raise self._all_dead()
        return [member.client.url for member, took in zip(self.members, taken, strict=True) if took]

    def _tell(self, member: _Member, call: Callable[[Client], Any]) -> bool:
        was_dead = member.dead
        member.failures = DEAD_AFTER - 1 if was_dead else 0  # a dead one gets one try
        while not member.dead:
            try:
                call(member.client)
            except Unreachable as error:
                self._failed(member, error, member.failures, quiet=was_dead)
                if not member.dead:
                    time.sleep(self.pause * 2**member.failures)
            else:
                member.failures = 0
                if was_dead:
                    self.say(f"vLLM server {member.client.url} is back.")
                return True
        return False

    def wait(self, seconds: float, hint: str) -> None:
        """Until one of the servers answers. EngineError when none has within `seconds`."""
        deadline, reported = time.monotonic() + seconds, False
        while True:
            for member in self.members:
                try:
                    member.client.health()
                except Unreachable as error:
                    member.cause = str(error)
                else:
                    return
            if time.monotonic() > deadline:
                raise self._all_dead()
            if not reported:
                self.say(f"Waiting up to {seconds:g} s for the vLLM servers of rollout.vllm_urls; {hint}.")
                reported = True
            time.sleep(min(1.0, seconds))

    def _take(self) -> tuple[_Member, int]:
        """A server, and the failures in a row that it had when the request began."""
        with self._lock:
            alive = [member for member in self.members if not member.dead]
            if not alive:
                raise self._all_dead()
            member = min(alive, key=lambda m: m.busy)
            member.busy += 1
            return member, member.failures

    def _answered(self, member: _Member) -> None:
        """An answer ends a row of failures, but a server that was left out stays so until it takes a call for all."""
        with self._lock:
            if not member.dead:
                member.failures = 0

    def _failed(self, member: _Member, error: Unreachable, failures: int, *, quiet: bool = False) -> None:
        """Requests that were under way together fail together, for one cause: they are one failure of the row.

        One that was given its whole time is not asked twice more where it does not even say that it is well.
        """
        hangs = isinstance(error, TimedOut) and not member.dead and not member.client.is_well()
        with self._lock:
            was_dead, counts = member.dead, member.failures == failures
            member.failures = DEAD_AFTER if hangs else member.failures + counts
            member.cause = str(error)
            died, left = member.dead and not was_dead, sum(not m.dead for m in self.members)
        if died and not quiet:
            why = "no longer says that it is well" if hangs else f"failed {DEAD_AFTER} times in a row"
            self.say(
                f"vLLM server {member.client.url} {why} and is left out ({left} of {len(self.members)} left): {error}."
            )

    def _all_dead(self) -> EngineError:
        causes = "; ".join(member.cause for member in self.members)
        count = len(self.members)
        which = "The vLLM server is dead" if count == 1 else f"All {count} vLLM servers are dead"
        return EngineError(f"{which}: {causes}. Start them again and go on with --resume.")
