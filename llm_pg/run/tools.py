"""The tools of a run: found before its model is loaded, shown by the chat template, and called while it samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import Config, ConfigError
from ..environments.calls import CallReader
from ..environments.history import template_that_keeps
from ..environments.partner import ToolPartner
from ..environments.running import ToolRunner
from ..environments.toolbox import Toolbox
from ..environments.writing import TurnWriter
from ..model.loading import end_token_ids, generation_stub, load_tokenizer
from ..prompts import Prompt
from ..prompts.encode import encode
from ..prompts.rows import Draft
from ..rewards.loading import Target, target_of


def name_tools(config: Config, tools: Any, environment_factory: Any) -> None:
    """Puts into the config what a trainer was given as objects: addresses, or names where there are none."""
    rollout = config.rollout
    if tools:
        if rollout.tools:
            raise ConfigError(f"tools are given twice: to the trainer, and rollout.tools={rollout.tools!r}. Give one.")
        rollout.tools = [_address(tool) for tool in tools] if isinstance(tools, (list, tuple)) else [str(tools)]
    if environment_factory is not None:
        if rollout.environment_factory is not None:
            raise ConfigError(
                "environment_factory is given twice: to the trainer, and rollout.environment_factory="
                f"{rollout.environment_factory!r}. Give one."
            )
        several = isinstance(environment_factory, Mapping)
        rollout.environment_factory = (
            {str(name): _address(each) for name, each in environment_factory.items()}
            if several
            else _address(environment_factory)
        )


def _address(given: Any) -> str:
    if isinstance(given, str):
        return given
    target = target_of(given)
    if isinstance(target, Target):
        return f"{target.module or target.file}:{target.qualname}"
    return str(getattr(given, "__name__", type(given).__name__))


def make_toolbox(config: Config, tools: Any = None, environment_factory: Any = None) -> Toolbox | None:
    """The tools that were given, else those of the config; None where there are none."""
    rollout = config.rollout
    if not rollout.calls_tools:
        return None
    return Toolbox(tools or rollout.tools, environment_factory or rollout.environment_factory, rollout.mcp_servers)


def show_tools(
    config: Config, toolbox: Toolbox | None, model: Any, tokenizer: Any, warn: Callable[[str], None]
) -> None:
    """Puts the tools into the arguments of the chat template, and checks what it makes of them.

    Raises:
        ConfigError: a template that does not show tools, whose calls cannot be read, or that rewrites earlier turns.
    """
    if toolbox is None:
        return
    if not (getattr(tokenizer, "chat_template", None) or "chat_template" in config.data.chat_template_kwargs):
        raise ConfigError("Tools are shown by the chat template, and the tokenizer has none: use an instruct model.")
    kwargs, schemas = config.data.chat_template_kwargs, toolbox.schemas
    if kwargs.get("tools", schemas) != schemas:
        raise ConfigError(
            "data.chat_template_kwargs has other tools than rollout.tools and environment_factory. Leave them out "
            "there: the schemas of the tools are added."
        )
    kwargs["tools"] = schemas
    for reader in _readers(toolbox, tokenizer, kwargs).values():
        reader.check()
    ends = end_token_ids(model, tokenizer)
    other = template_that_keeps(tokenizer, ends, kwargs, schemas[0]["function"]["name"], warn)
    if other is not None:
        warn(
            "The tokenizer's chat template rewrites earlier turns; the prompts and the tools' answers are written by "
            "TRL's template for training in its place, which keeps them (data.chat_template_kwargs). Serve the model "
            "with that one."
        )
        kwargs["chat_template"] = other


def check_tools(config: Config, contents: Sequence[Any], warn: Callable[[str], None]) -> None:
    """Raises ConfigError where a run of this config would refuse its tools. Loads the tokenizer, and no model.

    Args:
        config: of the run; it stays as it is.
        contents: of the prompts, texts or messages.
        warn: takes what the run would print.
    """
    if not config.rollout.calls_tools:
        return
    config = config.model_copy(deep=True)
    toolbox = make_toolbox(config)
    assert toolbox is not None
    try:
        show_tools(config, toolbox, generation_stub(config.model), load_tokenizer(config.model), warn)
    finally:
        toolbox.close()
    check_conversations(toolbox, contents)


def check_conversations(toolbox: Toolbox | None, contents: Iterable[Any]) -> None:
    """Raises ConfigError where a prompt is plain text (or has no messages), to which no chat template is applied."""
    if toolbox is not None and any(content is None or isinstance(content, str) for content in contents):
        raise ConfigError(
            "Tools are shown by the chat template, and the prompts are plain text: the model would not see them. Set "
            "data.chat=true, or give the prompts as lists of messages."
        )


def shown_to(config: Config, toolbox: Toolbox | None, tokenizer: Any, *sets: Sequence[Prompt]) -> list[list[Prompt]]:
    """Returns each of the sets of prompts with the tools that its rows name, checked.

    Raises:
        ConfigError: a conversation that has no room for tools.
    """
    made = [with_own_tools(config, toolbox, prompts, tokenizer) for prompts in sets]
    check_conversations(toolbox, (prompt.messages for prompts in made for prompt in prompts))
    return made


def with_own_tools(config: Config, toolbox: Toolbox | None, prompts: Sequence[Prompt], tokenizer: Any) -> list[Prompt]:
    """The prompts, each with the tools of its row's environment alone where there are several environments.

    Raises ConfigError where a row names no environment.
    """
    if toolbox is None or not toolbox.chooses:
        return list(prompts)
    made = list(prompts)
    for name in toolbox.names:
        places = [place for place, prompt in enumerate(prompts) if toolbox.name_of(prompt.row) == name]
        drafts = [Draft(prompts[place].messages or "", prompts[place].row) for place in places]
        for place, prompt in zip(places, _encoded(drafts, tokenizer, toolbox, name, config), strict=True):
            made[place] = replace(prompt, index=prompts[place].index)
    return made


def _encoded(
    drafts: Sequence[Draft], tokenizer: Any, toolbox: Toolbox, name: str | None, config: Config
) -> list[Prompt]:
    """Prompts with the tools of an environment."""
    kwargs = {**config.data.chat_template_kwargs, "tools": toolbox.schemas_of(name)}
    return encode(drafts, tokenizer, lambda _: "an episode", chat_template_kwargs=kwargs, warned={"template"})


def _readers(toolbox: Toolbox, tokenizer: Any, kwargs: Mapping[str, Any]) -> dict[str | None, CallReader]:
    return {
        name: CallReader(tokenizer, schemas, {**kwargs, "tools": schemas})
        for name in toolbox.names
        for schemas in [toolbox.schemas_of(name)]
    }


def make_partner(config: Config, toolbox: Toolbox, tokenizer: Any, ends: Any) -> ToolPartner:
    """What answers the model's calls in a run."""
    kwargs, settings = config.data.chat_template_kwargs, config.reward
    runner = ToolRunner(
        toolbox.shared,
        timeout=config.rollout.tool_timeout,
        workers=settings.reward_workers,
        in_process=settings.reward_in_process,
    )

    def opening(prompt: Prompt, said: str, name: str | None) -> Prompt:
        if prompt.messages is None:
            return prompt
        last = prompt.messages[-1]
        messages = [*prompt.messages[:-1], {**last, "content": last["content"] + said}]
        made = _encoded([Draft(messages, prompt.row)], tokenizer, toolbox, name, config)
        return replace(made[0], index=prompt.index)

    readers = _readers(toolbox, tokenizer, kwargs)
    return ToolPartner(toolbox, readers, runner, TurnWriter(tokenizer, ends, kwargs), opening)
