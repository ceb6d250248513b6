"""Reward functions that misbehave in every way of the fault list, loaded by the tests as `specimens.py:name`."""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

BAD = "BAD"  # the completion on which a specimen does what it is named for


def one(completion, **row):
    return 1.0


def length(completion):
    return float(len(completion))


def echo(completion, value):
    return value


def echo_of_option(completion, option, log_extra):
    log_extra("option", str(option))
    return 1.0


def raises(completion):
    if completion == BAD:
        return 1 / 0
    return 1.0


def raises_always(completion):
    raise KeyError("no such thing")


def batch_raises(completions, **kwargs):
    return [raises(completion) for completion in completions]


def hangs(completion):
    if completion == BAD:
        time.sleep(1e6)
    return 1.0


def holds_the_lock(completion):
    if completion == BAD:
        return float(9**9**9**9)
    return 1.0


def batch_hangs(completions, **kwargs):
    return [hangs(completion) for completion in completions]


def pause(completion, seconds):
    time.sleep(seconds)
    return 1.0


async def judge(completion, **row):
    await asyncio.sleep(1e6 if completion == BAD else 0.2)
    return 1.0


async def judge_that_blocks(completion, **row):
    if completion == BAD:
        time.sleep(1e6)
    await asyncio.sleep(0)
    return 1.0


async def batch_judge(completions, **kwargs):
    async def one_of(completion):
        await asyncio.sleep(0.2)
        return float(len(completion))

    return await asyncio.gather(*(one_of(completion) for completion in completions))


LOOPS = []


async def remembers_its_loop(completion):
    LOOPS.append(asyncio.get_running_loop())
    return float(len({id(loop) for loop in LOOPS}))


def exits(completion):
    if completion == BAD:
        os._exit(3)
    return 1.0


def exits_after_a_while(completion):
    time.sleep(0.3)
    return exits(completion)


def exits_politely(completion):
    if completion == BAD:
        sys.exit(0)
    return 1.0


async def async_exits_politely(completion):
    await asyncio.sleep(0)
    return exits_politely(completion)


def segfaults(completion):
    if completion == BAD:
        ctypes.string_at(0)
    return 1.0


def memory_bomb(completion):
    if completion == BAD:
        return float(len(bytearray(16 << 30)))
    return 1.0


def leaves_a_child(completion, pid_file):
    if completion == "child":
        child = subprocess.Popen(["sleep", "1000"])
        Path(pid_file).write_text(str(child.pid))
        os._exit(1)
    return 1.0


def forks_and_returns(completion):
    if completion == BAD:
        os.fork()
    return 1.0


def batch_forks_and_returns(completions, **kwargs):
    return [forks_and_returns(completion) for completion in completions]


async def async_forks_and_returns(completion):
    await asyncio.sleep(0)
    return forks_and_returns(completion)


def forks_and_raises(completion):
    if completion == BAD and os.fork() == 0:
        raise ValueError("in the child")
    return 1.0


def forks_and_returns_late(completion):
    if completion == BAD and os.fork() == 0:
        time.sleep(1.0)
    return 1.0


def forks_in_order(completion):
    """A child that ends by sys.exit, and one of multiprocessing: neither comes back."""
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return float(pool.apply(len, (completion,)))


SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


def leaves(completion, way, hangs=False):
    """Leaves a process behind in one of the ways there are."""
    {
        "fork": lambda: os.fork() or time.sleep(600),
        "setsid": lambda: os.fork() or (os.setsid(), time.sleep(600)),
        "double fork": lambda: os.fork() or (os.setsid(), os.fork() and os._exit(0), time.sleep(600)),
        "popen": lambda: subprocess.Popen(SLEEP),
        "popen in a session": lambda: subprocess.Popen(SLEEP, start_new_session=True),
        "no SIGTERM": lambda: subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600; sleep 600"]),
        "stopped": lambda: os.kill(subprocess.Popen(SLEEP, start_new_session=True).pid, signal.SIGSTOP),
        "thread": lambda: threading.Thread(target=subprocess.run, args=(SLEEP,)).start(),
        "multiprocessing": lambda: multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start(),
    }[way]()
    time.sleep(1e6 if hangs else 0.3)
    return 1.0


async def async_leaves(completion, way, hangs=False):
    await asyncio.create_subprocess_exec(*SLEEP, start_new_session=True)
    time.sleep(1e6 if hangs else 0.3)
    return 1.0


def runs_endless_code(completion):
    from llm_pg import sandbox

    if completion == BAD:
        sandbox.run("while True: pass", limits=sandbox.Limits(wall_s=60, cpu_s=60))
    return 1.0


def meddles(completion, numbers, **row):
    """Changes its inputs, prints, changes directory, seeds the generators, and writes to the protocol's old places."""
    numbers.append(99)
    row.clear()
    print("noise " * 1000)
    with contextlib.suppress(OSError):
        os.write(1, b"raw noise on descriptor 1\n")
    os.chdir("/")
    random.seed(0)
    return float(sum(numbers))


def prints_to_stderr(completion, **row):
    print("noise " * 1000, file=sys.stderr)
    return 1.0


def batch_meddles(prompts, completions, numbers, **kwargs):
    values = [float(sum(row)) for row in numbers]
    for row in numbers:
        row.clear()
    completions.clear()
    prompts.clear()
    return values


def clean(completion, numbers, **row):
    return float(sum(numbers) + 99)


def where(completion):
    return float(len(os.getcwd()))


def writes_into_the_pipe(completion):
    if completion == BAD:
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"\xff" * 64)
            except OSError:
                continue
    return 1.0


def draws(completion):
    return random.random()


async def async_draws(completion):
    drawn = random.random()
    await asyncio.sleep(0)
    return drawn


def returns_numpy(completions, **kwargs):
    import numpy

    return numpy.asarray([1.5] * len(completions), dtype=numpy.float32)


def returns_numpy_scalar(completion):
    import numpy

    return numpy.float32(0.5)


def returns_fixed(completions, result, **kwargs):
    """The batch form's answer is whatever the column `result` of the first row says."""
    return result[0]


def returns_fixed_plain(completion, result):
    return result


def returns_infinity(completion):
    return float("inf")


def returns_nan(completion):
    return float("nan") if completion == BAD else 1.0


def returns_parts(completion):
    return {"reward": 0.5, "format": completion != BAD, "depth": None if completion == BAD else 3}


def returns_parts_without_reward(completion):
    return {"score": 1.0}


def returns_none(completion):
    return None if completion == BAD else 1.0


def trl_form(
    prompts, completions, completion_ids, answer, trainer_state=None, log_extra=None, log_metric=None, **kwargs
):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    log_extra("seen", [f"{prompt}|{ids}" for prompt, ids in zip(prompts, completion_ids, strict=True)])
    log_metric("step", trainer_state.global_step)
    log_metric("others", len(kwargs["other"]))
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def trl_form_without_kwargs(completions, answer):
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def trl_form_of_messages(completions, **kwargs):
    return [float(messages[0]["content"] == "yes") for messages in completions]


def plain_with_everything(completion, prompt, completion_ids, trainer_state, log_extra, log_metric, **row):
    log_extra("seen", f"{prompt}|{completion_ids}|{sorted(row)}")
    log_metric("step", trainer_state.global_step)
    return float(completion == "yes")


def logs_too_few(completions, log_extra, **kwargs):
    log_extra("seen", [1])
    return [1.0] * len(completions)


def with_option(completion, factor=1.0):
    return factor * len(completion)


def needs_columns(completion, answer, tolerance=0.1):
    return 1.0


def wrong_names(text, label):
    return 1.0


def misspelt(completon, answer):
    return 1.0


def by_position(completion, /):
    return 1.0


class Callable:
    def __call__(self, completion):
        return 2.0


instance = Callable()
not_a_function = 3


# --- rewards that are unscored or out of range, and parameters of the other form


def tenth(completion):
    return 0.1


def raises_on_worse(completion):
    if completion == "WORSE":
        raise ValueError("worse")
    return 1.0


def raises_on_a_third(completion):
    if sum(map(ord, completion)) % 3 == 0:
        raise ValueError("a third of all")
    return float(len(completion))


def tenth_of_all(completions, **kwargs):
    return [0.1 for _ in completions]


def batch_returns_none(completions, **kwargs):
    return [None if completion == BAD else 1.0 for completion in completions]


def batch_echo(completions, value):
    return value


def echo_parts(completion, value):
    return {"reward": 1.0, "depth": value}


def logs_huge_metrics(completion, log_metric):
    log_metric("huge", 1.7e308)
    log_metric("infinite", float("inf") if completion == "a" else float("-inf"))
    return 1.0


def batch_with_completion(completions, completion, **kwargs):
    return [float(completion == each) for each in completions]


def batch_with_prompt(completions, prompt):
    return [1.0 for _ in completions]


def plain_with_prompts(completion, prompts):
    return 1.0
