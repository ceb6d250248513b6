"""Run Python that a model wrote, and judge it, without trusting it. Linux; standard library and ctypes only.

    from llm_pg import sandbox
    sandbox.level()                                 # what protects this machine; logged with the first run
    result = sandbox.run("print(input()[::-1])", "abc", limits=sandbox.Limits(cpu_s=2))
    result.stdout                                   # "cba\\n"

Each run is a supervisor process and, below it, the program in a folder of its own: Landlock, a filter of system calls
and resource limits always; user, pid, network, ipc, uts and mount namespaces where the system allows them.
`SECURITY.md` says what this holds and what it does not. `llm_pg.sandbox.judging` runs programs against tests.
"""

from llm_pg.sandbox.levels import level
from llm_pg.sandbox.runs import failures, run, run_many
from llm_pg.sandbox.spec import Job, Level, Limits, Result, SandboxError, SandboxRefused

__all__ = [
    "Job",
    "Level",
    "Limits",
    "Result",
    "SandboxError",
    "SandboxRefused",
    "failures",
    "level",
    "run",
    "run_many",
]
