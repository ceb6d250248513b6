"""The batches in flight: which are sampled with which weights, and when the trainer gets them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...metrics import Clock
from ...prompts import Prompt
from ..experience import Experience
from ..source import Batches
from . import resharding
from .engines import Engine
from .resharding import RankBatches
from .serialization import pack


@dataclass
class Landed:
    """A batch, the updates that its weights had seen, and the seconds that it took in the background."""

    experience: Experience
    version: int
    clock: Clock


class Ahead:
    """Batches are numbered as the steps that train on them, from 1; version v of the weights is that after update v.

    At the beginning of step t version t-1 is there, and batch t+k is sampled with it; at the start of a run, those
    before it too. One thread samples and scores batch after batch, so that engine, reward workers and tokenizer have
    one caller at a time; an evaluation asks for them with `paused`.

    Args:
        engine: keeps versions. source: samples with it and scores, in the background.
        prompts_of: batch -> its prompts; called by the trainer.
        max_staleness: k >= 1. last: batch of the run. clock: seconds by phase of the run.
    """

    def __init__(
        self,
        engine: Engine,
        source: Batches,
        prompts_of: Callable[[int], list[Prompt]],
        *,
        max_staleness: int,
        last: int,
        clock: Clock,
    ) -> None:
        self.engine, self.source, self.prompts_of = engine, source, prompts_of
        self.max_staleness, self.last, self.clock = max_staleness, last, clock
        self.watch: Callable[[int, str, bool], None] | None = None  # is given batch, phase, and whether it begins
        self._flights: dict[int, Future[Landed]] = {}
        self._busy = threading.Lock()

    def __enter__(self) -> Ahead:
        self._open = contextlib.ExitStack()
        self._open.enter_context(self.engine)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llm_pg-ahead")
        return self

    def __exit__(self, *_: object) -> None:
        """Batches in flight are given up; one that is being scored ends first."""
        self.engine.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._open.close()

    def collect(self, step: int) -> Experience:
        """Returns the batch of this step, as soon as it is there, while those that may be are sampled behind it."""
        self.begin(step)
        return self.take(step)

    def begin(self, step: int) -> None:
        """Let all be sampled that may be, now that the update before `step` is done."""
        self._flights = {batch: flight for batch, flight in self._flights.items() if batch >= step}
        due = range(step, min(step + self.max_staleness, self.last) + 1)
        missing = [batch for batch in due if batch not in self._flights]
        if missing:
            self.engine.keep(step - 1)
        for batch in missing:
            self._flights[batch] = self._thread.submit(self._fly, batch, step - 1, self.prompts_of(batch))

    def take(self, step: int) -> Experience:
        """The batch of this step, as soon as it is there; what its making raised is raised here."""
        with self.clock("wait"):
            landed = self._flights[step].result()
        self.clock.add(landed.clock.seconds)
        landed.experience.staleness = step - 1 - landed.version
        return landed.experience

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sampled or scored in the background inside the block; the engine has the present weights."""
        with self._busy:
            self.engine.use_present()
            yield

    def _fly(self, batch: int, version: int, prompts: list[Prompt]) -> Landed:
        clock = Clock(None if self.watch is None else lambda phase, begins: self._note(batch, phase, begins))
        with self._busy:
            self.engine.use(version)
            return Landed(self.source.batch(batch, prompts, clock), version, clock)

    def _note(self, batch: int, phase: str, begins: bool) -> None:
        if self.watch is not None:
            self.watch(batch, phase, begins)

    # --- checkpoints hold what is in flight, sampled: the weights it came from are then not needed again

    def state(self, step: int) -> RankBatches:
        """The batches after `step`, once they are there, of this rank: what JSON holds of them, and their tensors.

        It ends before one whose making failed; that one is made again by a run that goes on.
        """
        reported: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for batch in sorted(batch for batch in self._flights if batch > step):
            flight = self._flights[batch]
            if flight.cancelled() or flight.exception() is not None:
                break
            landed = flight.result()
            numbers, own = pack(landed.experience)
            reported.append(
                {"batch": batch, "version": landed.version, "seconds": landed.clock.seconds, "experience": numbers}
            )
            tensors.update({f"{batch}.{name}": x for name, x in own.items()})
        return reported, tensors

    def restore(
        self,
        reported: list[dict[str, Any]],
        tensors: Mapping[str, Tensor],
        prompts: Mapping[int, Prompt],
        pieces: Any,
        device: Any,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """Put back what `resharding.of_all` gave. A batch older than `max_staleness`, of a run with a larger one, is
        dropped: it is sampled again. prompts: of the run, by index. pieces: see `Experience`. rank: its number, and how
        many there are."""
        for batch, version, parts in resharding.by_batch(reported, tensors):
            if batch - 1 - version > self.max_staleness:
                continue
            mine = resharding.of_rank(parts, *rank, prompts, pieces, device)
            if mine is None:
                continue
            clock = Clock()
            experience, clock.seconds = mine
            flight: Future[Landed] = Future()
            flight.set_result(Landed(experience, version, clock))
            self._flights[batch] = flight
