"""The process that runs reward functions: loads them by address, answers jobs on a pipe, and is killed without notice.

The protocol is on what were descriptors 0 and 1, which are moved away before any user code is loaded.
"""

import io
import os
import random
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_pg.processes.child import own_pipes
from llm_pg.processes.frames import encode, read, write
from llm_pg.rewards.contract import read_signature
from llm_pg.rewards.forks import OneProcess
from llm_pg.rewards.globals import GlobalsWatch, reads, unlogged
from llm_pg.rewards.loading import LoadError, Target, load
from llm_pg.rewards.perform import Loaded, Performer, failure


def main() -> None:
    """Serve the trainer until it closes the pipe; the guard ends this process with the trainer."""
    try:
        _run()
    except BrokenPipeError:
        sys.exit(0)  # the parent has gone; there is nobody to tell


class _Output(io.FileIO):
    """Where functions print. What a full disk does not take is dropped: no score depends on it."""

    problem: str | None = None  # why something was dropped in this job

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.problem = self.problem or error.strerror
            return len(data)

    def as_text(self, *, by_lines: bool) -> io.TextIOWrapper:
        buffered = io.BufferedWriter(self)
        return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace", line_buffering=by_lines)


def _run() -> None:
    jobs, answers = own_pipes()
    output = _Output(1, "w", closefd=False)
    sys.stdout, sys.stderr = output.as_text(by_lines=False), output.as_text(by_lines=True)
    setup = read(jobs)
    if setup is None:
        return
    _limit(setup["memory_bytes"])
    functions = []
    for place, entry in enumerate(setup["functions"]):
        try:
            with OneProcess():
                functions.append(_load(entry))
        except LoadError as error:
            write(answers, encode({"unloaded": place, "kind": error.kind, "text": str(error), "near": error.near}))
            return
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's module raised; the parent shows how
            text = failure(error)["trace"]
            write(answers, encode({"unloaded": place, "kind": "import", "text": text, "near": []}))
            return
    write(answers, encode({"ready": [asdict(loaded.signature) for loaded in functions]}))
    _serve(functions, jobs, answers, output)


def _serve(functions: list[Loaded], jobs: int, answers: int, output: _Output) -> None:
    home = os.open(".", os.O_RDONLY)
    seed = ""

    def prepare(index: int) -> None:
        """Undo what an earlier call left behind, so that a score depends on its completion, not on the worker."""
        os.fchdir(home)
        random.seed(f"{seed} {index}")
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(random.getrandbits(32))

    performer = Performer(prepare)
    watches: dict[int, GlobalsWatch] = {}
    while (job := read(jobs)) is not None:
        number, seed = job["function"], job["seed"]
        loaded, facts = functions[number], {}
        if number not in watches:
            watches[number] = GlobalsWatch(loaded.function)
            facts = {"reads": reads(loaded.function), "unlogged": unlogged(loaded.function)}
        write(answers, encode({"begun": True, **facts}))
        performer.perform(loaded, job, lambda answer: write(answers, encode(answer)))
        sys.stdout.flush()
        write(answers, encode({"done": True, "state": watches[number].state(), "dropped": output.problem}))
        output.problem = None


def _load(entry: dict[str, Any]) -> Loaded:
    function = load(Target(**entry["target"]))
    try:
        signature = read_signature(function, entry["name"])
    except ValueError as error:
        raise LoadError("signature", str(error), []) from error
    prepare = getattr(function, "prepare", None)
    if prepare is not None:  # now, so that what it loads does not count towards the first deadline
        prepare(**entry["options"])
    return Loaded(entry["name"], function, signature, entry["options"])


def _limit(memory_bytes: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        adjustment.write_text("1000")  # when the machine runs out of memory, this process goes before the trainer
