"""Rows and options beside the first three, in whole runs: each trains, and says in its metrics what it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import PolicyGradientTrainer
from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.metrics import Clock, read_metrics
from llm_pg.terminal import Terminal
from tests.seams import Steps

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]
SMALL = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 3,
    "num_eval_prompts": 4,
    "eval_num_samples": 2,
    "eval_on_start": False,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "reward_in_process": True,
    "run_name": "r",
}
NEW = ("sapo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "opo", "maxrl", "pass_at_k")
REUSED = {"num_iterations": 2, "steps_per_generation": 2}


def begins_with_a_digit(completion: str, **row: Any) -> float:
    return float(completion[:1].isdigit())


def graded(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Different for nearly every completion, so that every group teaches."""
    return [((sum(ids) * 7 + len(ids)) % 11) / 10 for ids in completion_ids]


@pytest.fixture
def trainer(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(reward: Any = begins_with_a_digit, peft_config: Any = None, **changes: Any) -> Any:
        return PolicyGradientTrainer(
            model=make_model("llama"),
            reward_funcs=reward,
            args=check_values({**SMALL, "output_dir": str(tmp_path), **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=peft_config,
            terminal=Terminal(quiet=True),
        )

    return make


@pytest.mark.parametrize("name", NEW)
def test_a_new_row_learns_to_begin_with_a_digit(name: str, trainer: Callable[..., Any]) -> None:
    sizes = {"max_steps": 40, "prompts_per_step": 16, "max_completion_length": 2, "eval_on_start": True}
    summary = trainer(name=name, **sizes).train()
    assert summary["sampled_before"] < 0.3
    assert summary["sampled_after"] > 0.9


def test_the_greedy_baseline_is_the_reward_of_the_greedy_completion_of_each_prompt(
    trainer: Callable[..., Any],
) -> None:
    """A length as reward tells prompts apart; what cannot be scored takes its whole group out."""

    def length(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float | None]:
        return [None if p == spared else float(len(ids)) for ids, p in zip(completion_ids, prompts, strict=True)]

    spared = ""
    made = trainer(name="remax", reward=length, max_unscorable=1.0)
    prompts = made.train_prompts[:4]
    with made.scorer:
        answers = made.collector.answer(prompts, 1, greedy=True)
        found = made.collector.collect(prompts, 1, 2, Clock(), greedy=True).rollouts
        spared = prompts[2].text
        holed = made.collector.collect(prompts, 1, 2, Clock(), greedy=True).rollouts
    assert found.greedy_B.tolist() == [float(len(ids)) for _, ids in answers for _ in range(2)]
    assert found.valid_B.all()
    assert holed.valid_B.tolist() == [True, True, True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"vllm_importance_sampling_correction": True}, "correction_bounded"),
        ({"off_policy_mask_threshold": 1e-4, **REUSED}, "off_policy_masked"),
        ({"kl_target": 1e-4, **REUSED}, "kl_penalty"),
    ],
)
def test_an_option_says_what_it_did(changes: dict[str, Any], metric: str, trainer: Callable[..., Any]) -> None:
    made = trainer(reward=graded, **changes)
    made.train()
    values = [line[metric] for line in read_metrics(made.folder.metrics)]
    if metric == "correction_bounded":  # the sampler's numbers are the trainer's own, so nothing is out of bounds
        assert values == [0.0, 0.0]
    elif metric == "off_policy_masked":
        assert all(0 < value < 1 for value in values)
    else:
        assert values == [2.0, 4.0]


def test_a_share_of_the_tokens_takes_the_others_out_of_the_update(trainer: Callable[..., Any]) -> None:
    made = trainer(reward=graded, top_entropy_quantile=0.3)
    seen = []
    weigh = made.algorithm.compute_advantages

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(weigh(*given, **named))
        return seen[-1]

    made.algorithm.compute_advantages = watched
    made.train()
    for batch in seen:
        entropy_BT, kept_BT = batch.rollouts.entropy_BT, batch.advantage_BT != 0
        assert kept_BT.any()
        level = torch.quantile(entropy_BT[batch.mask_BT], 0.7)
        assert level > entropy_BT[batch.mask_BT].min()
        assert float(entropy_BT[kept_BT].min()) >= float(level) - 1e-6


def test_the_reference_moves_by_its_share_when_its_steps_are_over(trainer: Callable[..., Any]) -> None:
    """After steps 2 and 4 of 4: r ← ¼θ + ¾r, recomputed from the policies of those steps."""
    settings = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}
    made = trainer(max_steps=4, beta=0.05, **settings)
    first = [p.detach().clone() for p in made.model.parameters()]
    expected = [first]

    def watched(step: int) -> None:
        if step % 2 == 0:
            pairs = zip(expected[-1], made.model.parameters(), strict=True)
            expected.append([0.75 * old + 0.25 * new.detach() for old, new in pairs])

    made.add_callback(Steps(after=watched))
    made.train()
    for found, wanted in zip(made.policy.reference.parameters(), expected[2], strict=True):
        assert torch.allclose(found, wanted, atol=1e-7)
    assert not any(torch.equal(a, b) for a, b in zip(first, expected[2], strict=True) if a.dim() > 1)
    assert read_metrics(made.folder.metrics)[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapters_reference_cannot_move(trainer: Callable[..., Any]) -> None:
    from peft import LoraConfig

    with pytest.raises(ConfigError, match="with the adapter off"):
        trainer(peft_config=LoraConfig(r=2), beta=0.1, sync_ref_model=True)


def test_a_run_of_ones_own_function_is_named_after_it(tmp_path: Path, trainer: Callable[..., Any]) -> None:
    (tmp_path / "mine.py").write_text("def plain(rollouts):\n    return rollouts.reward_BT.sum(1) - 0.1\n")
    made = trainer(name=f"{tmp_path / 'mine.py'}:plain", run_name=None, max_steps=1)
    summary = made.train()
    assert summary["algorithm"] == "plain"
    assert made.folder.path.name == "run-plain-seed0"
    assert read_metrics(made.folder.metrics)[0]["grad_norm"] > 0


def test_a_likelihood_over_negative_rewards_ends_the_run_with_what_to_do(trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"reward -1, and maxrl.*algorithm rloo"):
        trainer(name="maxrl", reward=lambda completion, **_: -1.0).train()
