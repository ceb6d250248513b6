"""What of a model is fitted to the prompts of a run, before it is sampled from: where its completions end, and rotary
frequencies that would hang on the longest row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig

from ...config import Config
from ...model.attention import core_of
from ...model.loading import end_token_ids
from ...model.rotary import fix_frequencies
from ...prompts import Prompt
from ...prompts.template import end_of_turn

LOOKED_AT = 64  # prompts by which it is decided whether they are in the form of the chat template


def fit_to_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: Config, warn: Callable[[str], None]
) -> None:
    """Fits a model to all prompts of a run, training and held out, in place; `warn` is given what was changed."""
    add_end_of_turn(model, tokenizer, prompts, config, warn)
    longest = max(len(prompt.ids) for prompt in prompts) + config.rollout.max_completion_length
    kinds = fix_frequencies(model, longest)
    if kinds:
        warn(
            f"The model's rotary embedding ({', '.join(kinds)}) has other frequencies for rows past its original "
            "context, and for all that are computed beside one. They are fixed to those of this run's longest rows "
            f"({longest} tokens), so that no row depends on its neighbours; vLLM does so too. Shorter prompts and "
            "completions within the original context keep those of short rows."
        )


def add_end_of_turn(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: Config, warn: Callable[[str], None]
) -> None:
    """Adds the token that ends a turn of the chat template to the model's generation config, where it is none of
    `end_token_ids`: completions end there, and so do those of the saved model.

    Only for prompts in the form of the template. warn: is given what was added, or that the end of a turn is no token.
    """
    end = end_of_turn(tokenizer, config.data.chat_template_kwargs)
    ends = end_token_ids(model, tokenizer)
    if end is None or set(ends) & set(end.tokens):
        return
    if not any(prompt.messages is not None or end.text in prompt.text for prompt in prompts[:LOOKED_AT]):
        return
    known = ", ".join(str(tokenizer.convert_ids_to_tokens(number)) for number in ends)
    if not end.tokens:
        if not any(end.text.startswith(stop) for stop in config.rollout.stop):
            warn(
                f"The chat template ends a turn by {end.text!r}, which is no token of its own, and completions end at "
                f"{known} alone: set rollout.stop to [{end.text!r}], else they run on past their turn."
            )
        return
    core = core_of(model)
    if getattr(core, "generation_config", None) is None:
        core.generation_config = GenerationConfig()
    core.generation_config.eos_token_id = sorted({*ends, end.tokens[0]})
    warn(
        f"The chat template ends a turn by {end.text}, and the model would end at {known} alone and run on past its "
        f"turn: {end.text} ends completions too, here and in the generation config of the saved model."
    )
