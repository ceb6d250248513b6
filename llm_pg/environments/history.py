"""Does a chat template leave earlier turns as they are when a tool's answer follows?

What was sampled is never rendered again. A template that writes it in another way later (Qwen3's takes reasoning out of
earlier turns) would show the model, once it is served, another conversation than it was trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..config import ConfigError
from .writing import render, up_to_end

_WORDS = "<think>\nllm-pg:thought\n</think>\n\nllm-pg:words"


def template_that_keeps(
    tokenizer: Any,
    eos_ids: Collection[int],
    chat_template_kwargs: Mapping[str, Any],
    name: str,
    warn: Callable[[str], None],
) -> str | None:
    """None where the tokenizer's template keeps earlier turns; else TRL's template for training in its place, which
    keeps them.

    Args:
        tokenizer: of the model. eos_ids: ids that end a turn. chat_template_kwargs: with the tools.
        name: of a tool. warn: of a template that keeps a call, but not what the model says beside it.

    Raises:
        ConfigError: it rewrites calls, and TRL has none in its place.
    """

    def change(template: str | None, words: str) -> tuple[str, str] | None:
        given = {} if template is None else {"chat_template": template}
        return first_change(tokenizer, eos_ids, {**chat_template_kwargs, **given}, name, words)

    of_call, of_words = change(None, ""), change(None, _WORDS)
    if of_call is None and of_words is None:
        return None
    other = None if "chat_template" in chat_template_kwargs else _trls_template(tokenizer)
    if other is not None and change(other, "") is None and change(other, _WORDS) is None:
        return other
    if of_call is not None:
        raise ConfigError(
            f"The tokenizer's chat template rewrites earlier turns once a tool has answered: {of_call[0]!r} becomes "
            f"{of_call[1]!r}. What was sampled cannot be changed, so the model would be trained in another "
            "conversation than it is served in. Set tokenizer.chat_template to one that keeps earlier turns; TRL has "
            "none in its place."
        )
    assert of_words is not None
    warn(
        f"The tokenizer's chat template keeps calls of tools, but rewrites what the model says beside them once a tool "
        f"has answered: {of_words[0]!r} becomes {of_words[1]!r}. Here it stays as it was sampled."
    )
    return None


def _trls_template(tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        found = get_training_chat_template(tokenizer)
    except ValueError:  # a template that TRL does not know
        return None
    return None if found is None else str(found)


def first_change(
    tokenizer: Any, eos_ids: Collection[int], chat_template_kwargs: Mapping[str, Any], name: str, words: str
) -> tuple[str, str] | None:
    """How a turn that calls a tool is written as the last one and later on, from the first difference; None = equally.

    Two rounds of call and answer are tried. What a template makes of them after a further turn of the user does not
    matter: in an episode there is none.

    Args:
        tokenizer, eos_ids, chat_template_kwargs, name: as for `template_that_keeps`.
        words: what the model says beside the call.
    """
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}}]
    said = {"role": "assistant", "content": words, "tool_calls": calls}
    turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    for answer in ("llm-pg:first", "llm-pg:second"):
        begun = render(tokenizer, [*turns, said], chat_template_kwargs)
        turns += [said, {"role": "tool", "name": name, "content": answer}]
        whole = render(tokenizer, turns, chat_template_kwargs, add_generation_prompt=True)
        kept = up_to_end(tokenizer, eos_ids, begun)
        if not whole.startswith(kept):
            at = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), len(whole))
            return kept[at : at + 80], whole[at : at + 80]
    return None
