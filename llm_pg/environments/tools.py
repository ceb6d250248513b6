"""Tools that a model may call in the middle of an episode: a calculator, and Python in the sandbox."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import sandbox
from ..rewards.contract import read_plain, read_signature
from ..rewards.loading import Target, load
from .protocol import Reply

MOST_CHARACTERS = 200  # of an expression
MOST_DIGITS = 40  # of a number on the way to the result
LONGEST_RESULT = 2_000  # characters of a tool's answer that the model reads
PYTHON_LIMITS = sandbox.Limits(wall_s=5, cpu_s=4, memory_mb=512, output_kb=16)

Number = int | float
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ToolError(Exception):
    """A call that the tool cannot answer; the model reads why."""


def calculator(expression: str) -> str:
    """The value of an arithmetic expression: numbers, + - * / // % **, brackets.

    Args:
        expression: for example (3+4)*12

    Raises:
        ToolError: for anything else.
    """
    # The docstring is what the model reads. The syntax tree is walked, and nothing is run. Work is bounded: 200
    # characters, and no number of more than 40 digits on the way. Whole numbers stay whole; others have 12 digits.
    text = expression.strip()
    if len(text) > MOST_CHARACTERS:
        raise ToolError(f"the expression is longer than {MOST_CHARACTERS} characters")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("this is no arithmetic expression") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError(f"a number has more than {MOST_DIGITS} digits") from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right))
    raise ToolError("only numbers, + - * / // % ** and brackets are understood")


def _power(base: Number, exponent: Number) -> Number:
    # Before the multiplication, not after: 9**9**9 would not come back.
    if base and abs(exponent) * abs(math.log10(abs(base))) > MOST_DIGITS:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if not abs(value) < 10**MOST_DIGITS:
        raise OverflowError
    return value


def python(code: str) -> str:
    """What a program prints, run in the sandbox, or how it ended. Every call starts afresh: nothing is remembered.

    Args:
        code: the program, in Python

    Raises:
        ToolError: the program fails.
        sandbox.SandboxError: the sandbox does: nothing is known of the program.
    """
    result = sandbox.run(code.strip("\n") + "\n", limits=PYTHON_LIMITS)
    if result.status == "ok":
        return result.stdout.strip()
    if result.status == "error":
        lines = result.stderr.strip().splitlines()
        raise ToolError(lines[-1] if lines else f"exit code {result.exit_code}")
    raise ToolError(f"the program was ended: {result.status}")


TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculator, "python": python}


class ToolEnvironment:
    """Tools called by tags: `<calculator>6*7</calculator>` is answered by `<result>42</result>`.

    The last whole call of a turn is carried out. A turn without one is the answer: it ends the episode and is judged.
    With `rollout.stop: ["</calculator>"]` a turn ends where a call does.

    Args:
        tools: names among `TOOLS`.
        reward: what judges the answer: the name of a shipped reward function, module:function or file.py:function, in
            the plain form; it gets the last turn as `completion`, and the row's columns.
        reward_options: further arguments of it.
        result: the form of a tool's answer, with {}.
    """

    def __init__(
        self,
        reward: str,
        tools: Sequence[str] = ("calculator",),
        reward_options: Mapping[str, Any] | None = None,
        result: str = "\n<result>{}</result>\n",
    ) -> None:
        unknown = [name for name in tools if name not in TOOLS]
        if unknown or not tools:
            raise ValueError(f"tools are one or several of {', '.join(TOOLS)}; got {list(tools)}.")
        self.result, self.reward_options = result, dict(reward_options or {})
        self._call = re.compile(rf"<({'|'.join(tools)})>((?:(?!</?\1>).)*)</\1>", re.DOTALL)
        self._judge = _reward_function(reward)
        self._signature = read_signature(self._judge, reward)
        if self._signature.form != "plain":
            raise ValueError(f"reward {reward!r} takes a batch; the environment judges one answer at a time.")

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self.row = dict(row)

    def step(self, text: str) -> Reply:
        calls = self._call.findall(text)
        if not calls:
            return Reply(reward=self._judged(text), done=True)
        name, argument = calls[-1]
        try:
            result = TOOLS[name](argument)
        except ToolError as error:
            result = f"error: {error}"
        return Reply(self.result.format(result[:LONGEST_RESULT]))

    def _judged(self, text: str) -> float | None:
        columns = {name: self.row[name] for name in self._signature.columns(list(self.row))}
        if "prompt" in self._signature.arguments:
            columns["prompt"] = self.row.get("prompt")
        reward, _ = read_plain(self._judge(completion=text, **{**columns, **self.reward_options}))
        if isinstance(reward, list):
            raise ValueError(
                "a reward function gave one number for each token; of an answer after tools it is one number."
            )
        return reward


def _reward_function(spec: str) -> Callable[..., Any]:
    from reward_fns.registry import rewards

    place, colon, name = spec.rpartition(":")
    if colon:
        is_file = place.endswith(".py") or "/" in place
        return load(Target(None, place, name) if is_file else Target(place, None, name))
    if spec not in rewards():
        raise ValueError(f"There is no shipped reward function {spec!r}; there are {', '.join(rewards())}.")
    return rewards()[spec].function
