"""JSON by a schema. Shape only: right types with wrong values are paid. By jsonschema (extra `schema`)."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from reward_fns.reading.final_answer import after_thinking
from reward_fns.registry import reward

MAX_CHARACTERS = 100_000
MAX_NESTING = 100
SECONDS = 0.5  # for all patterns of a schema together
_FENCED = re.compile(r"```[ \t]*(?:json[5c]?)?[ \t]*\n?(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


@reward(
    low=0.0,
    high=1.0,
    floor=1.0,
    checks="shape",
    requires=("jsonschema", "referencing", "regex"),
    extra="schema",
    special_tokens=True,
)
def json_schema(completion: str, schema: Mapping[str, Any] | str, **row: Any) -> float:
    """1 when the completion is one JSON value that fits the schema, bare or alone in a ```json fence; else 0.

    Read is what follows the thinking. `schema` is a JSON Schema as a dictionary or as JSON text, fixed for the run or
    from a column. NaN and Infinity are not JSON; over 100,000 characters or 100 nested brackets is 0. References to
    other documents are never fetched. The schema's patterns get half a second together: one that backtracks without
    end on a crafted completion scores 0.

    Range {0, 1}. Floor 1: the types are looked at, not the truth. Raises ValueError for a schema that is none.
    """
    from jsonschema import validators
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        definition = json.loads(schema) if isinstance(schema, str) else schema
        validator = validators.validator_for(definition, default=validators.Draft202012Validator)
        validator.check_schema(definition)
        patterns = _patterns(definition)
    except (json.JSONDecodeError, SchemaError, TypeError) as error:
        raise ValueError(f"json_schema needs a JSON Schema in 'schema': {error}.") from error
    found, value = parse(completion)
    if not found:
        return 0.0
    bounded = validators.extend(validator, _keywords(patterns)) if patterns else validator
    try:
        return float(bounded(definition, registry=Registry()).is_valid(value))
    except TimeoutError:
        return 0.0
    except Unresolvable as error:
        raise ValueError(
            f"The schema refers to a document that it does not hold, and none is fetched: {error}."
        ) from error


def parse(completion: str) -> tuple[bool, Any]:
    """(True, value) when the completion is one JSON value within the bounds; else (False, None)."""
    text = (after_thinking(completion) or "").strip()
    if len(text) > MAX_CHARACTERS:
        return False, None
    fenced = _FENCED.fullmatch(text)
    if fenced:
        text = fenced[1].strip()
    if _nesting(text) > MAX_NESTING:
        return False, None
    try:
        return True, json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return False, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


def _nesting(text: str) -> int:
    """The deepest nesting of brackets outside strings."""
    text = _STRING.sub("", text)
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _patterns(schema: Any) -> tuple[str, ...]:
    """Every regular expression in a schema; ValueError where one cannot be bounded."""
    found: list[str] = []
    stack = [schema]
    while stack:
        part = stack.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("pattern"), str):
                found.append(part["pattern"])
            if isinstance(part.get("patternProperties"), Mapping):
                found += part["patternProperties"]
                if "unevaluatedProperties" in part:
                    raise ValueError(
                        "json_schema takes no schema with patternProperties and unevaluatedProperties side by side: "
                        "the search for them cannot be bounded in time. Use additionalProperties."
                    )
            stack += part.values()
        elif isinstance(part, list):
            stack += part
    return tuple(found)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    import regex  # a dependency of transformers; the standard library's matcher has no time limit

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"json_schema cannot compile the schema's pattern {pattern!r}: {error}.") from error


def _keywords(patterns: tuple[str, ...]) -> dict[str, Callable[..., Iterator[Any]]]:
    """The keywords of JSON Schema that search by patterns, with one time limit for all; TimeoutError past it."""
    from jsonschema.exceptions import ValidationError

    for text in patterns:
        _compiled(text)
    end = time.monotonic() + SECONDS

    def holds(pattern: str, text: str) -> bool:
        return _compiled(pattern).search(text, timeout=max(end - time.monotonic(), 1e-3)) is not None

    def string_pattern(validator: Any, given: str, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "string") and not holds(given, instance):
            yield ValidationError(f"{instance!r} does not match {given!r}")

    def pattern_properties(validator: Any, given: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "object"):
            for pattern, subschema in given.items():
                for key, value in instance.items():
                    if holds(pattern, key):
                        yield from validator.descend(value, subschema, path=key, schema_path=pattern)

    def additional_properties(validator: Any, given: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if not validator.is_type(instance, "object"):
            return
        known, by_pattern = schema.get("properties", {}), schema.get("patternProperties", {})
        for key, value in instance.items():
            if key in known or any(holds(pattern, key) for pattern in by_pattern):
                continue
            if given is False:
                yield ValidationError(f"{key!r} is not allowed")
            elif validator.is_type(given, "object"):
                yield from validator.descend(value, given, path=key)

    return {
        "pattern": string_pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
