"""JSON by a schema. Shape only: right types with wrong values are paid. By jsonschema (extra `schema`)."""

import json
from collections.abc import Mapping
from typing import Any

from reward_fns.registry import reward

MAX_CHARACTERS = 100_000
MAX_NESTING = 100


@reward(low=0.0, high=1.0, floor=1.0, checks="shape", requires=("jsonschema", "referencing"), extra="schema")
def json_schema(completion: str, schema: Mapping[str, Any] | str, **row: Any) -> float:
    """1 when the completion is one JSON value that fits the schema, bare or alone in a ```json fence; else 0.

    `schema` is a JSON Schema as a dictionary or as JSON text, fixed for the run or from a column. NaN and Infinity are
    not JSON; over 100,000 characters or 100 nested brackets is 0. References to other documents are never fetched.

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
    except (json.JSONDecodeError, SchemaError, TypeError) as error:
        raise ValueError(f"json_schema needs a JSON Schema in 'schema': {error}.") from error
    found, value = parse(completion)
    if not found:
        return 0.0
    try:
        return float(validator(definition, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise ValueError(
            f"The schema refers to a document that it does not hold, and none is fetched: {error}."
        ) from error


def parse(completion: str) -> tuple[bool, Any]:
    """(True, value) when the completion is one JSON value within the bounds; else (False, None)."""
    text = completion.strip()
    if len(text) > MAX_CHARACTERS:
        return False, None
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        text = text[3:-3].removeprefix("json").strip()
    if _nesting(text) > MAX_NESTING:
        return False, None
    try:
        return True, json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return False, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
