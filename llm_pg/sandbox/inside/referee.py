"""The side of the tests: run each against the solution at the other end of the socket, and print a verdict for each.

A verdict is a line of standard output that begins with the nonce: test, unit, word, reason. The model's code is not in
this process, so nothing that it defines, patches or prints can write one, or count an assertion that was not reached.

A unit is passed that reached an assertion, ended as it should, and left no failed assertion behind. One that ended well
before anything was asked of the program is "idle": its outcome is the same for every program. What fails before that is
the test's own fault ("cannot"). Unit -1 is the test as a whole: "over" once it is.
"""

from __future__ import annotations

import builtins
import marshal
import math
import os
import sys
import types

import wire  # type: ignore[import-not-found]  # laid beside this program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

channel = wire.Channel()


class State:
    """What was seen so far.

    place: of the test that runs. asked: the program had a say in what happened in it. gone: the program ended.
    unable: the test cannot be judged. reached: assertions of the unit. held: whether the last of them did.
    """

    place = 0
    asked = gone = unable = False
    reached = 0
    held = True


state = State()


class SolutionGone(BaseException):
    """The solution ended, hung up, or sent nonsense. Not an Exception: a test that expects one must not take it. Where
    a bare `except` does, `state` remembers it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        state.gone = True


class CannotJudge(BaseException):
    """The test does something that cannot cross to the solution."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        state.unable = True


def refuse(name: str) -> Callable[..., Any]:
    def method(self: Remote, *others: Any) -> Any:
        raise TypeError(f"an object of the solution's own has no {name} in a test: its answer could be anything")

    return method


def forward(name: str) -> Callable[..., Any]:
    def method(self: Remote, *arguments: Any) -> Any:
        return ask(name, self, arguments, {})

    return method


class Remote:
    """An object that is not plain data and stays with the solution. What it says of itself decides nothing."""

    __slots__ = ("number",)

    def __init__(self, number: Any) -> None:
        if type(number) is not int:
            raise ValueError("not a handle")
        object.__setattr__(self, "number", number)

    def __getattr__(self, name: str) -> Any:
        return ask("attribute", self, [name], {})

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return ask("call", self, arguments, keywords)

    for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "contains", "hash", "index"):
        locals()[f"__{_name}__"] = refuse(f"__{_name}__")
    for _name in ("str", "repr", "len", "iter", "getitem", "setitem", "delitem", "int", "float", "setattr"):
        locals()[f"__{_name}__"] = forward(f"__{_name}__")
    del _name


def opaque(value: Any) -> dict[str, int]:
    if type(value) is Remote:
        return {"handle": value.number}
    raise CannotJudge(f"it passes a {type(value).__name__} to the solution; plain data can be passed")


def ask(operation: str, target: Remote, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    request = {
        "do": operation,
        "on": target.number,
        "arguments": [wire.encode(argument, opaque) for argument in arguments],
        "keywords": {name: wire.encode(argument, opaque) for name, argument in keywords.items()},
    }
    reply = exchange(request)
    if "error" in reply:
        raise as_exception(reply)
    value = received(reply.get("value"))
    if value is None and "arguments" in reply:
        # An in-place function: the caller's containers get the new contents. Only then, so that a function which
        # returns a value cannot change what the test compares it with.
        try:
            for before, after in zip(arguments, reply["arguments"], strict=True):
                put_back(before, wire.decode(after, Remote))
        except Exception as error:  # noqa: BLE001  whatever nonsense was sent
            raise SolutionGone(f"it sent something that is no value: {error}") from None
    return value


def received(value: Any) -> Any:
    try:
        return wire.decode(value, Remote)
    except Exception as error:  # noqa: BLE001  whatever nonsense was sent
        raise SolutionGone(f"it sent something that is no value: {error}") from None


def exchange(request: dict[str, Any]) -> dict[str, Any]:
    state.asked = state.asked or request["do"] != "name"
    try:
        channel.send(request)
        reply = channel.receive()
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise SolutionGone(f"the solution ended: {error}") from None
    if not isinstance(reply, dict):
        raise SolutionGone("it sent something that is no reply")
    return reply


def as_exception(reply: dict[str, Any]) -> Exception:
    """The solution's exception, if it is an ordinary one: a StopIteration would end a loop over the cases early."""
    kind = getattr(builtins, str(reply["error"]), None)
    text = str(reply.get("text", ""))[:1000]
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RuntimeError(f"{str(reply['error'])[:100]}: {text}")
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return RuntimeError(f"{kind.__name__}: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like need more arguments
        return RuntimeError(text)


def put_back(before: Any, after: Any) -> None:
    if isinstance(before, (list, bytearray)):
        before[:] = after
    elif isinstance(before, (dict, set)):
        before.clear()
        before.update(after)


def same(given: Any, expected: Any, tolerance: float) -> bool:
    """Equality for cases: lists, tuples and iterators alike, floats within the tolerance."""
    if type(given) is Remote:
        return False
    if hasattr(given, "__next__"):
        given = list(given)
    if isinstance(given, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(same(a, b, tolerance) for a, b in zip(given, expected, strict=True))
    if isinstance(given, dict) and isinstance(expected, dict):
        return given.keys() == expected.keys() and all(same(given[key], expected[key], tolerance) for key in expected)
    if isinstance(given, float) or isinstance(expected, float):
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (given, expected))
        return numbers and math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)
    return bool(given == expected)


def find(names: list[str], method_of: str) -> dict[str, Any]:
    """What the program defines of the names: its functions as handles, plain values as they are."""
    found = {}
    for name in names:
        reply = exchange({"do": "name", "name": name, "method_of": method_of})
        if "fault" in reply:
            raise SolutionGone(f"the code does not load: {reply['fault']}")
        if "value" in reply:
            found[name] = received(reply["value"])
        if type(found.get(name)) is not Remote:
            state.asked = True  # a value, or nothing, is an answer already
    return found


def saw(value: Any) -> bool:
    """An assertion was reached, and holds or does not."""
    state.held = bool(value)
    state.reached += 1
    return state.held


class Unit:
    """Runs one unit and says what came of it.

    goes_on: an exception ends the unit alone; else the whole test, as does the end of the solution.
    """

    def __init__(self, number: int, goes_on: bool = True) -> None:
        self.number, self.goes_on = number, goes_on

    def __enter__(self) -> None:
        state.reached, state.held = 0, True

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if state.unable:
            say(self.number, "cannot", str(error))
        elif state.gone or error is not None:
            own = not state.asked and not state.gone
            say(self.number, "cannot" if own else "fail", f"{type(error).__name__}: {error}")
        elif not state.asked:
            say(self.number, "idle", "")
        elif not state.reached:
            say(self.number, "fail", "no assertion was reached")
        else:
            say(self.number, "pass" if state.held else "fail", "" if state.held else "a failed assertion was taken")
        return self.goes_on and isinstance(error, (Exception, SystemExit))


def run_case(case: Any, function: Any, tolerance: float) -> None:
    arguments, keywords, accepted = (wire.decode(part, Remote) for part in case)
    with Unit(0):
        if function is None:
            raise NameError("the code does not define the function")
        given = function(*arguments, **keywords)
        if not saw(any(same(given, expected, tolerance) for expected in accepted)):
            raise AssertionError("another value was returned")


def run_text(test: dict[str, Any], solution: dict[str, Any], setup: str) -> None:
    sys.modules["solution"] = module = types.ModuleType("solution")
    vars(module).update(solution)
    namespace: dict[str, Any] = {"__name__": "__main__", **solution}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)  # noqa: S102  in the sandbox
    namespace.update(solution)
    namespace.update(__saw__=saw, __unit__=Unit)
    if test["code"]:
        exec(marshal.loads(bytes.fromhex(test["code"])), namespace)  # noqa: S102  from the trainer
    for kind, *step in test["steps"]:
        if kind == "check":
            namespace[step[0]](namespace[step[1]])
        elif kind == "function":
            with Unit(step[0]):
                namespace[step[1]]()
        elif kind == "method":
            run_method(step[0], namespace[step[1]], step[2])
        else:
            run_examples(step[0], step[1], namespace)


def run_method(unit: int, kind: Any, name: str) -> None:
    """A method of a `unittest.TestCase`, with what is set up for it; or of a plain class of tests."""
    import unittest

    with Unit(unit):
        if not issubclass(kind, unittest.TestCase):
            test = kind()
            getattr(test, "setup_method", lambda: None)()
            getattr(test, name)()
            return
        result = unittest.TestResult()
        unittest.TestSuite([kind(name)]).run(result)
        if result.skipped or result.expectedFailures:
            state.reached = 0
        elif not result.wasSuccessful():
            raise AssertionError(str([*result.errors, *result.failures, ["", "it should have failed"]][0][1])[-150:])


def run_examples(unit: int, text: str, namespace: dict[str, Any]) -> None:
    import doctest

    class Runner(doctest.DocTestRunner):
        def report_start(self, out: Any, test: Any, example: Any) -> None:
            self.failed = ""

        def report_failure(self, out: Any, test: Any, example: Any, got: str) -> None:
            self.failed = f"got {got[:100]!r}"

        def report_unexpected_exception(self, out: Any, test: Any, example: Any, info: Any) -> None:
            self.failed = f"{info[0].__name__}: {info[1]}"

    runner, namespace = Runner(verbose=False), dict(namespace)
    for example in doctest.DocTestParser().get_examples(text):
        one = doctest.DocTest([example], namespace, "test", None, 0, None)
        if not example.want:
            runner.run(one, out=lambda text: None, clear_globs=False)
            namespace = one.globs
            continue
        with Unit(unit):
            runner.run(one, out=lambda text: None, clear_globs=False)
            if state.gone or state.unable:
                return
            if not saw(not runner.failed):
                raise AssertionError(runner.failed)
            namespace = one.globs
        unit += 1


def say(unit: int, word: str, reason: str) -> None:
    sys.stdout.flush()
    os.write(verdicts, f"\n{nonce} {state.place} {unit} {word} {reason[:200]!a}\n".encode())


def judge(spec: dict[str, Any], test: Any) -> None:
    """Run one test. Results outside its units have the number -1."""
    state.asked = False
    try:
        solution = find(spec["names"], spec["method_of"])
        if isinstance(test, dict):
            run_text(test, solution, spec["setup"])
        else:
            run_case(test, solution.get(spec["names"][0]), spec["tolerance"])
    except BaseException as error:  # noqa: BLE001  whatever the test raises
        own = state.unable or not (state.asked or state.gone)
        say(-1, "cannot" if own else "fail", f"{type(error).__name__}: {error}")


with open("tests.json", encoding="utf-8") as file:
    spec = wire.loads(file.read())
os.unlink("tests.json")
nonce, verdicts = spec["nonce"], sys.stdout.fileno()
for state.place, test in enumerate(spec["tests"]):
    judge(spec, test)
    say(-1, "over", "")
