"""Completions of a conversation end where the chat template ends a turn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, GenerationConfig

from llm_pg.model.loading import character_tokenizer, end_token_ids
from tests import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"prompt": [{"role": "user", "content": f"{n}+1="}]} for n in range(16)]
RENDERED = [{"prompt": f"<|im_start|>user\n{n}<|im_end|>\n<|im_start|>assistant\n"} for n in range(16)]
PLAIN = [{"prompt": f"{n}+1="} for n in range(16)]


@pytest.fixture
def make(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def trainer(template: str, rows: list[dict[str, Any]], special: tuple[str, ...] = (), **changes: Any) -> Any:
        tokenizer = character_tokenizer()
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.chat_template = template
        model = make_model("llama", vocab_size=len(tokenizer))
        if changes.pop("no_generation_config", False):
            model.generation_config = None
        return tiny.trainer(model, tokenizer, tmp_path, rows=rows, **changes)

    return trainer


TURNS = ("<|im_start|>", "<|im_end|>")


def test_a_turn_that_ends_by_another_token_than_eos_ends_completions_and_says_so(make: Callable[..., Any]) -> None:
    trainer = make(CHATML, CHAT, TURNS)
    end = trainer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trainer.tokenizer.eos_token_id != end
    assert end in trainer.collector.engine.eos_ids
    (said,) = trainer.context.terminal.warned
    assert "ends a turn by <|im_end|>, and the model would end at <eos> alone" in said
    trainer.train()
    settings = GenerationConfig.from_pretrained(trainer.folder.model)
    assert sorted(settings.eos_token_id) == sorted([end, trainer.tokenizer.eos_token_id])


def test_a_completion_ends_there(make: Callable[..., Any]) -> None:
    """A model that says nothing else: its completions are one token long, and not cut by the limit."""
    trainer = make(CHATML, CHAT, TURNS)
    end = trainer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = trainer.model.get_output_embeddings()
    head.bias = None
    trainer.model.get_output_embeddings().weight.data.zero_()
    trainer.model.model.norm.weight.data.zero_()
    trainer.model.model.norm.register_forward_hook(lambda m, args, out: out + 1)
    trainer.model.get_output_embeddings().weight.data[end] = 10
    trainer.train()
    line = json.loads(trainer.folder.metrics.read_text().splitlines()[0])
    assert line["completion_length"] == 1
    assert line["truncated"] == 0


@pytest.mark.parametrize(
    "template, rows, special, adds",
    [
        (CHATML, CHAT, TURNS, True),
        (CHATML, RENDERED, TURNS, True),
        (CHATML, PLAIN, TURNS, False),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), CHAT, TURNS, False),
        (CHATML.replace("<|im_end|>", "<|im_end|>{{ eos_token }}"), CHAT, TURNS, False),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", CHAT, (), False),
    ],
)
def test_only_prompts_in_the_form_of_the_template_need_it(
    template: str, rows: list[dict[str, Any]], special: tuple[str, ...], adds: bool, make: Callable[..., Any]
) -> None:
    trainer = make(template, rows, special)
    ends = end_token_ids(trainer.model, trainer.tokenizer)
    assert len(ends) == 1 + bool(adds)
    assert bool(trainer.context.terminal.warned) == bool(adds)


def test_a_model_without_a_generation_config_gets_one(make: Callable[..., Any]) -> None:
    trainer = make(CHATML, CHAT, TURNS, no_generation_config=True)
    assert len(end_token_ids(trainer.model, trainer.tokenizer)) == 2


def test_an_end_of_turn_that_is_no_token_is_said_until_it_is_a_stop_string(make: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m['content'] }}\n### End\n{% endfor %}"
    (said,) = make(template, CHAT).context.terminal.warned
    assert "set rollout.stop to ['### End']" in said
    assert make(template, CHAT, stop=["### End"]).context.terminal.warned == []
