"""Which tools a turn calls, and with which arguments.

The turn is read by the tokenizer's own `response_template` (transformers 5.13 and later), or by the one that TRL has
for its chat template; without either by the form that most templates write, `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`, several of them or a list in one. Before the run, a call that the template has written is read
back: a template whose form is not understood is refused.

A call that is malformed (no JSON, no name) is no call: the turn is then the answer, as with TRL.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError
from .writing import render

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_PROBES = {"string": "seven", "integer": 7, "number": 7.5, "boolean": True}


@dataclass(frozen=True)
class ToolCall:
    """A tool's name, and its arguments by their names."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What the model said: as a message, with `tool_calls` where there are any, and the calls themselves."""

    message: dict[str, Any]
    calls: tuple[ToolCall, ...]


class CallReader:
    """Reads the calls out of a turn.

    Args:
        tokenizer: of the model. schemas: of the tools, as `apply_chat_template` takes them.
        chat_template_kwargs: as for the prompts.
    """

    def __init__(
        self, tokenizer: Any, schemas: Sequence[Mapping[str, Any]], chat_template_kwargs: Mapping[str, Any]
    ) -> None:
        self.tokenizer, self.schemas = tokenizer, list(schemas)
        self.chat_template_kwargs = chat_template_kwargs
        self.template = response_template(tokenizer)

    def __call__(self, ids: Sequence[int], before: Sequence[int], text: str) -> Turn:
        """Returns the turn that was sampled.

        Args:
            ids: of the turn, with its end token.
            before: all ids before it; a template may have begun the turn.
            text: of the turn, without special tokens: what the message says where it calls nothing.
        """
        message = self._by_template(ids, before) if self.template is not None else self._by_tags(ids)
        calls = _calls(message)
        if calls is None:
            return Turn({"role": "assistant", "content": text}, ())
        return Turn(message or {}, calls)

    def _by_template(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any] | None:
        try:
            message = self.tokenizer.parse_response(
                list(ids), schema=self.template, prefix=list(before), tools=self.schemas
            )
        except (ValueError, TypeError, KeyError):  # of a malformed call, as TRL reads it
            return None
        return dict(message) if message else None

    def _by_tags(self, ids: Sequence[int]) -> dict[str, Any] | None:
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
        calls: list[dict[str, Any]] = []
        try:
            for body in _TAGGED.findall(text):
                found = json.loads(body)
                for each in found if isinstance(found, list) else [found]:
                    arguments = each.get("arguments", each.get("parameters", {}))
                    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                    function = {"name": each.get("name"), "arguments": arguments}
                    calls.append({"type": "function", "function": function})
        except (ValueError, AttributeError):
            return None
        content = self.tokenizer.decode(
            self.tokenizer(_TAGGED.sub("", text), add_special_tokens=False)["input_ids"], skip_special_tokens=True
        )
        return {"role": "assistant", "content": str(content).strip(), "tool_calls": calls}

    def check(self) -> None:
        """Raises ConfigError where the chat template does not show tools, or writes calls in a form that is not read.

        A call that the template writes must come back as it was given.
        """
        function = self.schemas[0]["function"]
        given = ToolCall(function["name"], _probe(function))
        calls = [{"type": "function", "function": {"name": given.name, "arguments": given.arguments}}]
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        try:
            asked = render(self.tokenizer, turns[:1], self.chat_template_kwargs, add_generation_prompt=True)
            plain = {name: value for name, value in self.chat_template_kwargs.items() if name != "tools"}
            untold = render(self.tokenizer, turns[:1], plain, add_generation_prompt=True)
            whole = render(self.tokenizer, turns, self.chat_template_kwargs)
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer's chat template refuses a turn that calls a tool: {error}.{_HELP}"
            ) from None
        if asked == untold:
            raise ConfigError(
                f"The tokenizer's chat template never reads `tools`: the model would not see them.{_HELP}"
            )
        same = next((at for at, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        before, ids = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, whole[same:]))
        read = self(ids, before, "").calls
        if read != (given,):
            found = [(call.name, call.arguments) for call in read] or "no call"
            raise ConfigError(
                f"The tokenizer's chat template writes a call of {given.name} with {json.dumps(given.arguments)} as "
                f"{whole[same:]!r}, and reading it back gives {found}. Set the tokenizer's response_template "
                "(transformers, response parsing), or tokenizer.chat_template to one that writes "
                "<tool_call>{...}</tool_call>."
            )


_HELP = (
    " Take an instruct model that was trained to call tools, or set tokenizer.chat_template to a template that shows "
    "tools, calls and answers."
)


def response_template(tokenizer: Any) -> dict[str, Any] | None:
    """The tokenizer's own, or that of TRL for its chat template; None = neither."""
    own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    if own is not None or not hasattr(tokenizer, "parse_response"):
        return own
    from trl.chat_template_utils import add_response_schema

    try:
        known = add_response_schema(copy.copy(tokenizer))
    except ValueError:  # a chat template that TRL does not know
        return None
    found: dict[str, Any] | None = getattr(known, "response_template", None)
    return found


def _probe(function: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that a call of this function could have."""
    properties = function.get("parameters", {}).get("properties", {})
    kinds = {name: _PROBES.get(str(each.get("type"))) for name, each in properties.items() if not each.get("enum")}
    return {name: value for name, value in kinds.items() if value is not None}


def _calls(message: Mapping[str, Any] | None) -> tuple[ToolCall, ...] | None:
    """The calls of a message; None where one has no name, or arguments without names."""
    calls = []
    for each in (message or {}).get("tool_calls") or []:
        function = each.get("function", each) if isinstance(each, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            return None
        calls.append(ToolCall(name, dict(arguments)))
    return None if not calls else tuple(calls)
