"""Text, messages and ids agree with the tokenizer and with TRL."""

from __future__ import annotations

from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.prompts import Prompt, load_prompts

from .conftest import config, make_tokenizer


def load(tokenizer: Any, rows: list[dict[str, Any]], vocab_size: int | None = None, **values: Any) -> list[Prompt]:
    given = config(num_eval_prompts=0, prompts_per_step=1, **values)
    return load_prompts(given, tokenizer, train_dataset=rows, vocab_size=vocab_size)[0]


USER = [{"role": "user", "content": "hi"}]


def test_a_plain_prompt_is_encoded_with_the_tokenizers_own_special_tokens(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": "2+2="}])
    assert prompt.text == "2+2="
    assert prompt.messages is None
    assert list(prompt.ids) == tokenizer(text=["2+2="])["input_ids"][0]  # TRL 1.16, _tokenize_prompts
    assert prompt.ids[0] == tokenizer.bos_token_id


def test_a_conversation_gets_the_generation_prompt_and_no_second_bos(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": USER}])
    assert prompt.text == "[BOS]<user>hi[EOS]<assistant>"
    assert prompt.messages == USER
    encoded = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, return_dict=True
    )  # TRL 1.16, _tokenize_prompts
    assert list(prompt.ids) == encoded["input_ids"][0]
    assert prompt.ids.count(tokenizer.bos_token_id) == 1


def test_text_and_ids_are_those_of_trls_dataset_functions(tokenizer: Any) -> None:
    from trl import apply_chat_template, is_conversational

    rows: list[dict[str, Any]] = [
        {"prompt": USER},
        {"prompt": [{"role": "system", "content": "be brief"}, *USER]},
        {"prompt": [*USER, {"role": "assistant", "content": "<think>so"}]},
    ]
    for row, prompt in zip(rows, load(tokenizer, rows), strict=True):
        assert is_conversational(row)
        assert prompt.text == apply_chat_template(row, tokenizer)["prompt"]
    assert prompt.text == "[BOS]<user>hi[EOS]<assistant><think>so"


def test_a_system_prompt_makes_a_plain_prompt_a_conversation(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": "hi"}], system_prompt="be brief")
    assert prompt.messages == [{"role": "system", "content": "be brief"}, *USER]
    assert prompt.text == "[BOS]<system>be brief[EOS]<user>hi[EOS]<assistant>"


def test_a_system_prompt_goes_before_the_messages_of_a_row(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": USER}], system_prompt="be brief")
    assert [message["role"] for message in prompt.messages or []] == ["system", "user"]


def test_chat_makes_a_plain_prompt_the_users_message(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": "hi"}], chat=True)
    assert prompt.messages == USER
    assert load(tokenizer, [{"prompt": "hi"}], chat=False)[0].messages is None


def test_arguments_of_the_chat_template_reach_it(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": USER}], chat_template_kwargs={"think": True})
    assert prompt.text.endswith("<assistant>hm ")


def test_fields_that_arrow_filled_with_none_are_no_part_of_a_message(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, [{"prompt": [{**USER[0], "tool_calls": None}]}])
    assert prompt.messages == USER


def test_characters_that_the_tokenizer_does_not_know_are_warned_of(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(tokenizer, [{"prompt": "abc"}, {"prompt": "é?"}])
    assert "1 of 2 prompts hold characters that the tokenizer does not know" in caplog.text
    assert "row 1 of train_dataset" in caplog.text


@pytest.mark.faults
def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no end-of-sequence token.*Set tokenizer\.eos_token"):
        load(make_tokenizer(eos_token=None), [{"prompt": "a"}])


@pytest.mark.faults
def test_a_conversation_for_a_tokenizer_without_a_chat_template_is_refused() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"row 0 of train_dataset is a conversation.*has no chat template"):
        load(bare, [{"prompt": USER}])
    assert load(bare, [{"prompt": "plain"}])[0].text == "plain"


@pytest.mark.faults
def test_ids_outside_the_embedding_are_refused_with_both_sizes(tokenizer: Any) -> None:
    highest = tokenizer.convert_tokens_to_ids("~")
    assert load(tokenizer, [{"prompt": "~"}], vocab_size=highest + 1)
    with pytest.raises(ConfigError, match=rf"row 1 .*token id {highest}.*embedding has {highest} rows"):
        load(tokenizer, [{"prompt": "a"}, {"prompt": "~"}], vocab_size=highest)


@pytest.mark.faults
def test_a_prompt_that_encodes_to_nothing_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "[EOS]": 1}, []))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    deaf = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]")
    with pytest.raises(ConfigError, match="row 1 of train_dataset encodes to no tokens: 'zzz'"):
        load(deaf, [{"prompt": "aa"}, {"prompt": "zzz"}])


@pytest.mark.faults
def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    odd = [{"role": "narrator", "content": "once"}]
    with pytest.raises(ConfigError, match=r"refuses the conversation of row 1 .*narrator.*odd role"):
        load(tokenizer, [{"prompt": USER}, {"prompt": odd}])
