"""Sums and differences of whole numbers, asked for in words: a task that a small chat model can learn on a CPU."""

import random
from typing import Any

REWARD = "number_match"
TEMPLATE = "Compute {expression}. Give the final answer after ####."


def prompts(
    seed: int, n: int, low: int = 10, high: int = 99, operators: str = "+-", template: str = TEMPLATE
) -> list[dict[str, Any]]:
    """`n` distinct rows with the columns prompt ("Compute 63 - 15. ..."), expression ("63 - 15") and answer ("48").

    seed: the rows are a function of it and the other arguments, drawn without replacement.
    low, high: the closed range of both numbers, low >= 0.
    operators: "+", "-" or both, each as often. A difference is never negative.
    template: the prompt's text with the field {expression}.

    Raises ValueError where fewer than `n` such expressions exist, or an argument is out of its range.
    """
    if not 0 <= low <= high:
        raise ValueError(f"The numbers' range must satisfy 0 <= low <= high; got {low} and {high}.")
    if not operators or not set(operators) <= set("+-"):
        raise ValueError(f"operators is '+', '-' or '+-'; got {operators!r}.")
    if "{expression}" not in template:
        raise ValueError(f"template must hold the field {{expression}}; got {template!r}.")
    span = range(low, high + 1)
    found = [(a, sign, b) for sign in sorted(set(operators)) for a in span for b in span if sign == "+" or a >= b]
    if n > len(found):
        raise ValueError(
            f"prompts was asked for {n} distinct expressions, and only {len(found)} exist with numbers from {low} to "
            f"{high} and {' and '.join(sorted(set(operators)))}. Ask for fewer, or widen the range."
        )
    rng = random.Random(f"arithmetic {seed}")
    return [_row(a, sign, b, template) for a, sign, b in rng.sample(found, n)]


def demonstrations(
    seed: int, n: int, low: int = 10, high: int = 99, operators: str = "+-", template: str = TEMPLATE
) -> list[dict[str, str]]:
    """Rows with prompt and completion ("63 - 15 = 48\\n#### 48") for a supervised warm start; row i answers row i of
    `prompts` with the same arguments."""
    rows = prompts(seed, n, low, high, operators, template)
    shown = [f"{row['expression']} = {row['answer']}\n#### {row['answer']}" for row in rows]
    return [{"prompt": row["prompt"], "completion": text} for row, text in zip(rows, shown, strict=True)]


def _row(a: int, sign: str, b: int, template: str) -> dict[str, Any]:
    expression = f"{a} {sign} {b}"
    answer = a + b if sign == "+" else a - b
    return {"prompt": template.replace("{expression}", expression), "expression": expression, "answer": str(answer)}
