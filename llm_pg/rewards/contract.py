"""What a reward function may look like, decided by its signature, and what it may return.

Two forms are accepted. The batch form is TRL's, keywords only, once for all completions:

    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list of float | None

and the plain form, known by a parameter called `completion`, once for each:

    f(completion, prompt, **columns) -> float | bool | None | dict with "reward" and named parts

Either may be async. A function gets those arguments that its signature takes. None means "does not apply". In the place
of a completion's number it may give a list, one number for each of its tokens (`completion_ids`): rewards of the steps.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
PLAIN_ARGUMENTS = ("completion", "prompt", "completion_ids", "trainer_state", "log_extra", "log_metric")
RESERVED = {*BATCH_ARGUMENTS, *PLAIN_ARGUMENTS}  # never names of columns
# float32 holds the square of such a number, and the sum of some hundred such squares: deviations, the norm of a
# gradient and the error of a critic are made of them.
MAX_REWARD = 1e18
FORMS = (
    "f(completion, <columns>, **row) -> float, or TRL's f(prompts, completions, <columns>, **kwargs) -> list of floats"
)


class BadValueError(Exception):
    """A reward function returned what the contract does not allow; the text says what, and where."""


@dataclass(frozen=True)
class Signature:
    """How a reward function is called.

    required, optional: the columns it names without and with a default. arguments: what it takes of the arguments that
    every call offers. takes_any: it has **kwargs and so gets every column.
    """

    form: Literal["plain", "batch"]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    arguments: tuple[str, ...]
    takes_any: bool
    is_async: bool

    def columns(self, present: Sequence[str]) -> list[str]:
        """Those of the columns present that the function is to be given."""
        named = {*self.required, *self.optional}
        return [name for name in present if name not in RESERVED and (self.takes_any or name in named)]


def read_signature(function: Callable[..., Any], name: str) -> Signature:
    """The signature of a reward function; ValueError when it fits neither form."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Reward function {name} has no readable signature ({error}); wrap it in a def: {FORMS}."
        ) from error
    kinds = inspect.Parameter
    by_position = [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY]
    if by_position:
        raise ValueError(
            f"Reward function {name} takes {', '.join(by_position)} by position only, and arguments are given by "
            f"keyword; remove the '/' from its signature."
        )
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    names = [p.name for p in named]
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    if "completion" in names and "completions" not in names:
        form: Literal["plain", "batch"] = "plain"
    elif takes_any or {"completions", "completion_ids", "prompts"} & set(names):
        form = "batch"
    else:
        near = get_close_matches("completion", names, n=1) or get_close_matches("completions", names, n=1)
        hint = f" Is {near[0]!r} meant to be 'completion' or 'completions'?" if near else ""
        raise ValueError(f"Reward function {name} takes ({', '.join(names)}), which is neither form: {FORMS}.{hint}")
    offered = PLAIN_ARGUMENTS if form == "plain" else BATCH_ARGUMENTS
    extra = offered if form == "batch" else ("prompt",)
    return Signature(
        form=form,
        required=tuple(p.name for p in named if p.name not in offered and p.default is kinds.empty),
        optional=tuple(p.name for p in named if p.name not in offered and p.default is not kinds.empty),
        arguments=tuple(name for name in offered if name in names or (takes_any and name in extra)),
        takes_any=takes_any,
        is_async=_is_async(function),
    )


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or of a list of messages the content of the last one of the assistant."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""


def read_number(value: Any, expected: str, where: str) -> float | None:
    """A returned value as a float; None stays None, NaN stays NaN. BadValueError for what is no number that can be
    trained on: infinite, or beyond `MAX_REWARD`."""
    if not isinstance(value, (bool, int, float, type(None))) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            raise BadValueError(
                f"must return {expected}; {where} is a {type(value).__name__} of several values."
            ) from error
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise BadValueError(f"must return {expected}; {where} is {shown(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise BadValueError(f"must return {expected}, all finite; {where} is {shown(value)}.")
    if abs(number) > MAX_REWARD:
        raise BadValueError(
            f"must return {expected}, none beyond {MAX_REWARD:g}; {where} is {shown(value)}. float32 does not hold "
            "what is computed from larger numbers: scale the reward down."
        )
    return number


Reward = float | list[float] | None  # of a completion, of each of its tokens, or none


def read_reward(value: Any, expected: str, where: str) -> Reward:
    """What a function gave one completion: a number as `read_number` reads it, or a list of them, one a token."""
    if not isinstance(value, (list, tuple)) and len(getattr(value, "shape", "")):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return read_number(value, expected, where)
    numbers = [read_number(each, expected, f"{where}, token {place},") for place, each in enumerate(value)]
    if None in numbers:
        raise BadValueError(f"must return {expected}; {where}, token {numbers.index(None)}, is None. Use 0 there.")
    return [number for number in numbers if number is not None]


def read_batch(result: Any, count: int) -> list[Reward]:
    """What a batch function returned: of each of `count` completions a float, None or NaN, or a list with a float for
    each token; BadValueError with the first bad value."""
    expected = (
        f"a list of {count} numbers or None, one for each completion (or for each a list with one for each token)"
    )
    if not isinstance(result, (list, tuple, str, dict)) and callable(getattr(result, "tolist", None)):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise BadValueError(f"must return {expected}; it returned {shown(result)}.")
    if len(result) != count:
        raise BadValueError(f"must return {expected}; it returned {len(result)}.")
    return [read_reward(value, expected, f"value {place}") for place, value in enumerate(result)]


def read_plain(result: Any) -> tuple[Reward, dict[str, float | None]]:
    """What a plain function returned, as its reward and its named parts; BadValueError when it is neither."""
    expected = "a number, None, a list with a number for each token, or a dict with the key 'reward'"
    if not isinstance(result, dict):
        return read_reward(result, expected, "what it returned"), {}
    if "reward" not in result:
        raise BadValueError(f"must return {expected}; it returned a dict with the keys {sorted(map(str, result))}.")
    parts = {
        str(key): read_number(value, expected, f"the part {key!r}") for key, value in result.items() if key != "reward"
    }
    return read_reward(result["reward"], expected, "the part 'reward'"), parts


def shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
