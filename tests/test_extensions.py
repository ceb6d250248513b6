"""One of each thing that may be added from outside, in a run that goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llm_pg import GRPOConfig, PolicyGradientTrainer
from llm_pg.algorithms.loss import SURROGATES
from llm_pg.doctor.finding import Finding
from llm_pg.doctor.live import LIVE_RULES, examine_run
from llm_pg.metrics import read_metrics
from llm_pg.sampling.native import NativeSampler
from llm_pg.terminal import Terminal

MINE = """
import torch
from llm_pg import register_algorithm
from llm_pg.algorithms.loss import SURROGATES

SEEN = []

@register_algorithm(name="of_the_mean", source="a test")
def of_the_mean(rollouts):                                  # an algorithm
    returns_B = rollouts.reward_BT.sum(1)
    SEEN.append(len(returns_B))
    return returns_B - returns_B.mean()

def digits(completions, log_metric, **_):                   # a reward function that reports a number of its own
    scores = [sum(c.isdigit() for c in text) / 6 for text in completions]
    log_metric("most_digits", max(scores))
    return scores

def plain(logp_BT, batch):                                  # a loss
    SEEN.append("loss")
    return (-batch.advantage_BT * logp_BT * batch.loss_scale_BT)[batch.mask_BT].sum()
"""


class Counting(TrainerCallback):
    """An observer whose state is a part of every checkpoint."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


class Patient(TrainerCallback, ExportableState):
    """One whose state is written in transformers' own form."""

    def __init__(self, patience: int = 3) -> None:
        self.patience, self.counter = patience, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counter += 10

    def state(self) -> dict[str, Any]:
        return {"args": {"patience": self.patience}, "attributes": {"counter": self.counter}}


class Mine:
    """A sampler."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.native, self.calls = NativeSampler(model, tokenizer, [tokenizer.eos_token_id]), 0

    def sample(self, *given: Any) -> Any:
        self.calls += 1
        return self.native.sample(*given)


def always(case: Any) -> Iterator[Finding]:
    """A rule of the doctor."""
    yield Finding("mine", "note", "A rule of mine.", "none", "nothing", "a test")


def test_a_run_of_a_users_own_parts_uses_each_of_them_and_goes_on_with_their_state(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    monkeypatch.setitem(LIVE_RULES, "mine", (always,))
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{a}+{b}="}}\n' for a in range(4) for b in range(4)))
    settings: dict[str, Any] = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6}
    settings |= {"num_eval_prompts": 0, "use_cpu": True, "reward_in_process": True, "run_name": "own", "save_steps": 1}

    def run(max_steps: int, resume: bool) -> tuple[Counting, Patient, Mine]:
        model, counting, patient = make_model("llama"), Counting(), Patient()
        sampler = Mine(model, tokenizer)
        trainer = PolicyGradientTrainer(
            model=model,
            reward_funcs=f"{file}:digits",
            args=GRPOConfig(
                str(tmp_path),
                max_steps=max_steps,
                algorithm=f"{file}:of_the_mean",
                surrogate=f"{file}:plain",
                data_files=str(tmp_path / "rows.jsonl"),
                **settings,
            ),
            processing_class=tokenizer,
            callbacks=[counting, patient],
            sampler=sampler,
            terminal=Terminal(quiet=True),
        )
        trainer.train(resume=resume)
        return counting, patient, sampler

    counting, _, sampler = run(2, resume=False)
    assert (counting.steps, sampler.calls) == ([1, 2], 2)
    counting, patient, sampler = run(3, resume=True)
    assert (counting.steps, sampler.calls) == ([1, 2, 3], 1)
    assert patient.counter == 30
    lines = read_metrics(tmp_path / "own" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all("log/most_digits" in line for line in lines)
    assert "mine" in {finding.rule for finding in examine_run(tmp_path / "own")}


def test_a_word_added_to_a_table_of_functions_is_what_the_loss_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new surrogate inside the package is one function and one word: the table decides, no branch does."""
    from llm_pg.algorithms.algorithm import Algorithm
    from llm_pg.rollouts import Rollouts

    logp_BT = torch.tensor([[-0.5, -1.0], [-0.25, -2.0]], requires_grad=True)
    rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(2, 2, dtype=torch.bool),
        logp_BT=logp_BT.detach(),
        group_B=torch.tensor([0, 0]),
        reward_B=torch.tensor([1.0, 0.0]),
    )
    algorithm = Algorithm("rloo")
    monkeypatch.setitem(SURROGATES, "clip", lambda spec, logp, ratio, batch: 3 * logp)
    loss, _ = algorithm.loss(logp_BT, algorithm.compute_advantages(rollouts))
    assert float(loss.detach()) == pytest.approx(3 * float(logp_BT.detach().sum()) / 2)
