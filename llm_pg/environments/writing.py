"""The tokens between two turns of the model: the environment's reply, in the form of the chat template.

They come from the text alone, tokenised by itself. What was sampled before stays the ids that were sampled, since
decoding and encoding again need not give them back, and would train tokens that nobody chose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..config import ConfigError

# Stand in for the turns in a rendered conversation; no template has a rule for them.
_SPOKEN, _ANSWERED = "llm-pg:what-the-model-said", "llm-pg:what-it-was-told"


class TurnWriter:
    """Writes the environment's reply behind a turn of the model.

    Args:
        tokenizer: of the model. eos_ids: ids that end a turn.
        chat_template_kwargs: as for the prompts.
    """

    def __init__(
        self, tokenizer: Any, eos_ids: Collection[int], chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._frames: dict[str, tuple[str, str]] = {}
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def ids(self, text: str, last_id: int, role: str | None = None) -> tuple[int, ...]:
        """The ids of `text`, and of the frame that a chat template puts around it.

        Args:
            text: the environment's reply; read as plain text, also where it looks like a special token.
            last_id: the last token of the turn before, so that an end token that was sampled is not written twice.
            role: of the text in a conversation; None = the prompt is plain text, and nothing is put around it.
        """
        if role is None:
            return self._plain(text)
        before, after = self._frame(role)
        if last_id in self.eos_ids:
            before = before.removeprefix(self.tokenizer.decode([last_id]))
        return (*self._marked(before), *self._plain(text), *self._marked(after))

    def tool_ids(self, messages: Sequence[Mapping[str, Any]], last_id: int) -> tuple[int, ...]:
        """The ids of what tools answered to the turn before, and of the frame up to the model's next turn.

        The answers and their frame are tokenised as one text, as the template renders them, unless an answer holds a
        special token: then it is read as plain text, so that no tool can write the end of a turn.

        Args:
            messages: of the role tool, with name and content, in the order of the calls.
            last_id: as for `ids`.
        """
        text = self._behind_calls(messages)
        if last_id in self.eos_ids:
            text = text.removeprefix(self.tokenizer.decode([last_id]))
        if not any(word in message["content"] for message in messages for word in self._special):
            return self._marked(text)
        return self._pieces(text, messages)

    def _pieces(self, text: str, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The ids of `text`, which ends in the answers and their frame, with the answers read as plain text."""
        empty = [{**message, "content": f"{_ANSWERED}-{place}."} for place, message in enumerate(messages)]
        frame = self._behind_calls(empty)
        answers = []
        for place, message in enumerate(messages):  # as the template writes each: trimmed, or as a JSON text
            alone = self._behind_calls([*empty[:place], message, *empty[place + 1 :]])
            before, _, after = frame.partition(empty[place]["content"])
            answers.append(alone[len(before) : len(alone) - len(after)])
        rest, ids = frame, []  # type: str, list[int]
        skipped = len(self._behind_calls(messages)) - len(text)
        for answer, mark in zip(answers, empty, strict=True):
            before, _, rest = rest.partition(mark["content"])
            ids += [*self._marked(before[skipped:]), *self._plain(answer)]
            skipped = 0
        return (*ids, *self._marked(rest))

    def _behind_calls(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes from the end token of a turn that calls these tools to the model's next turn."""
        # One call stands for all: Llama 3's template refuses several.
        calls = [{"type": "function", "function": {"name": messages[0]["name"], "arguments": {}}}]
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        begun = render(self.tokenizer, turns, self.chat_template_kwargs)
        whole = render(self.tokenizer, [*turns, *messages], self.chat_template_kwargs, add_generation_prompt=True)
        at = len(up_to_end(self.tokenizer, self.eos_ids, begun, after=False))
        if not whole.startswith(begun[:at]):
            raise ConfigError(
                "The tokenizer's chat template writes a turn that calls a tool in another way once the tool has "
                "answered, and what was sampled cannot be changed. Set tokenizer.chat_template to one that keeps it."
            )
        return whole[at:]

    def _plain(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _marked(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _frame(self, role: str) -> tuple[str, str]:
        """What the template writes between the model's words and those of `role`, and from there to its next turn."""
        if role not in self._frames:
            self._frames[role] = self._render(role)
        return self._frames[role]

    def _render(self, role: str) -> tuple[str, str]:
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SPOKEN},
            {"role": role, "content": _ANSWERED},
        ]
        try:
            text = render(self.tokenizer, messages, self.chat_template_kwargs, add_generation_prompt=True)
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer's chat template refuses a turn of the role {role!r} after the assistant's: {error}. "
                "Let the environment reply in the role user."
            ) from None
        _, spoken, rest = text.partition(_SPOKEN)
        before, answered, after = rest.partition(_ANSWERED)
        if not spoken or not answered:
            raise ConfigError(
                f"The tokenizer's chat template does not show the words of every turn (roles assistant and {role}), so "
                "an episode of several turns cannot be written with it. Set tokenizer.chat_template to one that does."
            )
        return before, after


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    chat_template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation. Raises ValueError where the template refuses it."""
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **chat_template_kwargs
            )
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(str(error)) from None


def up_to_end(tokenizer: Any, eos_ids: Collection[int], text: str, *, after: bool = True) -> str:
    """A conversation up to the last token that ends a turn, with it or (after=False) without; all of it where there is
    none. What a template writes behind it, such as a line's end, the model has not said."""
    ends = [(text.rfind(end), end) for end in (tokenizer.decode([number]) for number in eos_ids) if end]
    at, end = max(ends, default=(-1, ""))
    return text if at < 0 else text[: at + len(end) * after]
