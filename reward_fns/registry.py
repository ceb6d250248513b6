"""What is shipped, by name: `rewards()` for reward functions, `tasks()` for modules that generate prompts.

A module of this package belongs here by being in the folder; a function, by the decorator `reward`.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import reward_fns

Function = TypeVar("Function", bound=Callable[..., Any])


# The ways of giving an answer that a reader of text can know: alone, in <answer> tags, in a box, after ####, after
# "the answer is", as the last thing of its kind in a sentence; with marks of markdown or mathematics around it, after
# thinking, with a unit behind it.
READS = frozenset({"alone", "tag", "box", "hashes", "said", "text", "marks", "thinking", "unit"})


@dataclass(frozen=True)
class Gold:
    """The right answer of a row, and the forms in which a completion may give it; an audit makes right and wrong
    completions from it.

    Attributes:
        text: the answer, short; of a program its whole source, "" where the row has none.
        kind: "number", "formula" (mathematics), "text", or "program".
        reads: those of `READS` that the function pays; other forms are left out of an audit.
        tolerance: absolute and relative, within which another number is as right.
        entry: of a program the function or class under test; "" where it reads standard input.
        more: right completions that are no form of `text`, by a name for each.
    """

    text: str
    kind: Literal["number", "formula", "text", "program"] = "text"
    reads: frozenset[str] = READS
    tolerance: tuple[float, float] = (0.0, 0.0)
    entry: str = ""
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RewardInfo:
    """The facts about a reward function that a program can use.

    Attributes:
        low: the lowest of its values.
        high: the highest.
        floor: the highest score that a completion without work in it can earn, in [low, high].
        checks: "answer" when a right answer is needed for more than the floor; "shape" when only the form is looked
            at. A shape reward pays junk of the right form, so it belongs beside an answer reward, with a small weight.
            "opinion" when a model decides, of which nothing can be promised.
        requires: modules it imports when first called; a worker imports them before the first deadline starts.
        extra: the extra of this distribution that installs them.
        check_row: raises ValueError for a row that the function could not grade; called with the columns and the fixed
            arguments before a run, for every row.
        special_tokens: the completion must be handed over with its special tokens, since the function reads tags that
            a tokenizer may have made into tokens.
        gold: returns the right answer of a row, called with the columns and the fixed arguments; None = the row has
            none.
    """

    low: float
    high: float
    floor: float
    checks: Literal["answer", "shape", "opinion"]
    requires: tuple[str, ...] = ()
    extra: str | None = None
    check_row: Callable[..., None] | None = None
    special_tokens: bool = False
    gold: Callable[..., Gold | None] | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.floor <= self.high:
            raise ValueError(f"A floor lies in the range: got low {self.low}, floor {self.floor}, high {self.high}.")
        if self.checks != "answer" and self.floor != self.high:
            raise ValueError(
                f"A reward that looks only at the form pays junk of that form in full, and a judge may, so its floor "
                f"is its high end {self.high}; got {self.floor}."
            )


@dataclass(frozen=True)
class Shipped:
    """A shipped reward function with its name, facts and the first line of its docstring."""

    name: str
    function: Callable[..., Any]
    info: RewardInfo
    summary: str


def reward(
    *,
    low: float,
    high: float,
    floor: float,
    checks: Literal["answer", "shape", "opinion"],
    requires: tuple[str, ...] = (),
    extra: str | None = None,
    check_row: Callable[..., None] | None = None,
    special_tokens: bool = False,
    gold: Callable[..., Gold | None] | None = None,
) -> Callable[[Function], Function]:
    """Mark a function as shipped; it is returned unchanged, with its facts as `reward_info`."""
    info = RewardInfo(low, high, floor, checks, requires, extra, check_row, special_tokens, gold)

    def mark(function: Function) -> Function:
        function.reward_info = info  # type: ignore[attr-defined]
        return function

    return mark


def modules() -> tuple[str, ...]:
    """Names of the modules of this package that can hold reward functions or tasks."""
    found = (module.name for module in pkgutil.iter_modules(reward_fns.__path__))
    return tuple(f"reward_fns.{name}" for name in sorted(found) if name != "registry" and not name.startswith("_"))


@cache
def rewards() -> dict[str, Shipped]:
    """Every shipped reward function by name, in alphabetical order."""
    found: dict[str, Shipped] = {}
    for module_name in modules():
        for name, function in vars(import_module(module_name)).items():
            info = getattr(function, "reward_info", None)
            if isinstance(info, RewardInfo) and function.__module__ == module_name:
                summary = (function.__doc__ or "").strip().split("\n")[0]
                found[name] = Shipped(name, function, info, summary)
    return dict(sorted(found.items()))


@cache
def tasks() -> dict[str, str]:
    """Task name to module path, for every module with `prompts` and `REWARD` whose `REQUIRES` are installed."""
    found = {}
    for module_name in modules():
        module = import_module(module_name)
        is_here = all(find_spec(name) is not None for name in getattr(module, "REQUIRES", ()))
        if is_here and hasattr(module, "prompts") and hasattr(module, "REWARD"):
            found[module_name.rpartition(".")[2]] = module_name
    return found
