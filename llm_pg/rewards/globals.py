"""Module-level state of a reward function, which lives in a worker process and nowhere else.

Three things go wrong without a word: a history that a function keeps (each worker has its own, and it is lost with it),
a global that the program sets after the import (a worker sees the value of the import), and a tracker that the function
logs to (its run is in the trainer's process). Each is found here by a look that costs microseconds.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

OWN = ("llm_pg.", "reward_fns.")  # modules that keep caches alone
TRACKERS = ("wandb", "trackio", "mlflow")
WRAPPED = (FunctionType, type(functools.cache(len)))
ORDERED = (list, tuple, deque, dict)
CONTAINERS = (*ORDERED, Counter, defaultdict, OrderedDict, set, bytearray)
MAX_ITEMS = 32  # of a container's end that are looked at
MAX_SHOWN = 80  # characters of a value in a message

Marks = dict[str, Any]
KEEP = "set reward_in_process=true"


class GlobalsWatch:
    """The globals that one function names, of its module, looked at after every job.

    One change is how a lazily made model or table looks; what changes twice is a state.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        space = _space_of(function)
        self._space = {} if str(space.get("__name__", "")).startswith(OWN) else space
        self._names = sorted({name for code in _codes(function) for name in code.co_names})
        self._last = _marks(self._space, self._names)
        self._changes: Counter[str] = Counter()

    def state(self) -> list[str]:
        """Returns the names that have changed now for the second time."""
        now = _marks(self._space, self._names)
        changed = [name for name in now if now[name] != self._last.get(name)]
        changed += [name for name in self._last if name not in now]
        self._last = now
        self._changes.update(changed)
        return [name for name in changed if self._changes[name] == 2]


def _marks(space: Mapping[str, Any], names: Sequence[str]) -> Marks:
    """What is compared of each global that can hold state, and of attributes of the module's own objects."""
    found: Marks = {}
    own = space.get("__name__")
    for name in names:
        value = space.get(name)
        if (mark := _mark(value)) is not None:
            found[name] = mark
        elif own is not None and _home(value) == own:
            for inner, thing in list(getattr(value, "__dict__", {}).items()):
                if not inner.startswith("__") and (mark := _mark(thing)) is not None:
                    found[f"{name}.{inner}"] = mark
    return found


def _home(value: Any) -> str:
    """The module of a function or class, or of an object's class."""
    return str((value if isinstance(value, (type, FunctionType)) else type(value)).__module__)


def _mark(value: Any) -> Any:
    """Something that differs where the value does; None for what is not looked at."""
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value), value
    if isinstance(value, itertools.count):
        return repr(value)
    if type(value) not in CONTAINERS:
        return None
    try:
        end = reversed(value.values() if isinstance(value, dict) else value) if isinstance(value, ORDERED) else ()
        items = tuple(
            item if isinstance(item, (bool, int, float, str)) else id(item) for item in itertools.islice(end, MAX_ITEMS)
        )
    except RuntimeError:  # a thread of the function's changes it meanwhile
        items = ()
    return type(value), len(value), items


def reads(function: Callable[..., Any]) -> dict[str, list[str]]:
    """Returns, of each global that a function reads, its type and its value in short. Functions, classes and modules
    are left out."""
    space = _space_of(function)
    names = _names_read(function)
    return {name: _glance(space[name]) for name in names if name in space and _is_value(space[name])}


def not_seen(function: Callable[..., Any], in_worker: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Gives (name, value here, value in the worker) of each global that a function would read otherwise here.

    in_worker: what `reads` gives there, before the first call.
    """
    for name, here in reads(function).items():
        there = list(in_worker.get(name, ["", "not defined"]))
        if here != there:
            yield name, " ".join(filter(None, here[::-1])), " ".join(filter(None, there[::-1]))


def unlogged(function: Callable[..., Any]) -> str | None:
    """Returns the call of a tracker that finds no run in this process ("wandb.log"), if the function makes one."""
    names = {name for code in _codes(function) for name in code.co_names}
    calls = [name for name in sorted(names) if name == "log" or name.startswith("log_")]
    if not calls or names & {"init", "start_run"}:
        return None
    space = _space_of(function)
    for tracker in TRACKERS:
        aliases = [name for name, v in space.items() if isinstance(v, ModuleType) and v.__name__ == tracker]
        if names & {tracker, *aliases} and not _has_run(tracker):
            return f"{tracker}.{calls[0]}"
    return None


def _has_run(tracker: str) -> bool:
    module = sys.modules.get(tracker)
    if module is None:
        return False
    if tracker == "wandb":
        return getattr(module, "run", None) is not None
    if tracker == "mlflow":
        return module.active_run() is not None
    return sys.modules["trackio.context_vars"].current_run.get() is not None


def _names_read(function: Callable[..., Any]) -> list[str]:
    import dis

    found = (
        instruction.argval
        for code in _codes(function)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return list(dict.fromkeys(found))


def _codes(function: Callable[..., Any]) -> Iterator[CodeType]:
    """The code of a function, of what is nested in it, and of what it names in its module: functions, methods."""
    space = _space_of(function)
    queue: list[Any] = [_plain(function)]
    seen: set[CodeType] = set()
    while queue:
        code = queue.pop()
        if isinstance(code, FunctionType):
            code = code.__code__ if code.__globals__ is space else None
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        yield code
        queue += [const for const in code.co_consts if isinstance(const, CodeType)]
        for value in (space[name] for name in code.co_names if name in space):
            if isinstance(value, WRAPPED):
                queue.append(getattr(value, "__wrapped__", value))
            elif _home(value) == space.get("__name__"):
                queue += vars(value if isinstance(value, type) else type(value)).values()


def _plain(function: Callable[..., Any]) -> Any:
    """The function itself: without decorators, of an object what is run when it is called."""
    found: Any = inspect.unwrap(function)
    if not isinstance(found, FunctionType):
        found = getattr(found, "__func__", None) or getattr(type(found), "__call__", None)  # noqa: B004
    return found


def _space_of(function: Callable[..., Any]) -> dict[str, Any]:
    return getattr(_plain(function), "__globals__", {})


def _is_value(value: Any) -> bool:
    return not isinstance(value, (ModuleType, FunctionType, BuiltinFunctionType, type))


def _glance(value: Any) -> list[str]:
    kind = f"({type(value).__name__})"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = repr(value)
        return [kind if value is not None else "", text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."]
    if isinstance(value, (list, tuple, deque, dict, set, frozenset, bytearray)):
        return [kind, f"{len(value)} items"]
    return [kind, "an object"]


def reported(function: Callable[..., Any] | None, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Gives what a worker has noticed, as (cause, words to follow the function's name).

    function: the object in this process; None where it is loaded in workers alone. facts: what the worker sent.
    """
    for name in facts.get("state", ()):
        yield (
            f"state {name}",
            f"keeps a state: its module's global `{name}` changes from call to call. It does so in each worker process "
            f"apart, is lost with the worker, and the program that trains never sees it. To keep it there, {KEEP}; a "
            "cache may stay as it is",
        )
    if function is not None and "reads" in facts:
        for name, here, there in not_seen(function, facts["reads"]):
            yield (
                f"global {name}",
                f"reads the global `{name}`, which is {here} in the program that trains and {there} in the worker "
                "process that runs the function: a worker imports the module afresh, and sees nothing that was set "
                f"afterwards. Set it where the module is imported, give it as a column or an option, or {KEEP}",
            )
    if call := facts.get("unlogged"):
        yield (
            f"tracker {call}",
            f"calls {call}, and runs in a worker process, where there is no run to log to. Take `log_metric` as an "
            f"argument, and log_metric(name, value) puts a number into the run's metrics; or {KEEP}",
        )
    if problem := facts.get("dropped"):
        yield "output", f"prints, and what is printed in the workers cannot be written and is dropped: {problem}"
