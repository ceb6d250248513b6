"""The ledger of a batch, without a worker: what the functions answer goes in, sums, causes and limits come out."""

import logging
import math
import re

import pytest
import reward_specimens as specimens

from llm_pg.rewards import RewardError, resolve
from llm_pg.rewards.contract import MAX_REWARD
from llm_pg.rewards.tally import Scores, Tally


def ledger(size=4, *, most=1.0, strict=False, shown=None, **options):
    functions = [resolve(specimens.tenth), resolve(specimens.batch_raises)]
    return Tally(functions, size, most, strict, set() if shown is None else shown, **options)


def answer(reward, *, parts=(), extra=(), metrics=()):
    return {"reward": reward, "parts": dict(parts), "extra": dict(extra), "metrics": list(metrics)}


def test_a_batch_is_added_up_by_weight_with_the_columns_and_metrics_of_its_functions():
    tally = ledger(3)
    tally.scored(0, 0, answer(1.0, parts={"z": 4.0, "form": 2.0}, extra={"b": "x"}, metrics=[("z", 9.0), ("len", 1.0)]))
    tally.scored(0, 1, answer(2.0, parts={"form": math.nan}, extra={"b": "y", "a": 1}, metrics=[("len", 4.0)]))
    tally.scored(0, 2, answer(None, parts={"form": None}))
    for index, reward in enumerate([10.0, None, None]):
        tally.scored(1, index, answer(reward))
    scores = tally.scores([0.5, 2.0])
    assert scores.reward == [20.5, 1.0, None]
    assert list(scores.parts.items()) == [
        ("tenth", [1.0, 2.0, None]),
        ("batch_raises", [10.0, None, None]),
        ("tenth/form", [2.0, None, None]),
        ("tenth/z", [4.0, None, None]),
    ]
    assert list(scores.extra.items()) == [("a", [None, 1, None]), ("b", ["x", "y", None])]
    assert list(scores.metrics.items()) == [
        ("len", 2.5),
        ("z", 9.0),
        ("rewards/tenth/mean", 1.5),
        ("rewards/batch_raises/mean", 10.0),
        ("rewards/tenth/form/mean", 2.0),
        ("rewards/tenth/z/mean", 4.0),
    ]
    assert scores.problems == {"tenth": {"returned None": 1}, "batch_raises": {"returned None": 1}}
    assert scores.failures() == {}


def test_a_function_without_any_number_has_no_mean():
    tally = ledger(1)
    tally.scored(0, 0, answer(3.0))
    tally.scored(1, 0, answer(None))
    assert tally.scores([1.0, 1.0]).metrics == {"rewards/tenth/mean": 3.0}


def test_one_completion_with_two_causes_is_one_that_is_lost_and_is_no_silent_one_of_the_function_that_failed():
    tally = ledger(2)
    tally.scored(0, 0, answer(1.0))
    tally.scored(0, 1, answer(None))
    tally.failed(1, 0, "late", "")
    tally.scored(1, 1, answer(None))
    scores = tally.scores([1.0, 1.0])
    assert scores.reward == [None, None]
    assert scores.parts["tenth"] == [1.0, None]
    assert scores.problems == {"tenth": {"returned None": 1}, "batch_raises": {"late": 1, "returned None": 1}}
    assert scores.failures() == {"batch_raises": 1}


def test_a_function_of_weight_zero_that_fails_costs_no_completion_its_score():
    tally = ledger(2)
    tally.scored(0, 0, answer(1.0))
    tally.scored(0, 1, answer(None))
    for index in range(2):
        tally.scored(1, index, answer(math.nan))
    scores = tally.scores([1.0, 0.0])
    assert scores.reward == [1.0, None]
    assert scores.problems == {"tenth": {"returned None": 1}, "batch_raises": {"NaN": 2}}


def test_failures_are_counted_over_all_causes_but_not_what_does_not_apply():
    problems = {"a": {"late": 2, "NaN": 3, "returned None": 7}, "b": {"returned None": 1}}
    assert Scores([], problems=problems).failures() == {"a": 5}


def test_a_function_that_is_not_asked_needs_no_answer_and_has_no_score():
    tally = ledger(2)
    tally.leave_out([1])
    for index in range(2):
        tally.scored(0, index, answer(1.0))
    assert tally.scores([1.0, 1.0]).parts["batch_raises"] == [None, None]


def test_a_completion_that_was_never_answered_is_an_error_of_ours():
    tally = ledger(3)
    tally.leave_out([0])
    tally.scored(1, 0, answer(1.0))
    tally.failed(1, 1, "late", "")
    with pytest.raises(AssertionError, match=r"^Reward function batch_raises neither .* on completions \{2\}\.$"):
        tally.scores([1.0, 1.0])


def test_failures_up_to_the_limit_are_borne_and_the_next_one_ends_the_run():
    tally = ledger(4, most=0.5)
    tally.failed(1, 0, "late", "T0")
    tally.failed(1, 0, "late", "T0")  # the same completion is counted once
    tally.failed(1, 1, "late", "T1")
    with pytest.raises(RewardError) as error:
        tally.failed(1, 3, "ValueError", "T3")
    assert str(error.value) == (
        "Reward function batch_raises could not score 3 of 4 completions of this batch (late: 3, ValueError: 1): "
        "over the limit max_unscorable=0.5. The last one:\nT3"
    )


def test_under_strict_the_first_failure_ends_the_run():
    with pytest.raises(RewardError, match=r"could not score 1 of 4 .*\(late: 1\): strict is set\.$"):
        ledger(strict=True).failed(0, 2, "late", "")


@pytest.mark.parametrize("share, borne", [(None, 1), (1.0, 1), (0.5, 2), (0.25, 4)])
def test_the_limit_counts_the_completions_of_the_step_of_which_the_batch_is_a_share(share, borne):
    tally = ledger(10, most=0.1, **({} if share is None else {"share": share}))
    for index in range(borne):
        tally.failed(0, index, "late", "")
    told = r"max_unscorable=0\.1" + ("" if share in (None, 1) else f" of a step's {round(10 / share)}") + r"\.$"
    with pytest.raises(RewardError, match=told):
        tally.failed(0, borne, "late", "")


@pytest.mark.parametrize("silent", [2, 3])
def test_completions_to_which_no_function_applies_cost_nothing_but_a_warning_once(silent, caplog):
    shown = set()
    for _ in range(2):
        tally = ledger(4, most=0.0, shown=shown)
        for index in range(4):
            tally.scored(0, index, answer(None if index < silent else 1.0))
            tally.scored(1, index, answer(None if index < silent else 1.0))
        assert tally.scores([1.0, 1.0]).reward == [None] * silent + [2.0] * (4 - silent)
    assert caplog.messages == [
        f"All reward functions returned None for {silent} of 4 completions of a batch (the first is 0): they stay "
        "unscored and carry no gradient. Let one function apply to every row. Logged once."
    ]


def test_of_completions_without_a_score_only_those_that_failed_count_against_the_limit():
    tally = ledger(4, most=0.25)
    for index in range(3):
        tally.scored(0, index, answer(None))
        tally.scored(1, index, answer(1.0 if index == 2 else None))
    tally.failed(0, 3, "late", "")
    tally.scored(1, 3, answer(None))
    assert tally.scores([1.0, 1.0]).reward == [None, None, 1.0, None]


def test_a_batch_without_any_score_ends_the_run():
    tally = ledger(4, most=0.5)
    for index in range(4):
        tally.scored(0, index, answer(None))
        tally.scored(1, index, answer(None))
    with pytest.raises(RewardError) as error:
        tally.scores([1.0, 1.0])
    assert str(error.value) == (
        "4 of 4 completions of this batch could not be scored (tenth: returned None: 4; batch_raises: returned None: "
        "4): over the limit max_unscorable=0.5."
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_at_the_largest_reward_is_kept_and_one_beyond_names_its_terms(sign):
    tally = ledger(1)
    tally.scored(0, 0, answer(sign * MAX_REWARD))
    tally.scored(1, 0, answer(None))
    assert tally.scores([1.0, 1.0]).reward == [sign * MAX_REWARD]
    with pytest.raises(RewardError, match=re.escape(f"reward {sign * 2e18:g} (tenth 2 × {sign * 1e18:g}), and")):
        tally.scores([2.0, 1.0])
    tally.scored(1, 0, answer(sign * 1.0))
    with pytest.raises(RewardError, match=re.escape(f"(tenth 2 × {sign * 1e18:g}, batch_raises 3 × {sign}), and")):
        tally.scores([2.0, 3.0])


def test_a_sum_beyond_says_what_to_do():
    tally = ledger(1)
    tally.scored(0, 0, answer(1e18))
    tally.scored(1, 0, answer(None))
    with pytest.raises(RewardError) as error:
        tally.scores([2.0, 1.0])
    assert str(error.value) == (
        "Completion 0 of this batch has the weighted reward 2e+18 (tenth 2 × 1e+18), and float32 does not hold what is "
        "computed from rewards beyond 1e+18. Lower the weights or the rewards."
    )


def test_a_global_that_a_worker_does_not_see_is_found_in_the_function_itself(caplog):
    with caplog.at_level(logging.WARNING):
        ledger().noticed(1, {"reads": {}})
    assert [record.getMessage().partition(", which is")[0] for record in caplog.records] == [
        "Reward function batch_raises reads the global `BAD`"
    ]


def test_a_sum_does_not_depend_on_the_order_of_its_terms_and_a_sum_beyond_float64_has_no_mean():
    tally = ledger(3)
    for index, value in enumerate([1e17, 1.0, -1e17]):
        tally.scored(0, index, answer(0.0, metrics=[("exact", value), ("both", (-1) ** index * math.inf)]))
        tally.scored(1, index, answer(0.0, metrics=[("huge", 1.7e308)]))
    metrics = tally.scores([1.0, 1.0]).metrics
    assert metrics["exact"] == 1 / 3
    assert math.isnan(metrics["both"])
    assert math.isnan(metrics["huge"])


def test_a_cause_is_shown_once_with_its_trace_for_each_function_and_over_all_batches(caplog):
    shown: set[tuple[str, str]] = set()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tally = ledger(8, shown=shown)
            tally.failed(0, 3, "late", "its trace")
            tally.failed(0, 4, "late", "another trace")
            tally.failed(1, 5, "late", "")
            tally.retried(0, 6, "ValueError", "the trace")
            tally.failed(0, 6, "ValueError", "")
            tally.noticed(1, {"state": ["total"]})
            tally.scored(1, 7, answer(math.nan))
    said = [record.getMessage() for record in caplog.records]
    once = "Logged once for this cause."
    assert said[:4] == [
        "Reward function tenth failed on completion 3 of a batch (late), which stays unscored. " + once + "\nits trace",
        "Reward function batch_raises failed on completion 5 of a batch (late), which stays unscored. " + once,
        "Reward function tenth failed on 6 completions at once (ValueError); they are run again one by one. "
        + once
        + "\nthe trace",
        "Reward function tenth failed on completion 6 of a batch (ValueError), which stays unscored. " + once,
    ]
    assert said[4].startswith("Reward function batch_raises keeps a state: its module's global `total`")
    assert said[4].endswith(once)
    assert said[5] == (
        "Reward function batch_raises failed on completion 7 of a batch (NaN), which stays unscored. " + once
    )
    assert len(said) == 6
    assert shown == {
        ("tenth", "late"),
        ("batch_raises", "late"),
        ("tenth", "ValueError of many"),
        ("tenth", "ValueError"),
        ("batch_raises", "state total"),
        ("batch_raises", "NaN"),
    }


def test_a_broken_contract_names_the_function():
    with pytest.raises(RewardError, match=r"^Reward function batch_raises returns text$"):
        ledger().broken(1, "returns text")


def test_each_function_needs_a_weight():
    tally = ledger(1)
    tally.leave_out([0, 1])
    with pytest.raises(ValueError, match="zip"):
        tally.scores([1.0])
