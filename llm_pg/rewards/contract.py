"""What a reward function may look like, decided by its signature, and what it may return.

Two forms are accepted. The batch form is TRL's, keywords only, once for all completions:

    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list of float | None

and the plain form, known by a parameter called `completion`, once for each:

    f(completion, prompt, **columns) -> float | bool | None | dict with "reward" and named parts

Either may be async. A function gets those arguments that its signature takes. None means "does not apply".
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


def read_batch(result: Any, count: int) -> list[float | None]:
    """What a batch function returned, as `count` floats, None or NaN; BadValueError with the first bad value."""
    expected = f"a list of {count} numbers or None, one for each completion"
    if not isinstance(result, (list, tuple, str, dict)) and callable(getattr(result, "tolist", None)):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise BadValueError(f"must return {expected}; it returned {shown(result)}.")
    if len(result) != count:
        raise BadValueError(f"must return {expected}; it returned {len(result)}.")
    return [read_number(value, expected, f"value {place}") for place, value in enumerate(result)]


def read_plain(result: Any) -> tuple[float | None, dict[str, float | None]]:
    """What a plain function returned, as its reward and its named parts; BadValueError when it is neither."""
    expected = "a number, None, or a dict of them with the key 'reward'"
    if not isinstance(result, dict):
        return read_number(result, expected, "what it returned"), {}
    if "reward" not in result:
        raise BadValueError(f"must return {expected}; it returned a dict with the keys {sorted(map(str, result))}.")
    parts = {str(key): read_number(value, expected, f"the part {key!r}") for key, value in result.items()}
    return parts.pop("reward"), parts


def shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
