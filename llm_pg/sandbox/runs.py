"""Run programs that a model wrote: one, or many at once."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from llm_pg.sandbox import launch
from llm_pg.sandbox.levels import level as find_level
from llm_pg.sandbox.levels import open_to_all
from llm_pg.sandbox.spec import Job, Level, Limits, Result, SandboxError, SandboxRefused

CONSENT = "LLM_PG_UNCONTAINED_CODE"

log = logging.getLogger("llm_pg.sandbox")

failures: Counter[str] = Counter()
"""How often the sandbox, and not the code in it, failed in this process, by cause."""


def run(
    code: str,
    stdin: str = "",
    *,
    limits: Limits | None = None,
    level: Level | None = None,
    packages: bool = False,
    allow_uncontained: bool = False,
) -> Result:
    """Run one Python program to its end and tell what it did. Thread-safe.

    code, stdin: the program's source and its standard input. The working directory is an empty folder of its own.
    level: what to use instead of the highest level this machine gives (`sandbox.level()`).
    packages: the code may import what is installed beside this interpreter; otherwise the standard library only.
    allow_uncontained: run even where nothing but resource limits holds the code. The same as setting the
        environment variable LLM_PG_UNCONTAINED_CODE to 1.

    Raises SandboxError when the sandbox failed, so that nothing is known about the code: score it None, never 0.
    Raises SandboxRefused where the code could not be contained and nobody allowed it to run all the same.
    """
    limits = limits or Limits()
    chosen = choose(level, packages=packages, allow_uncontained=allow_uncontained)
    return launch.RunningSandbox(Job(code, stdin), limits, chosen, packages=packages).finish()


def run_many(
    jobs: Iterable[Job],
    *,
    limits: Limits | None = None,
    level: Level | None = None,
    packages: bool = False,
    allow_uncontained: bool = False,
    workers: int | None = None,
) -> list[Result | None]:
    """Run programs side by side, `workers` at a time (default: the processors this process may use).

    The results are in the order of the jobs; None where the sandbox failed, which is logged and counted in
    `failures`. Arguments and SandboxRefused as in `run`.
    """
    limits = limits or Limits()
    chosen = choose(level, packages=packages, allow_uncontained=allow_uncontained)

    def attempt(job: Job) -> Result | None:
        try:
            return launch.RunningSandbox(job, limits, chosen, packages=packages).finish()
        except SandboxError as error:
            count_failure(error)
            return None

    with ThreadPoolExecutor(workers or num_processors()) as pool:
        return list(pool.map(attempt, jobs))


def choose(level: Level | None, *, packages: bool, allow_uncontained: bool) -> Level:
    """The level for a run; raises SandboxRefused where that is not enough."""
    chosen = level or find_level()
    if not chosen.contained and not (allow_uncontained or os.environ.get(CONSENT) == "1"):
        raise SandboxRefused(
            f"This machine cannot contain code that a model wrote: {chosen.reason}. It needs Linux 5.13 or newer with "
            f"Landlock, on 64-bit x86 or arm. To run the code with no protection but resource limits, set {CONSENT}=1."
        )
    if packages and chosen.uid is not None:
        closed = [path for path in launch.package_folders() if os.path.exists(path) and not open_to_all(path)]
        if closed:
            raise SandboxRefused(f"packages=True was asked for, and runs by root cannot read {', '.join(closed)}.")
    announce(chosen)
    return chosen


def count_failure(error: SandboxError) -> None:
    """Count and log a failure of the sandbox: the first of each cause in full."""
    cause = str(error).partition("\n")[0][:200]
    failures[cause] += 1
    log.error("The sandbox failed, so the code is not scored (%d times): %s", failures[cause], cause)


def num_processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def announce(chosen: Level) -> None:
    (log.info if chosen.contained else log.warning)("Sandbox for model-written code: %s", chosen)
