"""What many tests build by hand: a trainer of a tiny model, prompts, scored groups, a terminal that records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.prompts import Prompt
from llm_pg.rewards.scorer import Scorer
from llm_pg.rewards.tally import Scores
from llm_pg.rollout.collector import Collector
from llm_pg.rollout.experience import Experience
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]
ONE_STEP: dict[str, Any] = {
    **{"max_steps": 1, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 4, "beta": 0.0},
    **{"num_eval_prompts": 0, "learning_rate": 1e-2, "use_cpu": True, "run_name": "r", "reward_in_process": True},
    **{"report_seconds": 0},
}


SMALL_RUN: dict[str, Any] = {
    "run_name": "r",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "eval_strategy": "no",
    "use_cpu": True,
    "reward_in_process": True,
    "learning_rate": 1e-2,
}
"""Arguments, in TRL's words, of a run of seconds; `max_steps` is still to be given."""


def digits(completions: list[str], **_: Any) -> list[float]:
    """Pays each digit of a completion with 1."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


class Recorder(Terminal):
    """Prints nothing; `said` has what it was given to print, `warned` the warnings among it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)
        self.warned.append(text)


def graded(completion: Any, **row: Any) -> float:
    """A reward that differs for nearly every completion."""
    return sum(ord(c) for c in str(completion)) % 97 / 97


def trainer(model: Any, tokenizer: Any, folder: Path, reward: Any = graded, **changes: Any) -> GRPOTrainer:
    """A GRPOTrainer of `ROWS` for one step.

    changes: settings of the run, over `ONE_STEP`; and `rows`, `terminal`, `peft_config` and `callbacks` of the trainer.
    """
    others = {name: changes.pop(name) for name in ("peft_config", "callbacks") if name in changes}
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        train_dataset=changes.pop("rows", ROWS),
        processing_class=tokenizer,
        terminal=changes.pop("terminal", None) or Recorder(),
        args=GRPOConfig(str(folder), **{**ONE_STEP, **changes}),
        **others,
    )


def length(completions: list[str], **row: Any) -> list[float]:
    """A reward: characters of each completion."""
    return [float(len(text)) for text in completions]


def collector(model: Any, tokenizer: Any, reward: Any = length, **changes: Any) -> Collector:
    """A collector of completions by the native engine, at most 12 tokens long.

    changes: of the sampling parameters; and `seed`, `gamma` and `twins` of the collector.
    """
    others = {"seed": 0, "gamma": 1.0} | {k: changes.pop(k) for k in ("seed", "gamma", "twins") if k in changes}
    params = SamplingParams(**{"max_completion_length": 12, **changes})
    engine = NativeSampler(model, tokenizer, [tokenizer.eos_token_id])
    return Collector(engine, Scorer([reward], in_process=True), tokenizer, params, **others)


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[Prompt]:
    """Prompts of these texts with their ids."""
    return [Prompt(i, text, None, tuple(tokenizer(text)["input_ids"]), {}) for i, text in enumerate(texts)]


def prompts(number: int) -> list[Prompt]:
    """Prompt i has index i, text "prompt i" and the ids (i + 1,)."""
    return [Prompt(i, f"prompt {i}", None, (i + 1,), {}) for i in range(number)]


def experience(
    of: Sequence[Prompt], rewards: Sequence[Sequence[float | None]], tokens: Sequence[Sequence[int]] | None = None
) -> Experience:
    """Groups with these rewards (None = unscorable); completion i of a group is k + 1 times the token k, k =
    `tokens[group][i]`, and its text is "PROMPT/k"."""
    size = len(rewards[0])
    flat = [r for group in rewards for r in group]
    kind = torch.tensor([t for group in tokens for t in group]) if tokens else torch.zeros(len(flat), dtype=torch.int64)
    mask_BT = torch.arange(int(kind.max()) + 1) < (kind + 1).unsqueeze(1)
    rollouts = TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-torch.ones(mask_BT.shape) * mask_BT,
        group_B=torch.arange(len(of)).repeat_interleave(size),
        reward_B=flat,
        tokens_BT=kind.unsqueeze(1) * mask_BT,
        prompt_ids_B=[p.ids for p in of for _ in range(size)],
    )
    texts = [f"{p.index}/{k}" for p, k in zip([p for p in of for _ in range(size)], kind.tolist(), strict=True)]
    return Experience(list(of), rollouts, texts, Scores(list(flat), {"f": list(flat)}), size)
