"""The longest batch, tried before the first step: it shows what does not fit, and leaves no trace in the run."""

import dataclasses
import io
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.model.critic import Critic
from llm_pg.model.policy import Policy
from llm_pg.run.before.trial import LARGE, Trial, expected_seconds, longest_rollouts, try_longest, wanted
from llm_pg.run.guard import RunStopped
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]


def first_digit(completion: str, answer: str, **row: Any) -> float:
    return float(completion[:1] == answer)


@pytest.fixture
def policy(make_model: Callable[..., Any], tokenizer: Any) -> Policy:
    return Policy(make_model("llama"), params=SamplingParams(max_completion_length=8), pad_id=tokenizer.pad_token_id)


SIZES = {"prompt_length": 6, "completion_length": 8, "num_groups": 4, "num_generations": 4, "micro_rows": 8}


def fail_above(policy: Policy, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose memory holds `most` rows; returns the sizes that were tried."""
    tried: list[int] = []
    score = policy.forward

    def scarce(rollouts: Any, **given: Any) -> Any:
        tried.append(len(rollouts.mask_BT))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("no room")
        return score(rollouts, **given)

    monkeypatch.setattr(policy, "forward", scarce)
    return tried


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_critic_is_tried_with_the_policy_and_left_as_it_was(
    kind: str, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward pass, and two moments of each of its weights beside those of the policy's."""
    model = make_model("llama")
    critic = Critic(model, kind=kind)
    params = SamplingParams(max_completion_length=8)
    policy = Policy(model, params=params, pad_id=tokenizer.pad_token_id, critic=critic)
    critic.eval()
    made, reached, empty_like = [], set(), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **given: (made.append(x), empty_like(x, **given))[1])
    for name, parameter in critic.named_parameters():
        parameter.register_hook(lambda _, name=name: reached.add(name))
    try_longest(policy, **SIZES)
    likes = Counter(id(x) for x in made)  # kernels make a gradient likewise, of the weights of norms
    assert all(likes[id(p)] >= 2 for p in critic.trainable())
    assert reached == {name for name, _ in critic.named_parameters()}
    assert all(p.grad is None for p in (*critic.parameters(), *model.parameters()))
    assert not critic.training


def test_every_row_that_is_tried_is_of_full_length(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    score = policy.forward
    monkeypatch.setattr(policy, "forward", lambda rows, **given: (seen.append(rows), score(rows, **given))[1])
    trial = try_longest(policy, **SIZES)
    assert [len(p) for p in seen[0].prompt_ids_B] == [6] * trial.rows
    assert seen[0].length_B.tolist() == [8] * trial.rows
    assert trial.rows >= 8
    assert trial.passes * trial.rows >= 16
    assert trial.seconds > 0


def test_what_does_not_fit_is_halved_and_told(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_above(policy, 3, monkeypatch)
    trial = try_longest(policy, **SIZES)
    assert trial.rows == tried[-1] <= 3
    assert trial.asked == tried[0] >= 8
    assert trial.passes >= 16 / 3


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_later_passes_are_no_larger_than_what_was_found_to_fit(
    packing: str, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each step would run out of memory and make its gradient twice."""
    params = SamplingParams(max_completion_length=8)
    policy = Policy(make_model("llama"), params=params, pad_id=tokenizer.pad_token_id, packing=packing)
    longest = longest_rollouts(6, 8, 4, 4, policy, torch.device("cpu"))
    before = [len(rows) for rows in policy.layout.cuts(longest, 8)]
    fail_above(policy, 3, monkeypatch)
    trial = try_longest(policy, **SIZES)
    after = [len(rows) for rows in policy.layout.cuts(longest, 8)]
    assert max(after) == trial.rows <= 3 < max(before)
    assert sum(after) == sum(before) == 16
    # Shorter rows go together up to the same number of tokens.
    shorter = dataclasses.replace(longest, mask_BT=longest.mask_BT & (torch.arange(8) < 2))
    cuts = policy.layout.cuts(shorter, 8)
    assert len(cuts) < len(after)
    assert all(policy.layout.num_tokens(shorter.rows(rows)) <= (policy.layout.most_tokens or 0) for rows in cuts)


def test_where_all_fits_passes_stay_as_they_are_asked_for(policy: Policy) -> None:
    try_longest(policy, **SIZES)
    assert policy.layout.most_tokens is None


def test_a_single_completion_that_does_not_fit_ends_the_run_with_what_to_change(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(policy, 0, monkeypatch)
    with pytest.raises(RunStopped, match=r"8 tokens behind a prompt of 6 runs out of it.*max_completion_length"):
        try_longest(policy, **SIZES)


def test_gradients_generator_and_mode_are_as_they_were(policy: Policy) -> None:
    policy.model.eval()
    state = torch.get_rng_state()
    weights = [p.detach().clone() for p in policy.model.parameters()]
    try_longest(policy, **SIZES, entropy_grad=True)
    assert (torch.get_rng_state() == state).all()
    assert not policy.model.training
    assert all(p.grad is None for p in policy.model.parameters())
    assert all((p == w).all() for p, w in zip(policy.model.parameters(), weights, strict=True))


def test_by_default_a_small_model_on_the_cpu_is_not_tried_and_a_large_one_is(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not wanted(None, policy)
    assert wanted(True, policy)
    assert not wanted(False, policy)
    big = torch.nn.Linear(1, 1, bias=False)
    big.weight = torch.nn.Parameter(torch.empty(LARGE, 1))
    monkeypatch.setattr(policy, "model", big)
    assert wanted(None, policy)


def test_the_expected_time_is_that_of_sampling_and_of_the_passes() -> None:
    """From completions half as long and a quarter of them trained on to the longest, all of them trained on."""
    trial = Trial(rows=8, prompt=20, completion=80, passes=4, seconds=2.0, peak_mb=None, asked=8)
    low, high = expected_seconds(trial, 10, 2, rows=32, rate=100.0, length=60.0)
    assert high == pytest.approx(10 * (32 * 80 / 100 + 2 * 4 * 2))
    assert low == pytest.approx(10 * (32 * 30 / 100 + 0.25 * 2 * 4 * 2 * 0.5))


@pytest.mark.faults
def test_the_seconds_of_the_trial_are_those_of_a_warm_pass(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    score, passes = policy.forward, []

    def slow_at_first(*given: Any, **more: Any) -> Any:
        passes.append(given)
        time.sleep(0.5 if len(passes) == 1 else 0.0)
        return score(*given, **more)

    monkeypatch.setattr(policy, "forward", slow_at_first)
    assert try_longest(policy, **SIZES).seconds < 0.4


def run(folder: Path, make_model: Callable[..., Any], tokenizer: Any, **changes: Any) -> tuple[Any, str]:
    from peft import LoraConfig

    out = io.StringIO()
    settings = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6}
    settings |= {"num_eval_prompts": 4, "eval_num_samples": 0, "learning_rate": 1e-2, "use_cpu": True}
    settings |= {"reward_in_process": True, "overwrite": True, "entropy_coef": 0.01, "beta": 0.1}
    trainer = GRPOTrainer(
        model=make_model("llama"),
        reward_funcs=first_digit,
        args=GRPOConfig(str(folder), **{**settings, **changes}),
        train_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2),
        terminal=Terminal(console=Console(file=out, soft_wrap=True)),
    )
    trainer.train()
    return trainer, out.getvalue()


def test_a_run_with_the_trial_is_bit_for_bit_the_run_without(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """An adapter with dropout draws from the global generator in every pass, so that a trace would show."""
    tried, said = run(tmp_path / "a", make_model, tokenizer, try_longest_batch=True)
    bare, silent = run(tmp_path / "b", make_model, tokenizer, try_longest_batch=False)
    assert "Longest batch tried: 16 completions of 4 + 6 tokens" in said
    assert re.search(r"Time: \d.* for 3 steps and the evaluations", said)
    assert "Longest batch" not in silent
    assert "A step: 4 prompts × 4 generations = 16 completions" in silent
    assert "Memory at least" in silent
    for one, other in zip(tried.model.parameters(), bare.model.parameters(), strict=True):
        assert (one == other).all()


def test_the_trial_on_cuda_says_its_peak_and_leaves_the_meter_at_the_run_s_own(policy: Policy) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    policy.model.cuda()
    before = torch.cuda.max_memory_allocated()
    trial = try_longest(policy, **SIZES)
    assert trial.peak_mb is not None
    assert trial.peak_mb * 2**20 > before
    assert torch.cuda.max_memory_allocated() < trial.peak_mb * 2**20
