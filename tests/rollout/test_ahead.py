"""Sampling ahead of training: which weights a batch is sampled with, and that nothing else changes."""

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.config.check import resolve_spec
from llm_pg.config.load import check_values
from llm_pg.metrics import read_metrics
from llm_pg.rewards.tally import RewardError
from llm_pg.rollout.ahead import sampler_process
from llm_pg.sampling import native
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.vllm import EngineError
from tests.faults import conftest
from tests.faults.conftest import lines, weights
from tests.faults.tiny_run import ahead_by_nothing, make
from tests.seams import Steps, raising

tiny = conftest.tiny
NATIVE = {"engine": "native", "reward_in_process": True, "log_completions": 4}


def digit(completion: str, answer: str) -> float:
    return float(completion[:1] == answer) + 0.01 * ord(completion[:1] or "a")


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """inside: completions are sampled in a thread of this process, where nothing is said of the process for them."""

    def of(name: str, reward: Any = digit, lora: bool = False, inside: bool = False, **changes: Any) -> Any:
        options = {"out": str(tmp_path), "name": name, "reward": reward, "lora": lora, "inside": inside}
        options["changes"] = {**NATIVE, **changes}
        return make(options)

    return of


def ids_of(folder: Path, step: int) -> list[list[int]]:
    text = (folder / "completions" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line)["ids"] for line in text.splitlines()]


def test_with_no_lag_the_other_process_gives_the_synchronous_run_bit_for_bit(
    trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same machinery, told to run ahead by 0: same metrics, same weights. By torch's operations, in both."""
    for module in (native, sampler_process):
        monkeypatch.setattr(module, "library", lambda: None)
    trainer("synchronous").train()
    ahead = trainer("ahead")
    with ahead_by_nothing(ahead):
        ahead.train()
    told = lines(tmp_path / "ahead")
    assert [line.pop("staleness") for line in told] == [0] * 6
    assert ahead.run.source.ahead.engine.child.process.returncode is not None  # no process stays behind
    for one, other in zip(told, lines(tmp_path / "synchronous"), strict=True):
        assert {name: (value, other.get(name)) for name, value in one.items() if value != other.get(name)} == {}
    assert weights(tmp_path / "ahead") == weights(tmp_path / "synchronous")


def test_without_the_setting_nothing_runs_ahead(trainer: Callable[..., Any]) -> None:
    run = trainer("k0", max_staleness=0, max_steps=2)
    run.train()
    assert run.run.source.ahead is None
    assert not any("staleness" in line or "seconds/wait" in line for line in read_metrics(run.folder.metrics))


@pytest.mark.parametrize("k", [1, 3])
def test_batch_t_is_sampled_with_the_weights_after_update_t_minus_1_minus_k(
    k: int, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Sampled again here from weights that were put aside after every update."""
    run = trainer("r", max_staleness=k, inside=True)
    versions = [copy.deepcopy(run.model.state_dict())]
    run.add_callback(Steps(after=lambda _: versions.append(copy.deepcopy(run.model.state_dict()))))
    run.train()
    told = read_metrics(run.folder.metrics)
    assert [line["staleness"] for line in told] == [min(t - 1, k) for t in range(1, 7)]
    twin, collector, differs = copy.deepcopy(run.model), run.collector, 0
    for t in range(1, 7):
        prompts = [prompt.ids for prompt in run.prompts.take(t - 1)]
        keys_B = collector.keys(4, 4, 1, t)
        drawn = []
        for version in (max(t - 1 - k, 0), t - 1):
            twin.load_state_dict(versions[version])
            done = NativeSampler(twin, run.tokenizer, [run.tokenizer.eos_token_id]).sample(
                prompts, 4, run.policy.params, keys_B
            )
            drawn.append([row[mask].tolist() for row, mask in zip(done.tokens_BT, done.mask_BT, strict=True)])
        assert ids_of(tmp_path / "r", t) == drawn[0]
        differs += drawn[0] != drawn[1]
    assert differs  # else nothing was told apart


def test_what_is_slow_changes_no_number(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """One run with slow rewards, where the trainer waits, and one with slow updates, where batches wait."""

    def slow_reward(completion: str, answer: str) -> float:
        time.sleep(0.01)
        return digit(completion, answer)

    slow_reward.__name__ = "digit"
    trainer("slow rewards", slow_reward, max_staleness=2, inside=True).train()
    other = trainer("slow updates", max_staleness=2, inside=True)
    other.add_callback(Steps(before=lambda _: time.sleep(0.2)))
    other.train()
    assert lines(tmp_path / "slow rewards") == lines(tmp_path / "slow updates")
    assert weights(tmp_path / "slow rewards") == weights(tmp_path / "slow updates")


def test_the_next_batch_is_scored_while_a_step_trains(trainer: Callable[..., Any]) -> None:
    """The rewards of the second batch are held back until the update of the first has begun; without overlap neither
    could come first."""
    updating, waited = threading.Event(), []

    def held(completion: str, answer: str, trainer_state: Any) -> float:
        if trainer_state.global_step == 1:
            waited.append(updating.wait(60))
        return digit(completion, answer)

    run = trainer("r", held, max_staleness=1, inside=True, max_steps=2, num_eval_prompts=0)
    weigh = run.algorithm.compute_advantages

    def weighed(*given: Any, **named: Any) -> Any:
        updating.set()
        return weigh(*given, **named)

    run.algorithm.compute_advantages = weighed
    run.train()
    assert waited
    assert all(waited)


@pytest.mark.faults
@pytest.mark.parametrize(
    "algorithm, changes",
    [
        pytest.param(
            "rloo", {"max_staleness": 1, "lr_scheduler_type": "linear"}, marks=pytest.mark.slow, id="one step"
        ),
        pytest.param(
            "grpo",
            {"max_staleness": 2, "dynamic_sampling_max_rounds": 2, "num_iterations": 2, "surrogate": "clip"},
            id="two steps, refilled and reused",
        ),
        pytest.param("remax", {"max_staleness": 1, "beta": 0.05}, marks=pytest.mark.slow, id="greedy baselines"),
        pytest.param(
            "grpo",
            {"max_staleness": 1, "curriculum": "pass_rate", "pass_threshold": 0.4},
            marks=pytest.mark.slow,
            id="prompts by pass rate",
        ),
    ],
)
def test_a_run_killed_with_batches_in_flight_ends_as_the_one_that_was_not(
    algorithm: str, changes: dict[str, Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL after step 5; the newest checkpoint is that of step 3, with what was in flight then. A process samples
    for the run that is killed, a thread for the others, which gives the same bits."""
    options = {"algorithm": algorithm, "changes": {**changes, "engine": "native", "save_steps": 3}}
    whole = tiny("whole", inside=True, **options)
    assert whole.status == 0, whole.output
    assert tiny("cut", fault="kill", at=5, **options).status == -signal.SIGKILL
    resumed = tiny("cut", resume=True, inside=True, **options)
    assert resumed.status == 0, resumed.output
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


@pytest.mark.faults
def test_a_signal_ends_a_run_in_order_and_a_resume_goes_on(tiny: Callable[..., Any], tmp_path: Path) -> None:
    options = {"changes": {"engine": "native", "max_staleness": 2}}
    ended = tiny("cut", fault="sigterm", at=3, **options)
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert "Traceback" not in ended.output
    assert "ended after step 3 of 6; its state is saved" in ended.output
    assert tiny("cut", resume=True, inside=True, **options).status == 0
    assert tiny("whole", inside=True, **options).status == 0
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


@pytest.mark.faults
def test_a_reward_that_fails_in_the_background_ends_the_run_and_a_resume_makes_its_batch_again(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Batch 4 cannot be scored: steps 1 to 3 are trained, the state after step 3 is saved."""

    def breaks(completion: str, answer: str, trainer_state: Any) -> float:
        if trainer_state.global_step == 3:
            raise KeyError("injected")
        return digit(completion, answer)

    breaks.__name__ = "digit"
    run = trainer("r", breaks, max_staleness=2, inside=True)
    with pytest.raises(RewardError, match="digit"):
        run.train()
    assert [line["step"] for line in read_metrics(run.folder.metrics)] == [1, 2, 3]
    again = trainer("r", max_staleness=2, inside=True)
    again.train(resume=True)
    told = read_metrics(again.folder.metrics)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    assert [line["staleness"] for line in told] == [0, 1, 2, 0, 1, 2]  # made again with the weights of the resume


@pytest.mark.faults
def test_the_death_of_the_process_that_samples_is_told_and_survived(trainer: Callable[..., Any]) -> None:
    run = trainer("r", max_staleness=1)

    def shot(step: int) -> None:
        if step == 2:
            os.kill(run.run.source.ahead.engine.child.process.pid, signal.SIGKILL)

    run.add_callback(Steps(after=shot))
    with pytest.raises(
        EngineError, match=r"The process that samples ahead ended: killed by SIGKILL\. Its log .*ahead.log"
    ):
        run.train()
    run = trainer("r", max_staleness=1, inside=True)
    assert run.train(resume=True)["steps"] == 6


def test_no_process_stays_behind_an_error_while_a_batch_is_in_flight(trainer: Callable[..., Any]) -> None:
    run = trainer("bad", max_staleness=1)
    run.algorithm.compute_advantages = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert run.run.source.ahead.engine.child.process.returncode is not None


def test_an_adapter_is_sampled_as_it_is_trained(trainer: Callable[..., Any]) -> None:
    """With dropout off, log-probabilities of batch 1 agree with the trainer's; later ones are of older weights."""
    run = trainer("r", lora=True, max_staleness=1, max_steps=4, num_eval_prompts=0)
    gaps = []
    weigh = run.algorithm.compute_advantages

    def compared(rollouts: Any, **named: Any) -> Any:
        own_BT = run.policy.logp(rollouts, 16)
        gaps.append(float((own_BT - rollouts.logp_BT).abs().max()))
        return weigh(rollouts, **named)

    run.algorithm.compute_advantages = compared
    run.train()
    assert gaps[0] < 1e-5 < min(gaps[1:])


def test_completions_of_a_longer_lag_are_dropped_when_a_run_goes_on_with_a_shorter_one(
    trainer: Callable[..., Any],
) -> None:
    """At step 4 of a run with k = 2, batches 5 and 6 are in flight, sampled with versions 2 and 3: ages 2 and 2."""
    first = trainer("r", max_staleness=2, save_steps=4, inside=True)
    first.add_callback(Steps(before=raising(InterruptedError, 5)))
    with pytest.raises(InterruptedError):
        first.train()
    shorter = trainer("r", max_staleness=1, inside=True)
    shorter.train(resume=True, override=True)
    assert [line["staleness"] for line in read_metrics(shorter.folder.metrics)][4:] == [0, 1]


def test_completions_in_flight_are_sampled_again_when_a_run_goes_on_with_other_groups(
    trainer: Callable[..., Any],
) -> None:
    first = trainer("r", max_staleness=2, save_steps=4, inside=True)
    first.add_callback(Steps(before=raising(InterruptedError, 5)))
    with pytest.raises(InterruptedError):
        first.train()
    other = trainer("r", max_staleness=2, num_generations=2, log_completions=8, inside=True)
    other.train(resume=True, override=True)
    assert [line["staleness"] for line in read_metrics(other.folder.metrics)][4:] == [0, 1]
    rows = (other.folder.path / "completions" / "step-000005.jsonl").read_text().splitlines()
    assert len(rows) == other.context.plan.rows


def test_the_correction_is_on_unless_it_is_refused() -> None:
    def row(**changes: Any) -> Any:
        return resolve_spec(check_values({"engine": "native", **changes}))

    assert not row().vllm_importance_sampling_correction
    on = row(max_staleness=1)
    assert (on.vllm_importance_sampling_correction, on.vllm_importance_sampling_mode) == (True, "token_truncate")
    named = row(max_staleness=1, vllm_importance_sampling_mode="sequence_truncate")
    assert named.vllm_importance_sampling_mode == "sequence_truncate"
    off = row(max_staleness=1, vllm_importance_sampling_correction=False)
    assert not off.vllm_importance_sampling_correction


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"engine": "transformers"}, "keeps no older weights"),
        ({"environment": "number_guessing"}, "rollout.environment"),
        ({"name": "ppo"}, "ppo has a critic"),
        ({"dynamic_sampling_max_rounds": 1, "curriculum": "pass_rate"}, "curriculum"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_run_ahead_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_values({"engine": "native", "max_staleness": 1, **changes})
