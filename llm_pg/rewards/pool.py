"""A fixed number of worker processes: jobs go out, answers come in, and a worker that is late or dead is replaced."""

import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from llm_pg.processes.child import PATIENCE, Child
from llm_pg.processes.frames import BrokenFrameError, Inbox, encode
from llm_pg.processes.guard import can_stand
from llm_pg.rewards.jobs import Ledger, RewardJob

START_DEADLINE = 30.0  # seconds until a worker must have begun a job; the job's own clock starts then
TICK = 0.2  # seconds between looks at processes that may have died without closing their pipe
MAX_DEATHS = 5  # workers in a row that are lost before they begin a job, after which the pool gives up


class UnloadedError(Exception):
    """A worker could not load the function at `place`; kind, text and near are those of `loading.LoadError`."""

    def __init__(self, place: int, kind: str, text: str, near: list[str]) -> None:
        super().__init__(text)
        self.place, self.kind, self.text, self.near = place, kind, text, near


class PoolError(Exception):
    """Workers cannot be had: they die or do not come up."""


class Worker:
    """One process, seen from the trainer. It loads first, then takes one job at a time."""

    def __init__(self, setup: bytes, output: IO[bytes] | None, load_deadline: float) -> None:
        self.child = Child("llm_pg.rewards.worker:main", output=output)
        os.set_blocking(self.child.requests, False)
        os.set_blocking(self.child.answers, False)
        self.state: Literal["loading", "idle", "busy"] = "loading"
        self.job: RewardJob | None = None
        self.started = time.monotonic()
        self.deadline = self.started + load_deadline
        self.has_begun = False
        self.inbox = Inbox()
        self.outbox = memoryview(setup)

    def give(self, job: RewardJob, frame: bytes) -> None:
        self.state, self.job, self.has_begun, self.outbox = "busy", job, False, memoryview(frame)
        self.started = time.monotonic()
        self.deadline = self.started + max(START_DEADLINE, job.allowance)

    def flush(self) -> None:
        """Write what the pipe takes now. A closed pipe is noticed by the reader."""
        try:
            self.outbox = self.outbox[os.write(self.child.requests, self.outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox = memoryview(b"")

    def receive(self) -> bool:
        """Read what there is; False at the end of the pipe."""
        try:
            chunk = os.read(self.child.answers, 1 << 18)
        except BlockingIOError:
            return True
        self.inbox.feed(chunk)
        return bool(chunk)

    def is_late(self) -> bool:
        return self.state != "idle" and time.monotonic() > self.deadline


class WorkerPool:
    """`size` workers that have loaded the same functions. A context manager; `start` returns at once.

    functions: for each {"name", "target", "options"}. load_deadline: seconds a worker may take to load them.
    memory_bytes: address space of a worker, or None. output: where what functions print goes, or None for the standard
    error of this process.
    """

    def __init__(
        self,
        functions: Sequence[dict[str, Any]],
        size: int,
        *,
        load_deadline: float = 120.0,
        memory_bytes: int | None = None,
        output: Path | None = None,
    ) -> None:
        if not can_stand():
            raise ValueError("Reward workers need Linux or macOS; use in_process=True here, without deadlines.")
        self._setup = encode({"functions": list(functions), "memory_bytes": memory_bytes})
        self._size, self._load_deadline, self._output_path = size, load_deadline, output
        self._output: IO[bytes] | None = None
        self.workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._deaths = 0
        self._signatures: list[dict[str, Any]] | None = None

    def __enter__(self) -> "WorkerPool":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Bring the pool to its size. Workers load in the background.

        A dead worker is taken away here only if it was idle: what a busy one was doing is `_lose`'s to hand on.
        """
        if self._output is None and self._output_path is not None:
            self._output = self._output_path.open("ab")
        for worker in list(self.workers):
            if worker.state == "idle" and worker.child.has_ended:
                self._remove(worker)
        while len(self.workers) < self._size:
            worker = Worker(self._setup, self._output, self._load_deadline)
            self.workers.append(worker)
            self._selector.register(worker.child.answers, selectors.EVENT_READ, worker)
            self._want_to_write(worker)

    def _listen(self) -> None:
        """Bring the pool to its size. Workers that still load have their time from now: nobody listened before."""
        self.start()
        for worker in self.workers:
            if worker.state == "loading":
                worker.deadline = time.monotonic() + self._load_deadline

    def close(self) -> None:
        """End all workers, and what they started. The pool cannot be used again."""
        for worker in self.workers:
            worker.child.ask_to_end()
        for worker in list(self.workers):
            self._remove(worker)
        self._selector.close()
        if self._output is not None:
            self._output.close()

    def signatures(self) -> list[dict[str, Any]]:
        """The functions' signatures, as soon as one worker has loaded them. UnloadedError when one cannot be."""
        self._listen()
        while self._signatures is None:
            self._turn(deque(), None)
        return self._signatures

    def run(self, jobs: deque[RewardJob], encode_job: Callable[[RewardJob], bytes], ledger: Ledger) -> None:
        """Run all jobs. When this raises, workers in the middle of a job are replaced: the pool can be used again."""
        self._listen()
        try:
            while jobs or any(worker.state == "busy" for worker in self.workers):
                for worker in self.workers:
                    if worker.state == "idle" and jobs:
                        job = jobs.popleft()
                        worker.give(job, encode_job(job))
                        self._want_to_write(worker)
                self._turn(jobs, ledger)
        finally:
            for worker in [worker for worker in self.workers if worker.state == "busy"]:
                self._remove(worker)
            self.start()

    def _turn(self, jobs: deque[RewardJob], ledger: Ledger | None) -> None:
        """Wait for the next event and act on it."""
        now = time.monotonic()
        waiting = [worker.deadline for worker in self.workers if worker.state != "idle"]
        events = self._selector.select(max(0.0, min([TICK, *(deadline - now for deadline in waiting)])))
        for key, mask in events:
            worker: Worker = key.data
            if worker not in self.workers:  # lost in this turn; its descriptors may be another's by now
                continue
            if mask & selectors.EVENT_WRITE:
                worker.flush()
                self._want_to_write(worker)
            if mask & selectors.EVENT_READ:
                self._read(worker, jobs, ledger)
        for worker in list(self.workers):
            if worker in self.workers:
                self._look_after(worker, jobs, ledger)

    def _look_after(self, worker: Worker, jobs: deque[RewardJob], ledger: Ledger | None) -> None:
        """Replace a worker that has died or is late, after its last answers were read."""
        is_dead = worker.child.has_ended
        if is_dead or worker.is_late():
            self._read(worker, jobs, ledger)
            if worker in self.workers and (is_dead or worker.is_late()):
                self._lose(worker, jobs, ledger, None if is_dead else "deadline")

    def _read(self, worker: Worker, jobs: deque[RewardJob], ledger: Ledger | None) -> None:
        is_open = worker.receive()
        try:
            for message in worker.inbox.messages():
                self._handle(worker, message, jobs, ledger)
        except BrokenFrameError:
            self._lose(worker, jobs, ledger, "wrote to the protocol's pipe")
            return
        if not is_open:
            self._lose(worker, jobs, ledger, None)

    def _handle(self, worker: Worker, message: dict[str, Any], jobs: deque[RewardJob], ledger: Ledger | None) -> None:
        if "unloaded" in message:
            raise UnloadedError(message["unloaded"], message["kind"], message["text"], message["near"])
        if "ready" in message:
            self._signatures, worker.state = message["ready"], "idle"
            return
        job = worker.job
        if job is None or ("index" in message and message["index"] not in job.indices):
            raise BrokenFrameError("an answer that nobody waits for")
        assert ledger is not None
        if "begun" in message:
            self._deaths, worker.has_begun = 0, True
            worker.deadline = time.monotonic() + job.allowance
            ledger.noticed(job.function, message)
            return
        if "done" in message:
            ledger.noticed(job.function, message)
            worker.state, worker.job = "idle", None
            job.seconds = time.monotonic() - worker.started
            jobs.extendleft(reversed(job.rest(ledger)))
            return
        job.take(message, ledger)
        if not job.together:
            worker.deadline = time.monotonic() + job.allowance

    def _lose(self, worker: Worker, jobs: deque[RewardJob], ledger: Ledger | None, cause: str | None) -> None:
        """Replace a worker; what it was doing failed by `cause`, or by the way in which it died."""
        state, job, has_begun = worker.state, worker.job, worker.has_begun
        death = self._remove(worker, patience=0.0 if cause else PATIENCE)
        if state == "loading" and cause == "deadline":
            raise PoolError(f"Reward functions took over {self._load_deadline:g} s to load; import less, or later.")
        if not has_begun:
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                raise PoolError(
                    f"{self._deaths} reward workers in a row were lost before they began ({death}); see their output."
                )
            if job is not None:
                jobs.appendleft(job)  # the function was not reached, so it is not to blame
        elif job is not None:
            assert ledger is not None
            job.failure = (cause or death, "")
            jobs.extendleft(reversed(job.rest(ledger)))
        self.start()

    def _remove(self, worker: Worker, patience: float = 0.0) -> str:
        self.workers.remove(worker)
        for descriptor in (worker.child.requests, worker.child.answers):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        return worker.child.end(patience)

    def _want_to_write(self, worker: Worker) -> None:
        requests = worker.child.requests
        registered = requests in self._selector.get_map()
        if worker.outbox and not registered:
            self._selector.register(requests, selectors.EVENT_WRITE, worker)
        elif not worker.outbox and registered:
            self._selector.unregister(requests)
