"""Names that columns of data usually have. Imports nothing, as reward workers load it."""

from collections.abc import Sequence

_USUAL_COLUMNS = (
    ("prompt", "question", "problem", "instruction", "input", "query", "text"),
    ("answer", "solution", "ground_truth", "target", "label", "final_answer", "expected_answer", "canonical_solution"),
)


def usual_column(wanted: str, columns: Sequence[str]) -> str | None:
    """Returns the column that data usually have for what is wanted ("prompt", "answer" or another name of these).

    wanted: the name of a column that is not there. columns: those that are there, of which the first usual name is
    taken; None where none has one.
    """
    for names in _USUAL_COLUMNS:
        if wanted in names:
            return next((name for name in names if name in columns), None)
    return None
