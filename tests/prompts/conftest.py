"""A tokenizer of single characters with a BOS and a chat template, configs in one line, and data in GSM8K's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_pg.config import Config
from llm_pg.config.load import check_values

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('odd role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think %}hm {% endif %}{% endif %}"
)


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    special = ["[BOS]", "[EOS]", "[UNK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", **changes}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in names.items() if v is not None})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def config(**values: Any) -> Config:
    """A checked config with small steps and few held-out prompts, changed by leaf names."""
    small = {"prompts_per_step": 2, "num_generations": 2, "num_eval_prompts": 2}
    return check_values({**small, **values})


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k_rows(n: int) -> list[dict[str, str]]:
    """Questions whose answers end as GSM8K's do: '#### 1,234'; row i answers 617·i."""
    return [
        {
            "question": f"A crate holds 617 nails. How many do {i} crates hold?",
            "answer": f"One crate holds <<617=617>>617 nails, so {i} hold {617 * i}.\n#### {617 * i:,}",
        }
        for i in range(n)
    ]


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "gsm8k.jsonl", gsm8k_rows(12))
