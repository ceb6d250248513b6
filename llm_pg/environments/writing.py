"""The tokens between two turns of the model: the environment's reply, in the form of the chat template.

They come from the text alone, tokenised by itself. What was sampled before stays the ids that were sampled, since
decoding and encoding again need not give them back, and would train tokens that nobody chose.
"""

from __future__ import annotations

from collections.abc import Collection
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
        import jinja2

        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SPOKEN},
            {"role": role, "content": _ANSWERED},
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
        except (jinja2.TemplateError, ValueError) as error:
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
