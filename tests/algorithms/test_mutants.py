"""Planted faults: each bug below stood in a published trainer. It is put in, and the named test must go red.

A mutant replaces one function or rule by its faulty form; the killer is a test of this suite, called as it stands.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import planted_faults as faults
import pytest
import torch

from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.prove import measure as measure_module
from llm_pg.prove import worlds
from llm_pg.prove.reasons import NO_CLIP
from llm_pg.prove.worlds import WorldSpec

HERE = Path(__file__).parent
Patch = pytest.MonkeyPatch


def suite(module: str, test: str) -> Callable[..., None]:
    """A test function of this suite, found when it is needed."""

    def run(*arguments: object, **keywords: object) -> None:
        for folder in (HERE, HERE.parent / "estimators"):
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
        getattr(importlib.import_module(module), test)(*arguments, **keywords)

    return run


def exact(row: AlgorithmSpec, spec: WorldSpec) -> Callable[[], None]:
    """The line of the table that says: this is exact."""

    def run() -> None:
        assert measure_module.measure(row, spec)[0].bias < 1e-10

    return run


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    """What was measured without the fault must not answer for it, nor the other way round."""
    measure_module.measure.cache_clear()
    worlds.build.cache_clear()
    yield
    measure_module.measure.cache_clear()
    worlds.build.cache_clear()


PLAIN = AlgorithmSpec("plain", "", surrogate="reinforce")
FREE = dataclasses.replace(ALGORITHMS["rloo"], epsilon=NO_CLIP)
TOTAL = dataclasses.replace(PLAIN, returns="total")
PENALTY = dataclasses.replace(PLAIN, beta=1.0)
COOL = WorldSpec(sampler=(("temperature", 0.6),))
CUT = WorldSpec(sampler=(("top_k", 2),))
OLD = WorldSpec(reused=True)
MISMATCH = WorldSpec(mismatch=True)
CORRECTED = dataclasses.replace(
    ALGORITHMS["rloo"],
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode="sequence_truncate",
    vllm_importance_sampling_clip_max=NO_CLIP,
)
REFERENCE = WorldSpec(rewards="none", reference="far")


CASE = {"seed": 5, "prompts": 2, "generations": 3, "dtype": torch.float64, "reused": False, "unscored": False}


def _ranks(name: str) -> Callable[[], None]:
    return lambda: suite("test_cut_proof", "check_two_ranks")(name, 5)


def _cuts(name: str) -> Callable[[], None]:
    return lambda: suite("test_cut_proof", "check_micro_batches")(name, CASE, [3, 1, 4, 0, 5, 2], 4)


def _padding(name: str) -> Callable[[], None]:
    return lambda: suite("test_cut_proof", "check_padding")(name, CASE, 2, float("nan"))


def _of(module: str, test: str, *arguments: object) -> Callable[[], None]:
    return lambda: suite(f"test_{module}", f"test_{test}")(*arguments)


RETURNS = _of("returns", "an_episode_pays_nothing_back_across_its_end_and_a_cut_bootstraps")

MUTANTS: list[tuple[Callable[[Patch], None], str, Callable[[], None]]] = [
    (faults.eos_left_out, "rloo is exact", exact(ALGORITHMS["rloo"], WorldSpec())),
    (
        faults.eos_left_out,
        "the last token is trained",
        _of("algorithm", "the_last_token_of_a_completion_is_trained_like_any_other", "grpo"),
    ),
    (
        faults.verdict_at_the_first_token,
        "the EOS carries the verdict",
        _of("algorithm", "the_eos_is_in_the_mask_and_carries_the_verdict"),
    ),
    (faults.temperature_not_trained, "T 0.6 sampled and trained is exact", exact(PLAIN, COOL)),
    (faults.top_k_not_trained, "top-k sampled and trained is exact", exact(PLAIN, CUT)),
    (faults.denominator_of_the_micro_batch, "micro-batches add up: rloo", _cuts("rloo")),
    (faults.denominator_of_the_micro_batch, "micro-batches add up: grpo", _cuts("grpo")),
    (faults.denominator_of_one_rank, "two ranks add up: grpo", _ranks("grpo")),
    (faults.denominator_of_one_rank, "two ranks add up: ppo", _ranks("ppo")),
    (
        faults.no_epsilon_under_the_deviation,
        "equal rewards weigh nothing",
        _of("algorithm", "a_group_of_equal_rewards_weighs_nothing_to_the_last_bit", "grpo", 0.7),
    ),
    (
        faults.mean_of_equal_rewards_by_plain_sums,
        "equal rewards weigh nothing",
        _of("algorithm", "a_group_of_equal_rewards_weighs_nothing_to_the_last_bit", "rloo", 0.7),
    ),
    (
        faults.deviation_with_divisor_n,
        "z-scores by hand",
        _of("algorithm", "z_scores_are_the_rewards_less_their_mean_over_their_deviation"),
    ),
    (
        faults.deviation_with_divisor_n,
        "z-score has its predicted scale",
        _of("predicted_bias", "z_scoring_verdicts_scales_one_prompt_as_its_closed_form_says", 4),
    ),
    (
        faults.deviation_of_one_unguarded,
        "a group of one is no NaN",
        _of("algorithm", "a_group_of_equal_rewards_weighs_nothing_to_the_last_bit", "grpo", 1.0),
    ),
    (faults.itself_in_the_leave_one_out_mean, "rloo is exact", exact(ALGORITHMS["rloo"], WorldSpec())),
    (
        faults.groups_mixed,
        "prompts do not mix",
        _of("algorithm", "the_rewards_of_one_prompt_move_no_weight_of_another", "grpo"),
    ),
    (
        faults.unscored_count_as_zero,
        "an unscored row enters nothing",
        _of("algorithm", "a_row_that_could_not_be_scored_enters_neither_baseline_nor_denominator"),
    ),
    (faults.beta_ignored, "beta is read: grpo", _of("algorithm", "beta_is_read_by_every_algorithm", "grpo")),
    (faults.beta_ignored, "beta is read: rloo", _of("algorithm", "beta_is_read_by_every_algorithm", "rloo")),
    (faults.penalty_of_the_wrong_sign, "k1 in the reward is ∇KL", exact(PENALTY, REFERENCE)),
    (
        faults.penalty_of_the_wrong_sign,
        "a penalty pulls to the reference",
        _of("algorithm", "a_penalty_pulls_toward_the_reference", "loss"),
    ),
    (faults.k1_means_reference_over_policy, "k1 in the reward is ∇KL", exact(PENALTY, REFERENCE)),
    (
        faults.k3_without_its_linear_term,
        "a penalty pulls to the reference",
        _of("algorithm", "a_penalty_pulls_toward_the_reference", "loss"),
    ),
    (
        faults.truncation_policy_ignored,
        "truncated rows follow the policy",
        _of("algorithm", "truncated_completions_follow_the_policy_that_is_named"),
    ),
    (
        faults.truncation_policy_ignored,
        "a fine is part of the objective",
        exact(dataclasses.replace(PLAIN, truncated="penalize", truncation_penalty=0.5), WorldSpec()),
    ),
    (
        faults.statistics_over_padding,
        "KL and entropy of completions only",
        _of("algorithm", "logged_kl_and_entropy_are_means_over_completion_tokens_only"),
    ),
    (
        faults.junk_through_the_gradient,
        "padding changes nothing",
        _padding("grpo with all"),
    ),
    (
        faults.sum_reads_the_padding,
        "NaN outside the mask stays there",
        _of("surrogates", "what_stands_outside_the_mask_reaches_neither_sum_nor_gradient", float("nan")),
    ),
    (faults.behaviour_forgotten, "rloo without clipping is exact on old data", exact(FREE, OLD)),
    (
        faults.behaviour_forgotten,
        "the ratio is from the sampling policy",
        _of("algorithm", "a_second_pass_measures_its_ratio_from_the_policy_that_sampled", "grpo"),
    ),
    (faults.token_ratio_for_the_completions, "rloo without clipping is exact on old data", exact(FREE, OLD)),
    (
        faults.pessimism_turned_round,
        "clipping stops what would go further",
        _of("surrogates", "clipping_stops_only_what_would_go_further", 1.3, 2.0, 0.0),
    ),
    (faults.rewards_before_a_token_count, "reward-to-go is exact", exact(PLAIN, WorldSpec(rewards="dense"))),
    (faults.return_paid_across_an_end, "an end pays nothing back", RETURNS),
    (faults.bootstrap_at_a_cut_forgotten, "a cut bootstraps", RETURNS),
    (faults.sum_over_tokens_made_a_mean, "rloo is exact", exact(ALGORITHMS["rloo"], WorldSpec())),
    (
        faults.baseline_updated_before_it_is_read,
        "a running mean is fixed before",
        _of("algorithm", "a_running_mean_is_fixed_before_the_batch_it_is_compared_with"),
    ),
    (faults.greedy_of_another_prompt, "remax is exact", exact(ALGORITHMS["remax"], WorldSpec())),
    (faults.every_weighs_alike_in_the_mean, "opo weighs by length", _of("algorithm", "opo_weighs_by_length")),
    (faults.best_of_k_without_its_factor, "the best of k is exact", exact(ALGORITHMS["pass_at_k"], WorldSpec())),
    (
        faults.best_of_k_with_itself_among_the_others,
        "the best of k is exact",
        exact(ALGORITHMS["pass_at_k"], WorldSpec()),
    ),
    (faults.a_constant_under_the_mean, "maxrl is exact", exact(ALGORITHMS["maxrl"], WorldSpec())),
    (
        faults.gate_of_the_wrong_sign,
        "the gate has a temperature for each sign",
        _of("sampler_correction", "the_soft_gate_is_the_plain_push_times_a_bell_around_ratio_one", 1.7, 1.0),
    ),
    (faults.correction_of_the_present_policy, "a correction is exact", exact(CORRECTED, MISMATCH)),
    (faults.correction_of_the_token, "a correction is exact", exact(CORRECTED, MISMATCH)),
    (
        faults.successes_dropped_too,
        "nothing fresh is dropped",
        exact(dataclasses.replace(FREE, off_policy_mask_threshold=0.05), WorldSpec()),
    ),
    (
        faults.share_of_the_micro_batch,
        "two ranks add up: a third of the tokens",
        lambda: [suite("test_cut_proof", "check_two_ranks")("ppo, a third of the tokens", seed) for seed in range(8)],
    ),
    (faults.weights_carry_a_gradient, "no weight carries a gradient", _of("algorithm", "no_weight_carries_a_gradient")),
]


@pytest.mark.parametrize(("plant", "name", "killer"), MUTANTS, ids=[f"{m.__name__} / {n}" for m, n, _ in MUTANTS])
def test_a_planted_fault_turns_its_test_red(
    plant: Callable[[Patch], None], name: str, killer: Callable[[], None], monkeypatch: Patch
) -> None:
    killer()
    measure_module.measure.cache_clear()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        killer()
