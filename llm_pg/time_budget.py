"""A bound on what a run spends on being seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeBudget:
    """Lets work be done now and then, such that it takes at most a share of the time gone by.

    A time is due where what was spent, and once more what the last time cost, stays inside the share.

    Args:
        seconds: the least between two times. share: of the time since this object was made. guess: seconds that the
            first time may cost. now: the clock.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        *,
        share: float = 0.01,
        guess: float = 0.3,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds, self.share, self.now = seconds, share, now
        self.began = self.last = now()
        self.spent, self.cost = 0.0, guess

    def due(self) -> bool:
        now = self.now()
        return now - self.last >= self.seconds and self.spent + self.cost <= self.share * (now - self.began)

    @contextmanager
    def spending(self) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            self.last = self.now()
            self.cost = self.last - begin
            self.spent += self.cost
