"""`llm-pg check` refuses tools that a run would refuse, by the same paragraph, and loads no model for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.cli import main
from llm_pg.config import ConfigError, load_config
from llm_pg.terminal import Terminal
from llm_pg.trainer import Trainer
from tests.environments.chats import TEMPLATE

SETTINGS = [
    "model.make={model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "task=sort_letters",
    "num_train_prompts=16",
    "num_eval_prompts=4",
    "prompts_per_step=2",
    "tools=[calculator]",
    "use_cpu=true",
    "reward_workers=1",
]
SHOWS_TOOLS = f"data.chat_template_kwargs={{chat_template: {TEMPLATE!r}}}"


@pytest.mark.parametrize(
    "more, words",
    [
        (["chat=true"], "never reads `tools`"),
        ([SHOWS_TOOLS], "the prompts are plain text"),
        (["chat=true", SHOWS_TOOLS.replace("<tool_call>", "<call>")], "reading it back gives no call"),
    ],
)
def test_check_refuses_by_the_paragraph_of_a_run(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*SETTINGS, f"output_dir={tmp_path}", *more]
    with pytest.raises(ConfigError, match=words) as refused:
        Trainer(load_config(None, given), terminal=Terminal(quiet=True))
    monkeypatch.setattr("llm_pg.model.loading.load_model", None)
    assert main(["check", *given]) == 2
    assert capsys.readouterr().err.strip() == f"llm-pg: {refused.value}"


def test_check_takes_tools_that_a_run_takes_and_leaves_the_config_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*SETTINGS, f"output_dir={tmp_path}", "chat=true", SHOWS_TOOLS]
    main(["check", *given])
    out = capsys.readouterr()
    assert "16 rows" in out.out
    assert out.err == ""


def test_the_end_tokens_of_a_model_are_known_without_its_weights(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from llm_pg.config.schema import ModelConfig
    from llm_pg.model.loading import end_token_ids, generation_stub

    model = make_model("llama")
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stub = generation_stub(ModelConfig(model_name_or_path=str(tmp_path)))
    assert end_token_ids(stub, tokenizer) == end_token_ids(model, tokenizer) == (1, 7)
