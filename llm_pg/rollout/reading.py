"""How the completions of a run are read: with the special tokens that are words of the model, where somebody reads
them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..config import Config
from ..prompts import Prompt
from ..prompts.decode import Reader, special_words
from ..rewards.specs import RewardFunction

LOOKED_AT = 16  # prompts in which a special token is looked for


def make_reader(config: Config, tokenizer: Any, ends: Collection[int], functions: Sequence[RewardFunction]) -> Reader:
    """What decodes completions for the reward functions, as `reward.skip_special_tokens` says, or else as they ask.

    ends: ids that end a completion.
    """
    skips = config.reward.skip_special_tokens
    if skips is None:
        skips = not any(function.info is not None and function.info.special_tokens for function in functions)
    return Reader(tokenizer, () if skips else special_words(tokenizer, ends, config.data.chat_template_kwargs))


def warn_unread(reader: Reader, prompts: Sequence[Prompt], config: Config, warn: Callable[[str], None]) -> None:
    """Warns where prompts name a special token, such as <think>, that the reward functions will never see."""
    if reader.left_out is None and config.reward.skip_special_tokens is None:
        words = special_words(reader.tokenizer, (), config.data.chat_template_kwargs).values()
        asked = [word for word in words if any(word in prompt.text for prompt in prompts[:LOOKED_AT])]
        if asked:
            warn(
                f"Prompts name {', '.join(asked)}, which the tokenizer has as special tokens, and reward functions get "
                "completions without special tokens. Set reward.skip_special_tokens=false where they look for it, or "
                "true to say that they do not."
            )
