"""Tags that a tokenizer has as special tokens are read by the functions that ask for them, through the trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.model.loading import character_tokenizer
from llm_pg.sampling.protocol import Completions
from llm_pg.terminal import Terminal

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TURNS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
SAID = "<think>7+0 is 7</think><answer>7</answer>"
SMALL = {
    **{"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 64, "beta": 0.0},
    **{"num_eval_prompts": 2, "eval_num_samples": 0, "use_cpu": True, "run_name": "r", "report_seconds": 0},
}
STRICT = {"function": "number_match", "form": "tag"}
seen: list[str] = []


def own(completion: Any, **row: Any) -> float:
    seen.append(completion if isinstance(completion, str) else completion[-1]["content"])
    return 0.5


class Heard(Terminal):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def run(make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run whose model says `said` and ends; the trainer has the metrics of its step and its warnings."""

    def made(rewards: Any, *, chat: bool = False, prompt: str = "7+0=", said: str = SAID, **changes: Any) -> Any:
        seen.clear()
        tokenizer = character_tokenizer()
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*TAGS, *TURNS)])
        if chat:
            tokenizer.chat_template = CHATML
        trainer = GRPOTrainer(
            model=make_model("llama", vocab_size=len(tokenizer)),
            reward_funcs=rewards,
            args=GRPOConfig(str(tmp_path), **{**SMALL, "reward_in_process": True, "chat": chat, **changes}),
            train_dataset=[{"prompt": f"{prompt} {n}", "answer": "7"} for n in range(8)],
            processing_class=tokenizer,
            terminal=Heard(),
        )
        ids = tokenizer(said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

        def sample(prompt_ids: Any, num_generations: int, *_: Any) -> Completions:
            tokens = torch.tensor([[*ids, tokenizer.pad_token_id]]).repeat(len(prompt_ids) * num_generations, 1)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, -1] = False
            return Completions(tokens, mask, -torch.ones(tokens.shape) * mask, torch.zeros(len(tokens)).bool())

        monkeypatch.setattr(trainer.collector.engine, "sample", sample)
        trainer.train()
        trainer.line = json.loads(trainer.folder.metrics.read_text().splitlines()[0])
        return trainer

    return made


@pytest.mark.parametrize("chat", [False, True])
def test_a_format_and_a_strict_answer_in_special_tokens_earn_one(chat: bool, run: Callable[..., Any]) -> None:
    trainer = run(["format_tags", STRICT, own], chat=chat)
    assert trainer.line["reward/format_tags"] == 1
    assert trainer.line["reward/number_match"] == 1
    assert set(seen) == {SAID}  # neither the end nor the padding


def test_tokens_of_a_turn_are_in_no_text_where_the_template_writes_them(run: Callable[..., Any]) -> None:
    said = SAID.replace("</think>", "</think><|im_start|>")
    run(["format_tags", own], chat=True, said=said)
    assert set(seen) == {SAID}
    run(["format_tags", own], said=said, run_name="plain")  # no template of this run writes them
    assert set(seen) == {said}


def test_an_evaluation_reads_them_too(run: Callable[..., Any]) -> None:
    trainer = run([STRICT], chat=True)
    assert trainer.evaluate().metrics()["eval/greedy"] == 1


@pytest.mark.parametrize(
    "rewards, skip, text",
    [
        (own, None, "7+0 is 77"),
        (own, False, "<think>7+0 is 7</think><answer>7</answer>"),
        ([own, "format_tags"], True, "7+0 is 77"),
        ([own, "format_tags"], None, "<think>7+0 is 7</think><answer>7</answer>"),
    ],
)
def test_the_setting_decides_and_else_the_functions_do(
    rewards: Any, skip: bool | None, text: str, run: Callable[..., Any]
) -> None:
    run(rewards, chat=True, skip_special_tokens=skip)
    assert set(seen) == {text}


def test_a_function_that_cannot_see_the_tags_that_prompts_name_is_said(run: Callable[..., Any]) -> None:
    prompt = "Put the answer in <answer></answer>: 7+0="

    def said(rewards: Any, **changes: Any) -> list[str]:
        trainer = run(rewards, overwrite=True, **changes)
        return [line for line in trainer.context.terminal.said if "skip_special_tokens" in line]

    (line,) = said(own, prompt=prompt)
    assert "Prompts name <answer>, </answer>" in line
    for skip in (True, False):
        assert said(own, prompt=prompt, skip_special_tokens=skip) == []
    assert said("format_tags", prompt=prompt) == []
    assert said(own) == []
