"""What honest programs get, how limits and failures are told, and that nothing leaks."""

import gc
import logging
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from escape_attempts import left_over
from sandbox_levels import level_or_skip

from llm_pg import sandbox
from llm_pg.sandbox import launch, levels, syscalls
from llm_pg.sandbox import runs as runs_module

LIMITS = sandbox.Limits(wall_s=20, cpu_s=10)

HONEST = {
    "standard input and output": ("import sys\nprint(input()[::-1]); print(len(sys.stdin.read()))", "cba\n3\n"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as t: print(sum(t.map(abs, range(-9, 0))))",
        "45\n",
    ),
    "asyncio": (
        "import asyncio\nasync def f():\n await asyncio.sleep(0.001)\n return 7\nprint(asyncio.run(f()))",
        "7\n",
    ),
    "files of its own": (
        "import os, tempfile, shutil\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        " open(d + '/a', 'w').write('x' * 10); os.rename(d + '/a', d + '/b'); shutil.copyfile(d + '/b', 'c')\n"
        "f = open('c', 'r+'); f.truncate(4); f.flush(); os.fsync(f.fileno())\n"
        "print(os.path.getsize('c'), sorted(os.listdir()))",
        "4 ['c', 'main.py']\n",
    ),
    "time zones": (
        "import zoneinfo, datetime\n"
        "print(datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('Europe/Paris')).utcoffset())",
        "2:00:00\n",
    ),
    "the standard library": (
        "import collections, heapq, itertools, math, re, functools, decimal, fractions, random, string, bisect, json\n"
        "import dataclasses, typing, datetime, statistics, hashlib, copy, operator, enum, inspect, logging, unittest\n"
        "print(hashlib.sha256(b'').hexdigest()[:8], math.comb(5, 2))",
        "e3b0c442 10\n",
    ),
    "a deep recursion": (
        "import sys\nsys.setrecursionlimit(20000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(15000))",
        "15000\n",
    ),
    "a script's main": ("if __name__ == '__main__': print('main')", "main\n"),
    "signals to itself": (
        "import signal\n"
        "def handler(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, handler)\n"
        "try:\n signal.setitimer(signal.ITIMER_REAL, 0.01)\n while True: pass\nexcept TimeoutError: print('alarm')",
        "alarm\n",
    ),
    "text in any script": ("print('naïve ☃ 漢字')", "naïve ☃ 漢字\n"),
}


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_program_works(case: str, level: sandbox.Level, runs: str) -> None:
    if case == "time zones" and not os.path.exists("/usr/share/zoneinfo/Europe/Paris"):
        pytest.skip("this machine has no time zone data")
    code, expected = HONEST[case]
    result = sandbox.run(code, "abc\nde\n", limits=LIMITS, level=level)
    assert (result.status, result.stdout) == ("ok", expected), result
    assert left_over(runs) == []


def test_child_processes_work_when_they_are_allowed(level: sandbox.Level) -> None:
    code = (
        "import os, subprocess, sys\n"
        "if len(sys.argv) > 1: print('child', flush=True); sys.exit()\n"
        "print(subprocess.run([sys.executable, '-S', 'main.py', 'x'], capture_output=True, text=True).stdout)"
    )
    limits = sandbox.Limits(wall_s=20, cpu_s=10, fork=True)
    result = sandbox.run(code, limits=limits, level=level)
    assert result.stdout == "child\n\n", result


def test_installed_packages_are_there_only_when_asked_for(level: sandbox.Level) -> None:
    pytest.importorskip("numpy")
    code = "import numpy; print(int(numpy.arange(4).sum()))"
    limits = sandbox.Limits(wall_s=20, cpu_s=10, memory_mb=2048)
    assert "ModuleNotFoundError" in sandbox.run(code, limits=limits, level=level).stderr
    try:
        result = sandbox.run(code, limits=limits, level=level, packages=True)
    except sandbox.SandboxRefused as error:
        pytest.skip(str(error))
    assert result.stdout == "6\n", result


def test_a_set_prints_in_the_same_order_in_every_run() -> None:
    code = "print({str(n) for n in range(50)})"
    assert len({sandbox.run(code).stdout for _ in range(3)}) == 1


def test_the_way_a_program_ended_is_told() -> None:
    ends = {
        "import sys; sys.exit(3)": ("error", 3, None),
        "import os; os._exit(0)": ("ok", 0, None),
        "1/0": ("error", 1, None),
        "this is not python": ("error", 1, None),
        "\0": ("error", 1, None),
        "x = '\udcff": ("error", 1, None),
        "import os; os.kill(0, 15); import time; time.sleep(9)": None,
    }
    for code, expected in ends.items():
        result = sandbox.run(code, level=sandbox.level(namespaces=False))
        if expected is None:
            assert (result.status, result.signal) == ("signal", signal.SIGTERM)
        else:
            assert (result.status, result.exit_code, result.signal) == expected, result


def test_output_is_cut_at_the_limit_to_the_byte() -> None:
    limits = sandbox.Limits(output_kb=3)
    at = sandbox.run("print('x' * (3 * 1024 - 1))", limits=limits)
    over = sandbox.run("print('x' * (3 * 1024))", limits=limits)
    assert (at.status, len(at.stdout)) == ("ok", 3 * 1024)
    assert (over.status, len(over.stdout)) == ("output", 3 * 1024)


def test_a_big_input_and_a_big_output_cross_whole() -> None:
    text = "".join(f"{n}\n" for n in range(200_000))
    result = sandbox.run("import sys; sys.stdout.write(sys.stdin.read())", text, limits=sandbox.Limits(output_kb=4096))
    assert result.stdout == text


def test_many_runs_keep_their_order() -> None:
    jobs = [sandbox.Job("print(int(input()) ** 2)", str(n)) for n in range(12)]
    results = sandbox.run_many(jobs, workers=4)
    assert [result and result.stdout for result in results] == [f"{n * n}\n" for n in range(12)]


@pytest.mark.parametrize("name", ["wall_s", "cpu_s", "memory_mb", "tasks", "disk_mb"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_limits_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        sandbox.Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "main.py"])
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="plain names"):
        launch.RunningSandbox(sandbox.Job("", files={name: ""}), LIMITS, sandbox.level())


@pytest.mark.faults
def test_a_killed_supervisor_is_an_error_and_no_result(level: sandbox.Level, runs: str) -> None:
    running = launch.RunningSandbox(sandbox.Job("import time; time.sleep(60)"), LIMITS, level)
    deadline = time.monotonic() + 20
    while not any(found.startswith("process") for found in left_over(runs)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.process.kill()
    with pytest.raises(sandbox.SandboxError, match="without a report"):
        running.finish()
    deadline = time.monotonic() + 10
    while left_over(runs):
        assert time.monotonic() < deadline, left_over(runs)
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["no interpreter", "no room", "no filter"])
def test_a_sandbox_that_is_down_gives_none_and_is_counted(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    level = sandbox.level()
    if fault == "no interpreter":
        monkeypatch.setattr(launch, "interpreter", lambda: "/nonexistent/python")
    elif fault == "no room":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    else:
        monkeypatch.setattr(launch, "filter_program", lambda *_, **__: b"not a program....")
    sandbox.failures.clear()
    assert sandbox.run_many([sandbox.Job("print(1)")] * 2, level=level) == [None, None]
    assert sum(sandbox.failures.values()) == 2
    assert any(record.levelno == logging.ERROR and "not scored" in record.message for record in caplog.records)
    with pytest.raises(sandbox.SandboxError):
        sandbox.run("print(1)", level=level)


@pytest.mark.faults
def test_where_nothing_contains_the_code_it_is_refused_until_someone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runs_module.CONSENT, raising=False)
    open_level = sandbox.Level(reason="a test")
    with pytest.raises(sandbox.SandboxRefused, match=f"a test.*{runs_module.CONSENT}=1"):
        sandbox.run("print(1)", level=open_level)
    assert sandbox.run("print(1)", level=open_level, allow_uncontained=True).stdout == "1\n"
    monkeypatch.setenv(runs_module.CONSENT, "1")
    assert sandbox.run("print(1)", level=open_level).stdout == "1\n"


@pytest.mark.faults
@pytest.mark.parametrize("hole", ["landlock", "filter_system_calls"])
def test_a_level_is_believed_only_after_a_trial(hole: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A supervisor in which one protection silently does nothing, as under a kernel that only claims to have it."""
    for name in ("_supervisor", "_kernel", "_cleanup"):
        source = (Path(levels.__file__).parent / f"{name}.py").read_text()
        holed = source + f"\n{hole} = lambda *_: None\n" if name == "_kernel" else source
        (tmp_path / f"{name}.py").write_text(holed)
    monkeypatch.setattr(launch, "HERE", str(tmp_path))
    levels.tried_level.cache_clear()
    try:
        found = sandbox.level()
        assert not found.contained
        assert ("read" if hole == "landlock" else "socket") in found.reason
    finally:
        levels.tried_level.cache_clear()


def test_the_level_in_force_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    runs_module.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="llm_pg.sandbox"):
        sandbox.run("pass")
        sandbox.run("pass")
    assert [record.message for record in caplog.records] == [f"Sandbox for model-written code: {sandbox.level()}"]


def test_the_numbers_of_system_calls_are_those_of_the_kernel_headers() -> None:
    headers = {
        "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)"),
        "aarch64": ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+) (\d+)"),
    }
    checked = 0
    for arch, (path, pattern) in headers.items():
        if os.path.exists(path):
            official = {name: int(number) for name, number in re.findall(pattern, Path(path).read_text())}
            official["newfstatat"] = official.get("newfstatat", official.get("fstatat", -1))
            for table in (syscalls.FREE, syscalls.CONDITIONAL):
                for name, number in syscalls.numbers(table, arch).items():
                    assert official[name] == number, (arch, name)
                    checked += 1
    if not checked:
        pytest.skip("the kernel's headers are not installed")


def test_the_filter_lists_no_call_that_reaches_outside() -> None:
    listed = set(syscalls.numbers(syscalls.FREE, "x86_64"))
    outside = (
        "socket connect bind accept ptrace process_vm_readv pidfd_getfd chmod fchmod chown utimensat truncate symlink "
        "link mknod mount unshare setns setsid setpgid setuid setpriority sched_setaffinity io_uring_setup bpf "
        "memfd_create shmget msgget mq_open keyctl perf_event_open userfaultfd execveat open_by_handle_at seccomp"
    )
    assert listed.isdisjoint(outside.split())


def _footprint() -> tuple[int, int, int, int]:
    gc.collect()
    children = len([pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()])
    memory_kb = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    return children, len(os.listdir("/proc/self/fd")), threading.active_count(), memory_kb


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize(
    ("name", "executions"),
    [
        ("Landlock", 100),
        pytest.param("Landlock", 1000, marks=pytest.mark.slow),
        pytest.param("namespaces", 1000, marks=pytest.mark.slow),
    ],
)
def test_executions_leave_no_process_folder_descriptor_or_memory(name: str, executions: int, runs: str) -> None:
    """Row S3. A mixture: honest, crashing, forking and lingering, writing, over its limits."""
    level = level_or_skip(name)
    linger = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n"
    mixture = [
        (sandbox.Job("print(1)"), sandbox.Limits()),
        (sandbox.Job("import ctypes; ctypes.string_at(0)"), sandbox.Limits()),
        (sandbox.Job("open('a', 'w').write('x' * 1000); 1/0"), sandbox.Limits()),
        (sandbox.Job(linger), sandbox.Limits(fork=True)),
        (sandbox.Job("print('x' * 5000)"), sandbox.Limits(output_kb=1)),
    ]

    def batch(count: int) -> None:
        for job, limits in mixture:
            results = sandbox.run_many([job] * (count // len(mixture)), limits=limits, level=level)
            assert None not in results

    batch(10)
    before = _footprint()
    batch(executions)
    after = _footprint()
    assert left_over(runs) == []
    assert after[:3] == before[:3]
    assert after[3] - before[3] <= 5 * 1024


def _child_cpu_s(action: Callable[[], object]) -> float:
    """The processor time of the children that an action starts, the median of 15."""
    times = []
    for _ in range(15):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        action()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(times)


def test_a_run_costs_less_than_six_starts_of_an_interpreter(level: sandbox.Level) -> None:
    bare = [launch.interpreter(), "-I", "-S", "-E", "-c", "pass"]
    start = _child_cpu_s(lambda: subprocess.run(bare, check=True))
    assert _child_cpu_s(lambda: sandbox.run("pass", level=level)) < 6 * start
