"""From drafts to token ids: the chat template, special tokens, and what a tokenizer cannot do.

Ids are those of TRL 1.16's trainers: plain text is encoded with the special tokens that the tokenizer adds by itself
(for Llama a BOS, for Qwen none), a rendered conversation without more, since the template has written them. One
departure: where the last message is the assistant's, it is continued, as TRL's dataset functions do; TRL's trainers
open a new turn after it. Another: a plain prompt has one beginning and no end, also where its text holds a BOS already
or the tokenizer puts an EOS behind every text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..config import ConfigError
from .prompt import Prompt, log
from .rows import Draft, Messages
from .table import short
from .template import Bounds, check_template, control_tokens, say_generation_prompt


def encode(
    drafts: Sequence[Draft],
    tokenizer: Any,
    where: Callable[[int], str],
    *,
    chat_template_kwargs: dict[str, Any],
    vocab_size: int | None = None,
    warned: set[str] | None = None,
) -> list[Prompt]:
    """A prompt of every draft, with its place as index.

    Args:
        where: names a draft's row in messages. warned: the warnings that this run has had, which are not repeated.
    """
    warned = set() if warned is None else warned
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer has no end-of-sequence token, so a completion could never end. Set tokenizer.eos_token to "
            "the token that ends an answer (for chat models the one that ends a turn)."
        )
    chat = bool(drafts) and not isinstance(drafts[0].content, str)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"The prompt of {where(0)} is a conversation, and the tokenizer has no chat template. Use an instruct "
            "model, set tokenizer.chat_template, or give plain prompts without system_prompt and chat."
        )
    _check_template(chat, tokenizer, chat_template_kwargs, warned)
    texts = [
        draft.content
        if isinstance(draft.content, str)
        else _rendered(draft.content, tokenizer, where(index), chat_template_kwargs)
        for index, draft in enumerate(drafts)
    ]
    ids_by_row = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
    bounds = Bounds(tokenizer, warned)
    if chat:
        control = control_tokens(tokenizer, chat_template_kwargs)
        for index, draft in enumerate(drafts):
            bounds.words(control, (str(turn["content"]) for turn in draft.content), where(index))  # type: ignore[index]
    else:
        ids_by_row = [bounds.plain(ids, where(index)) for index, ids in enumerate(ids_by_row)]
    _check_ids(ids_by_row, texts, tokenizer, where, vocab_size)
    return [
        Prompt(index, text, None if isinstance(draft.content, str) else draft.content, tuple(ids), draft.row)
        for index, (draft, text, ids) in enumerate(zip(drafts, texts, ids_by_row, strict=True))
    ]


def _check_template(chat: bool, tokenizer: Any, chat_template_kwargs: dict[str, Any], warned: set[str]) -> None:
    if chat:
        check_template(tokenizer, chat_template_kwargs)
    if "template" in warned:
        return
    warned.add("template")
    if chat:
        say_generation_prompt(tokenizer, chat_template_kwargs)
    elif chat_template_kwargs:
        log.warning(
            "data.chat_template_kwargs (%s) changes nothing: the prompts are plain text, to which no chat template is "
            "applied. Set data.chat=true to apply it.",
            ", ".join(chat_template_kwargs),
        )


def _rendered(messages: Messages, tokenizer: Any, where: str, chat_template_kwargs: dict[str, Any]) -> str:
    import jinja2

    prefilled = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            **chat_template_kwargs,
        )
    except (jinja2.TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"The tokenizer's chat template refuses the conversation of {where} (roles: {roles}): {error}"
        ) from None


def _check_ids(
    ids_by_row: Sequence[Sequence[int]],
    texts: Sequence[str],
    tokenizer: Any,
    where: Callable[[int], str],
    vocab_size: int | None,
) -> None:
    unknown = []
    for index, ids in enumerate(ids_by_row):
        if not ids:
            raise ConfigError(f"The prompt of {where(index)} encodes to no tokens: {short(texts[index])}.")
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ConfigError(
                f"The prompt of {where(index)} has the token id {max(ids)}, and the model's embedding has {vocab_size} "
                f"rows (the tokenizer knows {len(tokenizer)} tokens). They do not belong together: take the model's "
                "own tokenizer, or resize the embedding with model.resize_token_embeddings(len(tokenizer))."
            )
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            unknown.append(index)
    if unknown:
        log.warning(
            "%d of %d prompts hold characters that the tokenizer does not know (read as %s), first %s: %s",
            len(unknown),
            len(texts),
            tokenizer.unk_token,
            where(unknown[0]),
            short(texts[unknown[0]]),
        )
