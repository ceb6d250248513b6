"""Scores for a batch of completions: several functions, weighted, each bounded in time, nothing lost without a word."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llm_pg.processes.frames import encode
from llm_pg.processes.guard import can_stand
from llm_pg.rewards.batch import RewardBatch
from llm_pg.rewards.jobs import RewardJob
from llm_pg.rewards.models import ModelReward
from llm_pg.rewards.perform import Loaded, Performer
from llm_pg.rewards.pool import PoolError, UnloadedError, WorkerPool
from llm_pg.rewards.specs import RewardFunction, Spec, explain, resolve_all
from llm_pg.rewards.tally import RewardError, Scores, Tally

logger = logging.getLogger(__name__)
_tally_logger = logging.getLogger(Tally.__module__)

LONGEST_BATCH_CALL = 600.0  # seconds, the default limit of one call of a batch function
GRACE = 0.5  # seconds beyond their own deadline before async completions are given up by force
PATIENCE = 20.0  # times the slowest pace seen of a batch function, after which its call is given up
PIECES = 8  # jobs a worker gets of a plain function's batch, so that a slow one does not keep the rest waiting
LARGEST_PIECE = {"serial": 32, "together": 64}  # completions a job holds at most


class Scorable(Protocol):
    """Completions that wait for their scores."""

    @property
    def inputs(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Sequence[int]], Sequence[Mapping[str, Any]]]: ...

    @property
    def num_steps(self) -> int: ...

    def scored(self, scores: Scores) -> Any: ...


class Scorer:
    """Runs reward functions in worker processes that are killed when they are late. A context manager.

    A batch function has deadline x completions, at most 600 s, and no more than 20 times its slowest pace so far
    (never less than one deadline). After a failure it is called once for each completion, so that only the one that
    fails is lost; a function that compares the completions of its batch then sees lists of one.

    Before each call a worker's `random` and numpy generators are seeded with the batch and the completion's place in
    it, so a function that draws numbers gives the same score in whichever worker it runs, and after a resume. An async
    function draws before its first await: afterwards the others that wait beside it draw too.

    Args:
        funcs: functions, names, addresses or reward models, as `reward_funcs` of a trainer.
        weights: one finite number each; None = 1 each.
        workers: processes, >= 1.
        deadline: seconds for one completion; past it the worker is killed, the completion has no score (None) and the
            rest is scored.
        batch_deadline: seconds for one call of a batch function; None = as above.
        in_process: run all functions in this process, without deadlines or protection. Always so where the system has
            no fork (Windows), with a warning. Functions that a worker cannot load (lambdas, closures, notebooks) run
            here in any case, with one warning.
        max_unscorable: share of a batch in [0, 1]. RewardError when a function fails on more of it, or when more of
            its completions end without any score. A returned None is no failure.
        strict: RewardError at the first failure.
        clip_range: (lowest, highest) that the weighted sum of the functions is clipped to; None = as it is.
        memory_gib: limit on the address space of a worker (RLIMIT_AS); None = no limit. A process that uses CUDA
            reserves far more than it uses.
        load_deadline: seconds for a worker to import the functions.
        output: file to which workers' prints are appended; None = the standard error.
    """

    def __init__(
        self,
        funcs: Sequence[Spec],
        weights: Sequence[float] | None = None,
        *,
        workers: int = 2,
        deadline: float = 10.0,
        batch_deadline: float | None = None,
        in_process: bool = False,
        max_unscorable: float = 0.2,
        strict: bool = False,
        clip_range: Sequence[float] | None = None,
        memory_gib: float | None = None,
        load_deadline: float = 120.0,
        output: Path | None = None,
    ) -> None:
        _check("workers", workers, workers >= 1, "at least 1")
        _check("deadline", deadline, deadline > 0, "a positive number of seconds")
        _check("batch_deadline", batch_deadline, batch_deadline is None or batch_deadline > 0, "positive or None")
        _check("max_unscorable", max_unscorable, 0 <= max_unscorable <= 1, "a share from 0 to 1")
        ordered = clip_range is None or (len(clip_range) == 2 and clip_range[0] < clip_range[1])
        _check("clip_range", clip_range, ordered, "a lowest and a highest reward, or None")
        _check("memory_gib", memory_gib, memory_gib is None or memory_gib > 0, "positive or None")
        self.functions = resolve_all(list(funcs))
        if not self.functions:
            raise ValueError("A scorer needs at least one reward function; funcs is empty.")
        self.weights = _weights(weights, self.functions)
        self._deadline, self._batch_deadline = deadline, batch_deadline
        self._max_unscorable, self._strict, self._clip_range = max_unscorable, strict, clip_range
        self.share = 1.0  # of a step that the next completions are: max_unscorable is of the whole step
        self.whole = True  # whether they are all of the step; a part of it may be without any score
        self._workers, self._output, self._load_deadline = workers, output, load_deadline
        if not in_process and not can_stand():
            logger.warning(
                "This system has no worker processes that can be killed (no os.fork): reward functions run in this "
                "process, without deadlines. One that hangs stops the run."
            )
            in_process = True
        self._memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        self._here = {
            place: Loaded(function.name, function.loaded(), function.signature, function.options)
            for place, function in enumerate(self.functions)
            if in_process or function.target is None
        }
        if not in_process:
            self._warn_of_functions_here()
        self._pooled = [place for place in range(len(self.functions)) if place not in self._here]
        for place in self._pooled:
            self.functions[place].check_portable()
        self.pool: WorkerPool | None = None
        self._performer = Performer(prepare=lambda index: None)
        self._shown: set[tuple[str, str]] = set()
        self._pace: dict[int, float] = {}  # seconds a completion of the slowest call so far, by batch function

    def __enter__(self) -> "Scorer":
        if self._pooled:
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write_output_to(self, path: Path) -> None:
        """Appends what workers print to a file, from the next start of the workers on.

        Args:
            path: the file.
        """
        self._output = path

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
        self._performer.close()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Checks that the data have what the functions need.

        Args:
            columns: names of the data's columns.

        Raises:
            ValueError: a function needs a column that is not among these.
        """
        for function in self.functions:
            function.check_columns(columns)

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Checks every row with the functions that can.

        Args:
            rows: of the data.

        Raises:
            ValueError: there are rows that a function cannot grade.
        """
        for function in self.functions:
            function.check_rows(rows)

    def score(self, samples: Scorable) -> Any:
        """Scores sampled completions.

        Args:
            samples: of `Sampler.sample`, or one's own with `inputs`, `num_steps` and `scored`.

        Returns:
            What `samples.scored` makes of the scores: an `Experience`, whose rollouts can be learned from.

        Raises:
            RewardError: the run should stop; the scorer stays usable.
        """
        return samples.scored(self.grade(*samples.inputs, trainer_state={"global_step": samples.num_steps}))

    def grade(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
        trainer_state: Any = None,
    ) -> Scores:
        """Scores B completions.

        Args:
            prompts: texts, or lists of messages.
            completions: texts, or lists of messages.
            completion_ids: token ids of each, unpadded, with the end token.
            rows: the dataset row of each (a mapping of columns).
            trainer_state: given to functions that ask for it, its scalar fields only.

        Raises:
            RewardError: the run should stop; the scorer stays usable.
        """
        batch = RewardBatch(prompts, completions, completion_ids, rows, trainer_state)
        lengths = [len(ids) for ids in completion_ids]
        limits = self._max_unscorable, self._strict, self._shown, self.share
        tally = Tally(self.functions, batch.size, *limits, lengths, whole=self.whole)
        self._run(batch, tally, range(len(self.functions)))
        scores = tally.scores(self.weights)
        if self._clip_range is not None:
            low, high = self._clip_range
            if scores.tokens is not None:
                raise RewardError(
                    f"reward_clip_range is [{low:g}, {high:g}] and clips the reward of a completion, and a reward "
                    "function gave one for each token. Leave reward_clip_range out, or let the function clip what it "
                    "returns."
                )
            scores.reward = [None if reward is None else min(max(reward, low), high) for reward in scores.reward]
        return scores

    def try_out(
        self,
        name: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
    ) -> Scores:
        """Scores completions with one function alone, in the same workers; for audits. Failures are counted in
        `problems`, and neither shown nor limited.

        Args:
            name: of the function.
            prompts: texts, or lists of messages.
            completions: texts, or lists of messages.
            completion_ids: token ids of each.
            rows: the dataset row of each.

        Raises:
            RewardError: the function breaks its contract.
        """
        place = [function.name for function in self.functions].index(name)
        batch = RewardBatch(prompts, completions, completion_ids, rows)
        tally = Tally(self.functions, batch.size, 1.0, False, set())
        tally.leave_out([other for other in range(len(self.functions)) if other != place])
        paces, level = dict(self._pace), _tally_logger.level
        _tally_logger.setLevel(logging.ERROR)
        try:
            self._run(batch, tally, [place])
        finally:
            _tally_logger.setLevel(level)
            self._pace = paces
        return tally.scores(self.weights)

    def place_models(self, device: Any) -> None:
        """Loads the reward models among the functions and moves them to a device.

        Args:
            device: of torch.

        Raises:
            ValueError: one is no reward model.
        """
        for function in self.functions:
            if isinstance(function.function, ModelReward):
                function.function.place(device)

    def runs_here(self, name: str) -> bool:
        """Returns whether a function runs in this process, and not in a worker.

        Args:
            name: of the function.
        """
        return any(self.functions[place].name == name for place in self._here)

    def _run(self, batch: RewardBatch, tally: Tally, places: Sequence[int]) -> None:
        if not batch.size:
            return
        self._run_pooled(batch, tally, [place for place in self._pooled if place in places])
        for place in self._here:
            if place in places:
                self._run_here(place, batch, tally)

    def _run_pooled(self, batch: RewardBatch, tally: Tally, places: Sequence[int]) -> None:
        jobs = deque(job for place in places for job in self._jobs(place, batch.size, self._workers))
        if not jobs:
            return
        # A batch function is one long job, so it starts first; the pieces of the others fill in around it.
        jobs = deque(sorted(jobs, key=lambda job: -len(job.indices)))
        numbers = {place: number for number, place in enumerate(self._pooled)}

        def encoded(job: RewardJob) -> bytes:
            message = batch.job(self.functions[job.function].signature, job.indices, job.deadline)
            return encode({"function": numbers[job.function], **message})

        calls = [job for job in jobs if self.functions[job.function].signature.form == "batch"]
        try:
            self._open().run(jobs, encoded, tally)
        except UnloadedError as error:
            function = self.functions[self._pooled[error.place]]
            assert function.target is not None
            raise RewardError(explain(error, function.name, function.target.qualname)) from None
        except PoolError as error:
            raise RewardError(str(error)) from error
        for job in calls:
            if job.seconds is not None and job.failure is None:
                self._pace[job.function] = max(self._pace.get(job.function, 0.0), job.seconds / batch.size)

    def _run_here(self, place: int, batch: RewardBatch, tally: Tally) -> None:
        loaded = self._here[place]
        jobs = deque(self._jobs(place, batch.size, 1))
        while jobs:
            job = jobs.popleft()
            answers: list[dict[str, Any]] = []
            message = batch.job_here(loaded.signature, job.indices, job.deadline)
            self._performer.perform(loaded, message, answers.append)
            for answer in answers:
                job.take(answer, tally)
            jobs.extendleft(reversed(job.rest(tally)))

    def _jobs(self, place: int, size: int, workers: int) -> list[RewardJob]:
        signature, deadline = self.functions[place].signature, self._deadline
        if signature.form == "batch":
            longest = min(deadline * size, LONGEST_BATCH_CALL, PATIENCE * self._pace.get(place, math.inf) * size)
            allowance = self._batch_deadline or max(deadline, longest)
            return [RewardJob(place, list(range(size)), True, deadline, allowance)]
        if signature.is_async:
            piece, allowance = min(LARGEST_PIECE["together"], math.ceil(size / workers)), deadline + GRACE
        else:
            piece, allowance = min(LARGEST_PIECE["serial"], math.ceil(size / (PIECES * workers))), deadline
        starts = range(0, size, piece)
        return [
            RewardJob(place, list(range(start, min(start + piece, size))), signature.is_async, deadline, allowance)
            for start in starts
        ]

    def _open(self) -> WorkerPool:
        if self.pool is None:
            self.pool = WorkerPool(
                [self.functions[place].for_worker() for place in self._pooled],
                self._workers,
                load_deadline=self._load_deadline,
                memory_bytes=self._memory_bytes,
                output=self._output,
            )
            self.pool.start()
        return self.pool

    def _warn_of_functions_here(self) -> None:
        for loaded_place in self._here:
            function = self.functions[loaded_place]
            if isinstance(function.function, ModelReward):
                continue  # it belongs here
            logger.warning(
                "Reward function %s runs in this process, without a deadline, because %s. Put it in a file of its own "
                "to have it in a worker that can be killed.",
                function.name,
                function.reason,
            )


def _weights(weights: Sequence[float] | None, functions: Sequence[RewardFunction]) -> list[float]:
    if weights is None:
        return [1.0] * len(functions)
    if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"weights must be one finite number for each of the {len(functions)} reward functions "
            f"({', '.join(function.name for function in functions)}); got {list(weights)}."
        )
    return [float(weight) for weight in weights]


def _check(name: str, value: Any, is_right: bool, rule: str) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {rule}; got {value!r}.")
