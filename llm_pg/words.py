"""Fields whose value is one of a few words, or a number in a range: read from their annotations. Imports no torch."""

from __future__ import annotations

import difflib
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, Union

import annotated_types as at

_BOUNDS: tuple[tuple[type, str, str, Callable[[Any, Any], bool]], ...] = (
    (at.Gt, "gt", "above", operator.gt),
    (at.Ge, "ge", "at least", operator.ge),
    (at.Lt, "lt", "below", operator.lt),
    (at.Le, "le", "at most", operator.le),
)


def nearest(word: Any, known: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the nearest of the known words, or ''."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def choices(word: Any, known: Sequence[str]) -> str:
    """Returns the end of a sentence about a word that is not known: what it can be, and the nearest."""
    return f"it is one of {', '.join(known)}.{nearest(word, known)}"


def one_of(name: str, word: Any, known: Sequence[str]) -> None:
    """Raises ValueError, with the nearest word, where `word` is not one of the known ones."""
    if word not in known:
        raise ValueError(f"{name} cannot be {word!r}; {choices(word, known)}")


def words_of(annotation: Any) -> tuple[str, ...]:
    """Returns the words that an annotation allows: those of a Literal, alone, optional or in a list; () = no words."""
    if typing.get_origin(annotation) is Literal:
        return tuple(word for word in typing.get_args(annotation) if isinstance(word, str))
    return tuple(word for part in typing.get_args(annotation) for word in words_of(part))


@cache
def annotations_of(kind: type[Any]) -> dict[str, Any]:
    """Returns the annotation of each field of a class, evaluated, with the bounds of its numbers."""
    return typing.get_type_hints(kind, include_extras=True)


def check_fields(thing: Any, title: str) -> None:
    """Raises ValueError where a field of a dataclass does not hold what its annotation says.

    Args:
        thing: the dataclass's instance. Words, numbers with bounds, flags, texts and callables are checked.
        title: what the message begins with.
    """
    kind: Any = type(thing)
    for name, annotation in annotations_of(kind).items():
        problem = _problem(getattr(thing, name), annotation)
        if problem is not None:
            raise ValueError(f"{title}: {name} cannot be {getattr(thing, name)!r}; {problem}")


def _problem(value: Any, annotation: Any) -> str | None:
    """What is wrong with a value, as the end of a sentence; None = nothing."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        problems = [_problem(value, part) for part in args]
        return None if None in problems else problems[0]
    if origin is Literal:
        return None if value in args else choices(value, args)
    if origin is typing.Annotated:
        problem = _problem(value, args[0])
        bounds = [(text, getattr(c, key), holds) for c in args[1:] for k, key, text, holds in _BOUNDS if type(c) is k]
        if problem is not None or all(holds(value, bound) for _, bound, holds in bounds):
            return problem
        return f"it must be {' and '.join(f'{text} {bound:g}' for text, bound, _ in bounds)}."
    kind, what = _KINDS.get(origin or annotation, (object, ""))
    right = isinstance(value, kind) and not (isinstance(value, bool) and kind in (numbers.Real, numbers.Integral))
    if right and kind is numbers.Real and value != value:
        return "it is not a number."
    return None if right else f"it must be {what}."


_KINDS: dict[Any, tuple[type, str]] = {
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
    Callable: (typing.cast(type, Callable), "a function"),
}
