"""Pieces of work for a worker, and what becomes of them when one fails."""

from dataclasses import dataclass
from typing import Any, Protocol


class Ledger(Protocol):
    """Where answers and failures are written down. Each method may raise to stop the batch."""

    def scored(self, function: int, index: int, answer: dict[str, Any]) -> None: ...

    def failed(self, function: int, index: int, cause: str, trace: str) -> None: ...

    def retried(self, function: int, count: int, cause: str, trace: str) -> None: ...

    def broken(self, function: int, text: str) -> None: ...

    def noticed(self, function: int, facts: dict[str, Any]) -> None: ...


@dataclass
class RewardJob:
    """Some completions for one function.

    function: its place in the list of functions. indices: the completions without an answer yet, in the order in which
    they are run. together: they run as one call (the batch form) or at the same time (async), so that of a failure
    it is not known whose it is. deadline: seconds for one completion. allowance: seconds until the next answer must
    have come. seconds: what it took, once it is done.
    """

    function: int
    indices: list[int]
    together: bool
    deadline: float
    allowance: float
    seconds: float | None = None
    failure: tuple[str, str] | None = None

    def take(self, answer: dict[str, Any], ledger: Ledger) -> None:
        """Write one answer of the worker down."""
        if "bad" in answer:
            ledger.broken(self.function, answer["bad"])
        elif "index" in answer:
            index = answer["index"]
            self.indices.remove(index)
            if "cause" in answer:
                ledger.failed(self.function, index, answer["cause"], answer["trace"])
            else:
                ledger.scored(self.function, index, answer)
        elif "cause" in answer:
            self.failure = (answer["cause"], answer["trace"])
        else:
            for place, index in enumerate(self.indices):
                extra = {column: values[place] for column, values in answer["extra"].items()}
                metrics = answer["metrics"] if place == 0 else []
                row = {"reward": answer["rewards"][place], "parts": {}, "extra": extra, "metrics": metrics}
                ledger.scored(self.function, index, row)
            self.indices = []

    def rest(self, ledger: Ledger) -> list["RewardJob"]:
        """What is left to run once the worker has finished with this job, or has died with `failure` set.

        The first completion without an answer is the one that failed. Completions that ran together are run again one
        by one, so that only the guilty one is lost.
        """
        if not self.indices:
            return []
        cause, trace = self.failure or ("no answer", "")
        if self.together and len(self.indices) > 1:
            ledger.retried(self.function, len(self.indices), cause, trace)
            return [RewardJob(self.function, [index], True, self.deadline, self.deadline) for index in self.indices]
        ledger.failed(self.function, self.indices[0], cause, trace)
        if len(self.indices) == 1:
            return []
        return [RewardJob(self.function, self.indices[1:], False, self.deadline, self.deadline)]
