"""The right answer of a row: as a shipped function declares it, else as the columns of a user's function show it."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_pg.rewards.specs import RewardFunction
from reward_fns.reading import numerals
from reward_fns.reading.final_answer import final_answer
from reward_fns.registry import Gold

# Columns that hold an answer in data as it is found, the surest name first.
COLUMNS = (
    "answer", "ground_truth", "final_answer", "solution", "target", "gold", "label", "expected", "expected_answer",
    "reference", "result", "output",
)  # fmt: skip
KEYS = ("ground_truth", "answer", "solution", "target")  # of a column that holds a mapping
LONGEST = 200  # characters of an answer


def answer_column(function: RewardFunction, columns: Sequence[str]) -> str | None:
    """The column that a user's function takes the right answer from: one that its signature names, by its name or as
    the only one; of those that it gets by **row, one of such a name. None where there is none."""
    given = [name for name in columns if name not in function.options]
    named = [name for name in given if name in (*function.signature.required, *function.signature.optional)]
    for choice in (named, given if function.signature.takes_any else ()):
        found = next((name for name in COLUMNS if name in choice), None)
        if found is not None:
            return found
    return named[0] if len(named) == 1 else None


def names_answer(function: RewardFunction, columns: Sequence[str]) -> bool:
    """Whether the signature itself names the column of the right answer."""
    found = answer_column(function, columns)
    return found is not None and found in (*function.signature.required, *function.signature.optional)


def gold_of(function: RewardFunction, prompt: Any, row: Mapping[str, Any]) -> Gold | None:
    """The right answer of a row for a function; None where none is known."""
    if function.info is not None and function.info.gold is not None:
        return function.info.gold(**{**row, "prompt": prompt, **function.options})
    column = answer_column(function, list(row))
    return None if column is None else gold_in(row[column])


def gold_in(value: Any) -> Gold | None:
    """The short answer that a value of a column holds; None where it is a longer text, or several."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in KEYS if key in value), None)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value).strip()
    found = final_answer(text)
    text = found.text if found.is_marked else text
    if not text or len(text) > LONGEST or "\n" in text:
        return None
    quantity = numerals.only(text) if numerals.is_value(text) else None
    if quantity is not None and quantity.kind == "number":
        return Gold(text, "number")
    return Gold(text, "formula" if set("\\^=") & set(text) else "text")
