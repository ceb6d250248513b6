"""A prompt has one beginning and no end, and what a chat template does not know or do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AddedToken

from llm_pg.config import ConfigError
from llm_pg.prompts import Prompt, load_prompts
from llm_pg.prompts.template import control_ids, end_of_turn, special_ids

from .conftest import config, make_tokenizer

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # as Llama 3
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n<think>{% endif %}"
)
ROLES = (  # as Phi 3: an end in place of the assistant's turn
    "{% for m in messages %}{{ '<|u|>' if m['role'] == 'user' else '<|a|>' }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|>\n{% else %}{{ eos_token }}{% endif %}"
)
INSTRUCTIONS = (  # as Mistral: no words of its own before the assistant's
    "{% for m in messages %}{% if m['role'] == 'user' %}[I]{{ m['content'] }}[/I]{% else %}{{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def load(tokenizer: Any, rows: list[dict[str, Any]], **values: Any) -> list[Prompt]:
    given = config(**{"num_eval_prompts": 0, "prompts_per_step": 1, **values})
    return load_prompts(given, tokenizer, train_dataset=rows)[0]


def chat(template: str, special: list[str], **names: Any) -> Any:
    tokenizer = make_tokenizer(**names)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = template
    return tokenizer


def appending(**names: Any) -> Any:
    """A tokenizer that puts a beginning before every text and an end behind it."""
    tokenizer = make_tokenizer(**names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 0), ("[EOS]", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["[BOS]2+2=", "[BOS][BOS]2+2=", "2+2="])
def test_a_prompt_has_one_beginning(text: str, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": text}, {"prompt": f"{text} "}]
    prompts = load(tokenizer, rows)
    assert [prompt.ids.count(tokenizer.bos_token_id) for prompt in prompts] == [1, 1]
    assert list(prompts[0].ids) == tokenizer("2+2=")["input_ids"]
    warned = [record.getMessage() for record in caplog.records if "hold [BOS] already" in record.getMessage()]
    assert len(warned) == int("[BOS]" in text)


def test_held_out_prompts_are_warned_of_with_the_others_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"[BOS]{n}+2="} for n in range(8)]
    given = config(num_eval_prompts=2, prompts_per_step=1)
    train, held_out = load_prompts(given, tokenizer, train_dataset=rows[:5], eval_dataset=rows[5:])
    assert all(prompt.ids.count(tokenizer.bos_token_id) == 1 for prompt in (*train, *held_out))
    assert sum("already" in record.getMessage() for record in caplog.records) == 1


def test_an_end_that_the_tokenizer_puts_behind_a_prompt_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = appending()
    assert tokenizer("2+2=")["input_ids"][-1] == tokenizer.eos_token_id
    prompts = load(tokenizer, [{"prompt": "2+2="}, {"prompt": "[BOS]3+3="}])
    assert list(prompts[0].ids) == tokenizer("2+2=")["input_ids"][:-1]
    assert [prompt.ids.count(tokenizer.bos_token_id) for prompt in prompts] == [1, 1]
    assert not any(tokenizer.eos_token_id in prompt.ids for prompt in prompts)
    assert sum("[EOS] behind every text" in record.getMessage() for record in caplog.records) == 1


def test_an_end_in_the_data_is_named_and_left(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    (prompt,) = load(tokenizer, [{"prompt": "2+2=4[EOS]"}])
    assert prompt.ids[-1] == tokenizer.eos_token_id
    assert "ends in the end token [EOS]" in caplog.text


def test_a_conversation_whose_words_are_rendered_already_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat(CHATML, ["<|im_start|>", "<|im_end|>"])
    rendered = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    load(tokenizer, [{"prompt": rendered}])  # plain: read as it stands
    assert "rendered" not in caplog.text
    load(tokenizer, [{"prompt": rendered}, {"prompt": f"{rendered} "}], chat=True)
    warned = [record.getMessage() for record in caplog.records if "would be rendered again" in record.getMessage()]
    assert len(warned) == 1
    assert "<|im_start|>" in warned[0]


def test_an_argument_that_the_template_never_reads_is_named_with_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"has 'thinks', which the tokenizer's chat template never reads.*'think'\?"):
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"thinks": True})
    with pytest.raises(ConfigError, match=r"It reads think\."):
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"enable_reasoning": True})
    with pytest.raises(ConfigError, match=r"'tools', which .* never reads"):
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"tools": []})


def test_arguments_of_a_template_with_loops_sets_and_generation_marks_are_found() -> None:
    template = (
        "{% set kind = style | default('x') %}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}{{ kind }}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = chat(template, [])
    (prompt,) = load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"style": "q"})
    assert prompt.text == "hiq>"
    with pytest.raises(ConfigError, match=r"Did you mean 'style'\?"):
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"styles": "q"})
    with pytest.raises(ConfigError, match=r"'kind'"):  # the template's own, set before it is read
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"kind": "q"})


def test_arguments_of_the_template_for_plain_prompts_are_said_to_do_nothing(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(tokenizer, [{"prompt": "2+2="}], chat_template_kwargs={"think": True})
    assert "chat_template_kwargs (think) changes nothing" in caplog.text


def test_a_template_that_opens_no_turn_for_the_assistant_is_named(caplog: pytest.LogCaptureFixture) -> None:
    without = CHATML.partition("{% if add_generation_prompt")[0]
    load(chat(without, ["<|im_start|>", "<|im_end|>"]), [{"prompt": USER}])
    assert "ignores add_generation_prompt" in caplog.text
    assert repr("<|im_start|>assistant\n") in caplog.text


@pytest.mark.parametrize("template", [CHATML, HEADERS, INSTRUCTIONS, ROLES])
def test_a_template_that_opens_the_turn_or_needs_no_words_for_it_is_not(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(
        chat(template, ["<|im_start|>", "<|im_end|>", "<|h|>", "<|/h|>", "<|eot|>", "<|u|>", "<|a|>", "<|end|>"]),
        [{"prompt": USER}],
    )
    assert not caplog.records


@pytest.mark.parametrize(
    "template, special, text, in_turns",
    [
        (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
        (HEADERS, ["<|h|>", "<|/h|>", "<|eot|>"], "<|eot|>", {"<|h|>", "<|/h|>", "<|eot|>"}),
        (INSTRUCTIONS, ["[I]", "[/I]"], "[EOS]", {"[I]", "[/I]"}),
        (ROLES, ["<|u|>", "<|a|>", "<|end|>"], "<|end|>", {"<|u|>", "<|a|>", "<|end|>"}),
    ],
)
def test_the_end_and_the_tokens_of_a_turn_are_read_off_the_template(
    template: str, special: list[str], text: str, in_turns: set[str]
) -> None:
    tokenizer = chat(template, [*special, "<think>", "</think>"])
    end = end_of_turn(tokenizer, {})
    assert end is not None
    assert (end.text, end.tokens) == (text, (tokenizer.convert_tokens_to_ids(text),))
    control = {tokenizer.convert_ids_to_tokens(number) for number in control_ids(tokenizer, {})}
    assert control == in_turns | {"[BOS]", "[EOS]", "[UNK]"}
    left = special_ids(tokenizer) - control_ids(tokenizer, {})
    assert {tokenizer.convert_ids_to_tokens(number) for number in left} == {"<think>", "</think>"}


def test_every_token_of_an_end_is_known() -> None:
    template = "{% for m in messages %}{{ m['content'] }}<|/r|>[EOS]{% endfor %}"
    tokenizer = chat(template, ["<|/r|>"])
    end = end_of_turn(tokenizer, {})
    assert end is not None
    assert end.tokens == (tokenizer.convert_tokens_to_ids("<|/r|>"), tokenizer.eos_token_id)


def test_an_end_of_turn_that_is_no_token_has_no_id() -> None:
    end = end_of_turn(chat("{% for m in messages %}{{ m['content'] }}\n### End\n{% endfor %}", []), {})
    assert end is not None
    assert (end.text, end.tokens) == ("### End", ())
    assert end_of_turn(chat("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", []), {}) is None
    assert end_of_turn(chat("", []), {}) is None


@pytest.mark.parametrize(
    "name, end, in_turns",
    [
        ("qwen3", "<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
        ("llama3", "<|eot_id|>", {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}),
        ("gemma3", "<end_of_turn>", {"<start_of_turn>", "<end_of_turn>"}),
        ("phi3", "<|end|>", {"<|user|>", "<|assistant|>", "<|end|>"}),
        ("gptoss", "<|return|>", {"<|start|>", "<|message|>", "<|end|>", "<|return|>"}),
    ],
)
def test_templates_as_models_have_them_are_read(
    name: str, end: str, in_turns: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As TRL ships them, with their special tokens and <think> as one more."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = chat(template, sorted({*in_turns, "<think>", "</think>"}))
    found = end_of_turn(tokenizer, {})
    assert found is not None
    assert found.text == end
    control = {tokenizer.convert_ids_to_tokens(number) for number in control_ids(tokenizer, {})}
    assert control - {"[BOS]", "[EOS]", "[UNK]"} == in_turns
    load(tokenizer, [{"prompt": USER}])
    assert not [record for record in caplog.records if "characters that the tokenizer" not in record.getMessage()]
    if name == "qwen3":
        load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"enable_thinking": False})
        with pytest.raises(ConfigError, match=r"Did you mean 'enable_thinking'\?"):
            load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"enable_thinkng": False})
