"""A function that fails leaves its completion unscored; a reward that float32 cannot train on is named."""

import json
import math
from pathlib import Path

import pytest
import reward_specimens as specimens
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.rewards import RewardError, Scorer, resolve
from llm_pg.rewards.contract import MAX_REWARD
from llm_pg.rollouts import Rollouts
from llm_pg.terminal import Terminal

pytestmark = pytest.mark.faults

SPECIMENS = Path(specimens.__file__)
COMPLETIONS = ["BAD", "a", "b", "c", "d", "e", "f", "g"]


def score(functions, completions=COMPLETIONS, rows=None, *, weights=None, **options):
    options = {"workers": 1, "deadline": 1.0, **options}
    with Scorer(functions, weights, **options) as scorer:
        rows = rows or [{} for _ in completions]
        return scorer.grade(["p"] * len(completions), completions, [[1]] * len(completions), rows)


FAILURES = [
    ("raises", "ZeroDivisionError"),
    ("batch_raises", "ZeroDivisionError"),
    ("returns_nan", "NaN"),
    ("hangs", "deadline"),
    ("exits", "exit code 3"),
    ("segfaults", "killed by SIGSEGV"),
    ("judge", "deadline"),
]


@pytest.mark.parametrize("name, cause", FAILURES)
@pytest.mark.parametrize("first", [True, False])
def test_one_function_of_several_that_fails_leaves_the_completion_unscored(name, cause, first):
    functions = [getattr(specimens, name), specimens.tenth]
    scores = score(functions if first else functions[::-1])
    assert scores.reward == [None] + [1.1] * 7
    assert scores.parts["tenth"] == [0.1] * 8  # what the other says is still logged
    assert scores.problems == {name: {cause: 1}}
    assert scores.failures() == {name: 1}


@pytest.mark.parametrize("name", ["returns_none", "batch_returns_none"])
def test_none_that_is_returned_does_not_apply_and_the_sum_skips_it(name):
    scores = score([getattr(specimens, name), specimens.tenth])
    assert scores.reward == [0.1] + [1.1] * 7
    assert scores.problems == {}
    assert scores.failures() == {}


def test_of_two_that_fail_on_one_completion_both_are_named_and_it_is_lost_once():
    scores = score([specimens.raises, specimens.returns_nan, specimens.tenth])
    assert scores.reward == [None] + [2.1] * 7
    assert scores.failures() == {"raises": 1, "returns_nan": 1}


def test_a_failure_beside_a_none_blames_the_one_that_failed():
    scores = score([specimens.raises, specimens.returns_none])
    assert scores.reward == [None] + [2.0] * 7
    assert scores.problems == {"raises": {"ZeroDivisionError": 1}}


def test_a_function_of_weight_0_is_looked_at_and_costs_no_completion():
    scores = score([specimens.raises, specimens.tenth], weights=[0.0, 1.0])
    assert scores.reward == [0.1] * 8
    assert scores.failures() == {"raises": 1}


def test_failures_of_several_functions_count_together_towards_the_limit():
    functions, completions = [specimens.raises, specimens.raises_on_worse], ["BAD", "WORSE", *"abcdefgh"]
    assert score(functions, completions).reward == [None, None] + [2.0] * 8
    with pytest.raises(RewardError, match=r"3 of 10 completions of this batch could not be scored \(raises: .*: 2; "):
        score(functions, ["BAD", "BAD", "WORSE", *"abcdefg"])


def weights_of(rewards):
    """GRPO's weights of one group, of rows of one token."""
    num = len(rewards)
    rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(num, 1, dtype=torch.bool),
        logp_BT=torch.full((num, 1), -1.0),
        group_B=torch.zeros(num, dtype=torch.int64),
        reward_B=rewards,
    )
    return Algorithm(ALGORITHMS["grpo"]).compute_advantages(rollouts).advantage_BT.squeeze(1).tolist()


def test_an_unscored_completion_is_out_of_the_baseline_and_weighs_nothing():
    """Accuracy fails on the first of four, format pays 0.1: as a 0 it had weight -1.5 and the others 0.5 each."""
    assert (
        weights_of(score([specimens.raises, specimens.tenth], ["BAD", "a", "b", "c"], max_unscorable=0.5).reward)
        == [0.0] * 4
    )
    rewards = score([specimens.raises, specimens.length], ["BAD", "a", "bb", "ccc"], max_unscorable=0.5).reward
    assert rewards == [None, 2.0, 3.0, 4.0]
    assert weights_of(rewards) == [0.0, *weights_of([2.0, 3.0, 4.0])]


def test_a_run_names_and_counts_what_failed(make_model, tokenizer, tmp_path):
    sizes = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 4}
    settings = {"num_eval_prompts": 0, "max_unscorable": 0.9, "reward_in_process": True, "run_name": "r"}
    GRPOTrainer(
        model=make_model("llama"),
        reward_funcs=[specimens.raises_on_a_third, specimens.tenth_of_all],
        args=GRPOConfig(str(tmp_path), use_cpu=True, **sizes, **settings),
        train_dataset=[{"prompt": f"{a}+1="} for a in range(8)],
        processing_class=tokenizer,
        terminal=Terminal(quiet=True),
    ).train()
    folder = tmp_path / "r"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for path in sorted((folder / "completions").iterdir()) for line in path.open()]
    lost = sum(row["reward"] is None for row in kept)
    assert 0 < lost < len(kept)
    assert sum(line.get("failed/raises_on_a_third", 0) for line in lines) == lost
    assert sum(line["unscorable"] for line in lines) == pytest.approx(lost / (len(kept) / len(lines)))
    assert all(weight == 0.0 for row in kept if row["reward"] is None for weight in row["tokens"]["weight"])


# --- rewards out of range


@pytest.mark.parametrize("value", [1e20, 1e39, -1e300, 1.0000001e18, 10**400, -(10**400)])
@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("name", ["echo", "batch_echo"])
def test_a_reward_that_float32_cannot_train_on_is_named(name, in_process, value):
    with pytest.raises(RewardError, match=f"Reward function {name} must return .*; .* is "):
        score([getattr(specimens, name)], ["a", "b"], [{"value": 1.0}, {"value": value}], in_process=in_process)


@pytest.mark.parametrize("value", [MAX_REWARD, -MAX_REWARD, 1e-300, 5e-324, 0.0])
def test_a_reward_at_the_limit_is_taken(value):
    assert score([specimens.echo], ["a"], [{"value": value}], in_process=True).reward == [value]


def test_a_part_out_of_range_is_named_by_its_key():
    with pytest.raises(RewardError, match=r"echo_parts must return .*the part 'depth' is 1e\+39"):
        score([specimens.echo_parts], ["a"], [{"value": 1e39}])


def test_a_weighted_sum_out_of_range_names_functions_and_weights():
    with pytest.raises(RewardError, match=r"weighted reward 1e\+22 \(echo 10000 × 1e\+18, tenth 1 × 0\.1\)"):
        score([specimens.echo, specimens.tenth], ["a"], [{"value": 1e18}], weights=[1e4, 1.0])


def test_what_is_logged_may_be_of_any_size():
    scores = score([specimens.logs_huge_metrics], ["a", "b", "c"])
    assert scores.reward == [1.0] * 3
    assert math.isnan(scores.metrics["huge"])
    assert math.isnan(scores.metrics["infinite"])


@pytest.mark.parametrize("reward, name", [(1e39, "inf"), (-math.inf, "-inf"), (math.nan, "nan")])
def test_rollouts_name_a_reward_that_is_no_finite_number(reward, name):
    """Unscored is None in a list of rewards, or False in valid_B; a NaN is a fault of whoever made the tensor."""
    with pytest.raises(ValueError, match=f"reward_B holds {name} at row 1: only finite numbers of torch.float32"):
        weights_of([1.0, reward])


# --- parameters of the other form


@pytest.mark.parametrize(
    "name, parameter, form",
    [
        ("batch_with_completion", "completion", "all completions at once"),
        ("batch_with_prompt", "prompt", "all completions at once"),
        ("plain_with_prompts", "prompts", "one completion at a time"),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_parameter_of_the_other_form_is_named_before_the_run(name, parameter, form, by_name):
    spec = f"{SPECIMENS}:{name}" if by_name else getattr(specimens, name)
    with pytest.raises(ValueError, match=f"{name} takes {form}.*its parameter '{parameter}' belongs to the other form"):
        resolve(spec)


def test_a_parameter_of_the_other_form_that_is_fixed_is_taken():
    scores = score([{"function": specimens.batch_with_completion, "completion": "a"}], ["a", "b"])
    assert scores.reward == [1.0, 0.0]
