"""What a tokenizer and its chat template do, found out by trying them: which variables a template reads, how a turn
begins and ends, and which special tokens a tokenizer puts around a text by itself."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..config import ConfigError
from .prompt import log

# Stand for the words of two turns in a rendered conversation; no template has a rule for them.
_ASKED, _SAID = "llm-pg:what-was-asked", "llm-pg:what-was-said"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What transformers brings to a template besides the arguments of a user.
_BROUGHT = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


@dataclass(frozen=True)
class EndOfTurn:
    """What a chat template writes behind the assistant's words.

    Attributes:
        text: its first token, or all of it where that is no token of its own.
        tokens: ids of the tokens of their own that it begins with, such as <|im_end|>; none where it is plain text.
    """

    text: str
    tokens: tuple[int, ...]


def end_of_turn(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> EndOfTurn | None:
    """How a turn of the assistant ends; None where there is no template, or it writes nothing behind the words."""
    text = _render(tokenizer, ((_ASKED, "user"), (_SAID, "assistant")), chat_template_kwargs)
    _, found, rest = (text or "").rpartition(_SAID)
    rest = rest.strip()
    if not found or not rest:
        return None
    ids, known = tokenizer(rest, add_special_tokens=False)["input_ids"], tokenizer.added_tokens_decoder
    if ids[0] not in known:
        return EndOfTurn(rest, ())
    return EndOfTurn(str(known[ids[0]]), tuple(itertools.takewhile(known.__contains__, ids)))


def special_ids(tokenizer: Any) -> set[int]:
    """Every id that decoding leaves out as special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(number) for number in tokenizer.all_special_ids}


def control_tokens(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> list[str]:
    """The texts of `control_ids`."""
    known = tokenizer.added_tokens_decoder
    return [str(known[number]) for number in sorted(control_ids(tokenizer, chat_template_kwargs)) if number in known]


def control_ids(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> set[int]:
    """Special ids that say nothing by themselves: begin, end, padding and the like, and what the template writes around
    a turn. Other special tokens (<think>, <answer>) are words of the model, also where a template begins a turn with
    one."""
    named = {getattr(tokenizer, f"{name}_token_id") for name in _NAMED} - {None}
    asked = _render(tokenizer, ((_ASKED, "user"),), chat_template_kwargs)
    opened = _render(tokenizer, ((_ASKED, "user"),), chat_template_kwargs, add_generation_prompt=True)
    if asked is None:
        return named
    around = asked.replace(_ASKED, "")
    header = _behind(asked, opened or "")
    end = end_of_turn(tokenizer, chat_template_kwargs)
    ends = special_ids(tokenizer) & set(end.tokens if end else ())
    return named | ends | {*_special_in(tokenizer, around), *_special_in(tokenizer, header)[:1]}


def _behind(before: str, text: str) -> str:
    """`text` from the first character in which it differs from `before`."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
    return text[same:]


def _special_in(tokenizer: Any, text: str) -> list[int]:
    special = special_ids(tokenizer)
    return [number for number in tokenizer(text, add_special_tokens=False)["input_ids"] if number in special]


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text by itself."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(inside) + 1):
        if whole[at : at + len(inside)] == inside:
            return whole[:at], whole[at + len(inside) :]
    return [], []


def check_template(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for an argument that the chat template never reads."""
    known, own = _variables(tokenizer, chat_template_kwargs)
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    for name in chat_template_kwargs:
        if known is None or name in known or name in taken:
            continue
        near = get_close_matches(name, own, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It reads {', '.join(own) or 'no argument of its own'}."
        raise ConfigError(
            f"data.chat_template_kwargs has {name!r}, which the tokenizer's chat template never reads, so that it "
            f"would change nothing. {hint}"
        )


def _variables(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> tuple[set[str] | None, list[str]]:
    """Names that a template may read without having set them, and those that it never sets, which are a user's to give.
    None where it does not say."""
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag by which templates mark the assistant's words for training."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    given = {name: chat_template_kwargs.get(name) for name in ("chat_template", "tools")}
    try:
        source = tokenizer.get_chat_template(**given)
        parsed = jinja2.Environment(extensions=[Generation, loopcontrols]).parse(source)
    except (jinja2.TemplateError, ValueError):
        return None, []  # rendering says what is wrong
    read = meta.find_undeclared_variables(parsed)
    set_there = {name.name for name in parsed.find_all(nodes.Name) if name.ctx != "load"}
    return read, sorted(read - set_there - _BROUGHT - set(tokenizer.special_tokens_map))


def say_generation_prompt(tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> None:
    """Warns where the template begins no turn for the assistant, although it writes something before its words."""
    asked = _render(tokenizer, ((_ASKED, "user"),), chat_template_kwargs)
    opened = _render(tokenizer, ((_ASKED, "user"),), chat_template_kwargs, add_generation_prompt=True)
    both = _render(tokenizer, ((_ASKED, "user"), (_SAID, "assistant")), chat_template_kwargs)
    if asked is None or asked != opened or both is None:
        return
    header = both.partition(_SAID)[0].removeprefix(opened)
    if header.strip() and _SAID in both:
        log.warning(
            "The tokenizer's chat template ignores add_generation_prompt: prompts end behind the user's turn, and the "
            "model has to write %r itself before it answers. Give tokenizer.chat_template the lines "
            "{%% if add_generation_prompt %%}...{%% endif %%}.",
            header,
        )


def _render(
    tokenizer: Any,
    turns: Iterable[tuple[str, str]],
    chat_template_kwargs: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str | None:
    """None where there is no template, or it refuses these turns."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": role, "content": content} for content, role in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **chat_template_kwargs
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    return str(text)


class Bounds:
    """Keeps the special tokens around encoded prompts to what a prompt may have: one beginning and no end.

    Args:
        warned: what was warned of in earlier tables of the same run, which is not repeated.
    """

    def __init__(self, tokenizer: Any, warned: set[str]) -> None:
        self.tokenizer, self.warned = tokenizer, warned
        self.before, self.behind = added_ids(tokenizer)

    def plain(self, ids: Sequence[int], where: str) -> list[int]:
        """The ids of a plain prompt, as the tokenizer gave them with its special tokens, without a second beginning
        and without an end. where: the name of its row."""
        ids, before, behind = list(ids), self.before, self.behind
        if behind and ids[-len(behind) :] == behind:
            ids = ids[: -len(behind)]
            self._say(
                "end",
                f"The tokenizer puts {self._named(behind)} behind every text; behind a prompt it would end what the "
                "model is to go on with, so it is left out.",
            )
        twice = before and ids[len(before) : 2 * len(before)] == before
        while before and ids[len(before) : 2 * len(before)] == before:
            ids = ids[len(before) :]
        if twice:
            self._say(
                "begin",
                f"Prompts hold {self._named(before)} already, the first is {where}; the tokenizer's own is left out, "
                "so that there is one.",
            )
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            self._say(
                "ended",
                f"The prompt of {where} ends in the end token {self.tokenizer.eos_token}, after which a model has "
                "nothing to say. Take it out of the data.",
            )
        return ids

    def words(self, control: Sequence[str], contents: Iterable[str], where: str) -> None:
        """Warns where the words of a conversation hold one of `control`, the tokens around its turns."""
        found = next((token for content in contents for token in control if token in content), None)
        if found is not None:
            self._say(
                "rendered",
                f"The words of {where} hold {found}, which the chat template writes around turns: a prompt that is "
                "rendered already would be rendered again. Give the words alone, or plain prompts without data.chat "
                "and data.system_prompt.",
            )

    def _named(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))

    def _say(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            log.warning("%s", text)
