r"""Countdown: reach a target with given numbers, each used once, by + - * / and brackets.

An answer is read as people write it (×, ÷, − and LaTeX's \times, \frac; in dollars, backticks or bold) and evaluated by
walking its syntax tree, never by running it, in exact fractions and within bounds that make the work constant: 200
characters, 20 brackets, 6 digits a number, no powers.
"""

import ast
import itertools
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from reward_fns.reading.final_answer import clean, final_answer
from reward_fns.reading.notation import plain
from reward_fns.registry import READS, Gold, reward

REWARD = "countdown"
MAX_CHARACTERS = 200
MAX_BRACKETS = 20
MAX_DIGITS = 6
MAX_SIDES = 4  # of an equation
PATIENCE = 5_000  # draws in a row without a new puzzle before the space is called too small

_ALLOWED = frozenset("0123456789+-*/() ")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BRACKETS = str.maketrans("[]{}", "()()")
_UNICODE = str.maketrans("*/-", "×÷−")
MAX_SOLVED = 4  # numbers of a puzzle that is solved by trying everything
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


def solution_gold(numbers: Sequence[int], target: int, **row: Any) -> Gold | None:
    """A solution of the puzzle, with all of its numbers; None where there is none, or more than 4 numbers."""
    text = solve(numbers, target)
    if text is None:
        return None
    more = (
        ("as an equation", f"{text} = {target}"),
        ("with Unicode's operators", text.translate(_UNICODE)),
        ("in LaTeX in a box", f"\\boxed{{{text.replace('*', chr(92) + 'times ')}}}"),
    )
    return Gold(text, "formula", READS - {"text", "unit"}, more=more)


@reward(
    low=0.0,
    high=1.0,
    floor=0.0,
    checks="answer",
    check_row=lambda numbers, target, **row: check_puzzle(numbers, target),
    special_tokens=True,
    gold=solution_gold,
)
def countdown(completion: str, numbers: Sequence[int], target: int, use_all: bool = True, **row: Any) -> float:
    r"""1 when the expression in the completion uses the numbers, each once, and equals the target; else 0.

    The expression is the final answer as `reward_fns.reading.final_answer` finds it (in <answer>, \boxed or after ####,
    after "the answer is"), or the last line that is not empty, whole. It may be an equation, each side of which must
    then equal the target. `numbers` and `target` are columns. With `use_all` false, a part of the numbers is enough.

    Range {0, 1}. Floor 0: of many expressions one counts, and the target itself is not among the numbers to use. With
    `use_all` false a target that is one of the numbers would be paid for an echo.
    """
    check_puzzle(numbers, target)
    sides = [side for side in answer_text(completion).split("=") if side.strip()]
    try:
        found = [evaluate(side) for side in sides[:MAX_SIDES]]
    except ValueError:
        return 0.0
    if len(sides) > MAX_SIDES or any(value != target for value, _ in found):
        return 0.0
    return float(any(_fits(used, numbers, use_all) for _, used in found))


def check_puzzle(numbers: Any, target: Any, **row: Any) -> None:
    """ValueError for a row that is no puzzle."""
    whole = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    if not isinstance(target, (int, float)) or not whole or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"countdown needs whole numbers and a target; got numbers={numbers!r} and target={target!r}.")


def _fits(used: Sequence[int], numbers: Sequence[int], use_all: bool) -> bool:
    missing, extra = Counter(numbers) - Counter(used), Counter(used) - Counter(numbers)
    return bool(used) and not extra and not (missing and use_all)


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression of all the numbers that equals the target, found by trying every one; None without any, and for
    more than 4 numbers."""
    if len(numbers) > MAX_SOLVED:
        return None
    return _solved([(Fraction(number), str(number)) for number in numbers], Fraction(target))


def _solved(terms: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    if len(terms) == 1:
        return terms[0][1].removeprefix("(").removesuffix(")") if terms[0][0] == target else None
    for first, second in itertools.permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[first], terms[second]
        rest = [term for place, term in enumerate(terms) if place not in (first, second)]
        for sign, operation in zip("+-*/", _OPERATORS.values(), strict=True):
            if (sign in "+*" and first > second) or (sign == "/" and b == 0):
                continue
            found = _solved([*rest, (operation(a, b), f"({left}{sign}{right})")], target)
            if found is not None:
                return found
    return None


def answer_text(completion: str) -> str:
    """The expression or equation that a completion gives as its answer, with + - * / and round brackets."""
    found = final_answer(completion)
    text = found.text if found.form != "text" else found.text.rpartition("\n")[2]
    return arithmetic(clean(text).rstrip(".,;! "))


def arithmetic(text: str) -> str:
    """Arithmetic as people write it, in the signs of Python."""
    text, previous = plain(text[-2 * MAX_CHARACTERS :]), ""
    while text != previous:
        text, previous = _FRACTION.sub(r"((\1)/(\2))", text), text
    return text.translate(_BRACKETS).strip()


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Exact value of an arithmetic expression and the whole numbers in it, in order.

    Raises ValueError for anything but + - * / and brackets over whole numbers within the bounds of this module, and
    for a division by zero.
    """
    if len(expression) > MAX_CHARACTERS or not set(expression) <= _ALLOWED or expression.count("(") > MAX_BRACKETS:
        raise ValueError("The expression is too long or has characters other than digits, + - * / and brackets.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("The expression is not well formed.") from error
    used: list[int] = []
    return _walk(tree.body, used), used


def _walk(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        if node.value >= 10**MAX_DIGITS:
            raise ValueError(f"A number has more than {MAX_DIGITS} digits.")
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _walk(node.left, used), _walk(node.right, used)
        if isinstance(node.op, ast.Div) and right == 0:
            raise ValueError("The expression divides by zero.")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError("Only + - * / over whole numbers are allowed.")


def prompts(
    seed: int,
    n: int,
    num_numbers: int = 3,
    low: int = 1,
    high: int = 12,
    max_target: int = 99,
    operators: str = "+-*/",
) -> list[dict[str, Any]]:
    """`n` solvable puzzles with the columns prompt ("3 5 7 -> 22:"), numbers ([3, 5, 7]) and target (22).

    Each is built from a solution, so it has one. No two share both the target and the numbers in any order, so a
    held-out puzzle is not a reordered training one. The target is none of the numbers. The rows are a function of the
    arguments.

    Raises ValueError when `n` distinct puzzles are not found.
    """
    return [row for row, _ in _puzzles(seed, n, num_numbers, low, high, max_target, operators)]


def demonstrations(
    seed: int,
    n: int,
    noise: float = 0.0,
    num_numbers: int = 3,
    low: int = 1,
    high: int = 12,
    max_target: int = 99,
    operators: str = "+-*/",
) -> list[dict[str, str]]:
    """Rows with prompt and completion ("3*5+7") for a warm start; row i answers row i of `prompts(seed, n)`.

    noise: the probability in [0, 1] that an answer is a random expression over the same numbers that misses the target.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise is a probability from 0 to 1; got {noise}.")
    rng = random.Random(f"countdown demonstrations {seed}")
    rows = []
    for row, solution in _puzzles(seed, n, num_numbers, low, high, max_target, operators):
        completion = solution
        if rng.random() < noise:
            completion = _wrong_expression(rng, row, operators)
        rows.append({"prompt": row["prompt"], "completion": completion})
    return rows


def _wrong_expression(rng: random.Random, row: dict[str, Any], operators: str) -> str:
    for _ in range(100):
        text, _ = _random_expression(rng, row["numbers"], operators)
        if not countdown(text, row["numbers"], row["target"]):
            return text
    return str(row["numbers"][0])  # with "+" alone every full expression is right; one that stops early never is


def _puzzles(
    seed: int, n: int, num_numbers: int, low: int, high: int, max_target: int, operators: str
) -> list[tuple[dict[str, Any], str]]:
    if num_numbers < 2 or not 1 <= low <= high or not operators or not set(operators) <= set(_BINDING):
        raise ValueError(
            f"countdown needs num_numbers >= 2, 1 <= low <= high and operators out of '+-*/'; got num_numbers "
            f"{num_numbers}, low {low}, high {high}, operators {operators!r}."
        )
    rng = random.Random(f"countdown {seed}")
    seen: set[tuple[int, ...]] = set()
    puzzles: list[tuple[dict[str, Any], str]] = []
    misses = 0
    while len(puzzles) < n:
        numbers = [rng.randint(low, high) for _ in range(num_numbers)]
        text, value = _random_expression(rng, numbers, operators)
        key = (*sorted(numbers), int(value)) if value is not None else ()
        if value is None or not 1 <= value <= max_target or value in numbers or key in seen:
            misses += 1
            if misses > PATIENCE:
                raise ValueError(
                    f"prompts was asked for {n} distinct puzzles and found {len(puzzles)} for {num_numbers} numbers "
                    f"from {low} to {high} and targets up to {max_target}. Ask for fewer, or widen either range."
                )
            continue
        misses = 0
        seen.add(key)
        target = int(value)
        prompt = f"{' '.join(map(str, numbers))} -> {target}:"
        puzzles.append(({"prompt": prompt, "numbers": numbers, "target": target}, text))
    rng.shuffle(puzzles)
    return puzzles


def _random_expression(rng: random.Random, numbers: Sequence[int], operators: str) -> tuple[str, Fraction | None]:
    """A random expression over the numbers in a random order; its value is None when a step leaves the naturals."""
    terms: list[tuple[str, Fraction, int]] = [(str(number), Fraction(number), 3) for number in numbers]
    rng.shuffle(terms)
    natural = True
    while len(terms) > 1:
        place = rng.randrange(len(terms) - 1)
        (left, a, left_binding), (right, b, right_binding) = terms[place : place + 2]
        sign = rng.choice(operators)
        binding = _BINDING[sign]
        left = f"({left})" if left_binding < binding else left
        tight = right_binding < binding or (right_binding == binding and sign in "-/")
        right = f"({right})" if tight else right
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
        natural = natural and value.denominator == 1 and value >= 0 and not (sign == "/" and b == 0)
        terms[place : place + 2] = [(f"{left}{sign}{right}", value, binding)]
    text, value, _ = terms[0]
    return text, value if natural else None
