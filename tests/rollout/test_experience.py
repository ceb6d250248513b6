"""What a scored batch says of itself: its metrics and its readable rows, against numbers that were added up by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from llm_pg.estimators.kl import k3
from llm_pg.prompts import Prompt
from llm_pg.rollout.experience import Experience, Pieces, columns_of
from tests.tiny import experience, prompts

UNKNOWN = None


@pytest.fixture
def batch() -> Experience:
    """Two groups of two; the completions have 1, 2, 3 and 1 tokens, and the third could not be scored."""
    made = experience(prompts(2), [[0.0, 1.0], [UNKNOWN, 1.0]], [[0, 1], [2, 0]])
    made.rollouts.truncated_B = torch.tensor([True, False, False, False])
    made.scores.problems = {"f": {"NaN": 1, "returned None": 2}, "g": {"returned None": 1}}
    made.scores.metrics = {"seen": 3.0, "rewards/f/mean": 0.5}
    return made


def test_metrics_are_over_the_scorable_rows_and_lengths_over_all(batch: Experience) -> None:
    assert batch.metrics() == {
        "reward": pytest.approx(2 / 3, abs=1e-15),
        "reward_std": pytest.approx(math.sqrt(1 / 3), abs=1e-15),
        "unscorable": 0.25,
        "failed/f": 1,
        "uniform_groups": 0.5,
        "completion_length": 7 / 4,
        "truncated": 0.25,
        "tokens": 7,
        "prompt_tokens": 4,
        **{"completions/min_length": 1.0, "completions/max_length": 3.0},
        **{"completions/min_terminated_length": 1.0, "completions/max_terminated_length": 3.0},
        "completions/mean_terminated_length": 2.0,  # of 2, 3 and 1 tokens
        "reward/f": pytest.approx(2 / 3, abs=1e-15),
        "rewards/f/std": pytest.approx(math.sqrt(1 / 3), abs=1e-15),
        "log/seen": 3.0,
    }


def test_a_batch_without_any_score_has_no_mean_reward_and_only_uniform_groups() -> None:
    found = experience(prompts(2), [[UNKNOWN, UNKNOWN]] * 2).metrics()
    assert math.isnan(found["reward"])
    assert math.isnan(found["reward/f"])
    assert (found["reward_std"], found["unscorable"], found["uniform_groups"]) == (0.0, 1.0, 1.0)


def test_one_score_has_no_deviation_and_two_have() -> None:
    for rewards, expected in (([2.0, UNKNOWN], 0.0), ([2.0, 4.0], math.sqrt(2))):
        found = experience(prompts(1), [rewards]).metrics()
        assert (found["reward_std"], found["rewards/f/std"]) == pytest.approx((expected, expected))


def test_where_every_completion_was_cut_none_has_a_length_at_its_end(batch: Experience) -> None:
    batch.rollouts.truncated_B = torch.ones(4, dtype=torch.bool)
    found = batch.metrics()
    assert [found[f"completions/{kind}_terminated_length"] for kind in ("mean", "min", "max")] == [0.0, 0.0, 0.0]


def test_means_are_taken_in_float64() -> None:
    """The float32 mean of 2^24 and 1 is 2^23."""
    assert experience(prompts(1), [[2.0**24, 1.0]]).metrics()["reward"] == (2**24 + 1) / 2


def test_groups_of_equal_scores_are_uniform_whatever_the_unscorable_row_holds() -> None:
    rewards = [[-1.0, -1.0], [UNKNOWN, -1.0], [-1.0, 1.0], [3.0, 3.0]]
    assert experience(prompts(4), rewards).metrics()["uniform_groups"] == 3 / 4


@pytest.mark.parametrize("staleness", [0, 3])
def test_staleness_is_reported_where_it_is_known(staleness: int, batch: Experience) -> None:
    assert "staleness" not in batch.metrics()
    assert "staleness" not in batch.readable(batch.rollouts.logp_BT, 1)[0]
    late = dataclasses.replace(batch, staleness=staleness)
    assert late.metrics()["staleness"] == staleness
    assert late.readable(batch.rollouts.logp_BT, 1)[0]["staleness"] == staleness


def test_a_refill_reports_its_rounds_what_it_dropped_and_the_reward_of_the_steps_own_prompts(batch: Experience) -> None:
    more = experience(prompts(1), [[5.0, 7.0]], [[3, 3]])
    refilled = dataclasses.replace(more, collected=[batch, more, more])
    found = refilled.metrics()
    assert (found["refill_rounds"], found["groups_dropped"], found["tokens"]) == (2, 3, 7 + 8 + 8)
    assert found["reward"] == 6.0
    assert found["sampled_reward"] == pytest.approx(2 / 3, abs=1e-15)
    lost = experience(prompts(1), [[UNKNOWN, UNKNOWN]])
    assert math.isnan(dataclasses.replace(more, collected=[lost, more]).metrics()["sampled_reward"])


def test_readable_rows_hold_texts_scores_and_the_numbers_of_every_token(batch: Experience) -> None:
    rollouts = batch.rollouts
    rollouts.logp_BT = torch.tensor([[-0.1234567, 0, 0], [-1, -2, 0], [-3, -4, -5], [-6, 0, 0]])
    rows = batch.readable(2 * rollouts.logp_BT, 2)
    assert rows[2] == {
        "prompt_index": 1,
        "group": 1,
        "prompt": "prompt 1",
        "completion": "1/2",
        "ids": [2, 2, 2],
        "reward": None,
        "parts": {"f": None},
        "truncated": False,
        "tokens": {"logp": [-3.0, -4.0, -5.0], "weight": [-6.0, -8.0, -10.0]},
    }
    assert [row["ids"] for row in rows] == [[0], [1, 1], [2, 2, 2], [0]]
    assert [row["group"] for row in rows] == [0, 0, 1, 1]
    assert (rows[0]["truncated"], rows[0]["reward"], rows[0]["parts"]) == (True, 0.0, {"f": 0.0})
    assert rows[0]["tokens"]["logp"] == [-0.12346]  # five digits


def test_the_other_columns_of_a_prompt_s_row_are_beside_its_completions_as_json_holds_them() -> None:
    row = {
        "prompt": "1+1",
        "answer": "2",
        "level": 3,
        "weight": math.inf,
        "steps": [1, 2],
        "note": None,
        "long": "x" * 9_999,
    }
    found = columns_of(Prompt(0, "1+1", None, (1,), row))
    assert found == {"answer": "2", "level": 3, "weight": "inf", "steps": "[1, 2]", "note": None, "long": "x" * 2_000}


def test_a_readable_row_has_its_messages_its_columns_and_the_teachers_numbers(batch: Experience) -> None:
    messages = [{"role": "user", "content": "2 + 2"}]
    first, second = batch.prompts
    batch.prompts[0] = dataclasses.replace(first, messages=messages, row={"prompt": "x", "answer": "4"})
    batch.rollouts.teacher_logp_BT = batch.rollouts.logp_BT - 0.25
    rows = batch.readable(batch.rollouts.logp_BT, 2)
    assert rows[0]["messages"] == messages
    assert rows[0]["columns"] == {"answer": "4"}
    assert rows[1]["tokens"]["teacher_logp"] == [-1.25, -1.25]
    assert "messages" not in rows[2]
    assert "columns" not in rows[2]
    assert second.row == {}


@pytest.mark.parametrize("num_groups, rows", [(0, 0), (1, 2), (2, 4), (9, 4)])
def test_only_the_first_groups_are_readable_and_never_more_than_there_are(
    num_groups: int, rows: int, batch: Experience
) -> None:
    assert len(batch.readable(batch.rollouts.logp_BT, num_groups)) == rows


def test_the_reference_brings_its_log_probabilities_and_k3(batch: Experience) -> None:
    rollouts = batch.rollouts
    rollouts.ref_logp_BT = 1.5 * rollouts.logp_BT
    tokens = batch.readable(rollouts.logp_BT, 1)[1]["tokens"]
    assert list(tokens) == ["logp", "ref_logp", "weight", "kl"]
    assert tokens["ref_logp"] == [-1.5, -1.5]
    assert tokens["kl"] == pytest.approx(k3(rollouts.logp_BT, rollouts.ref_logp_BT)[1, :2].tolist(), abs=1e-5)


def test_further_numbers_are_null_where_they_are_unknown_and_left_out_of_a_row_without_any(batch: Experience) -> None:
    entropy_BT = torch.tensor([[1.0, 0, 0], [math.nan, 2.0, 0], [math.nan] * 3, [3.0, 0, 0]])
    rows = batch.readable(batch.rollouts.logp_BT, 2, {"entropy": entropy_BT})
    assert [row["tokens"].get("entropy") for row in rows] == [[1.0], [None, 2.0], None, [3.0]]


def test_the_pieces_of_a_row_are_the_text_of_its_tokens(batch: Experience, tokenizer: Any) -> None:
    assert "pieces" not in batch.readable(batch.rollouts.logp_BT, 1)[0]
    read = dataclasses.replace(batch, pieces=Pieces(tokenizer))
    read.rollouts.tokens_BT[2] = torch.tensor(tokenizer("a b")["input_ids"])
    assert "".join(read.readable(batch.rollouts.logp_BT, 2)[2]["pieces"]) == "a b"


def test_tokens_that_an_environment_inserted_have_no_numbers(batch: Experience) -> None:
    """Row 2 reads: 2, then 8 9 by the environment, 2, 2."""
    batch.rollouts.inserted_B = [(), (), ((1, (8, 9)),), ()]
    row = batch.readable(batch.rollouts.logp_BT, 2, {"more": torch.full((4, 3), 0.5)})[2]
    assert row["ids"] == [2, 8, 9, 2, 2]
    assert row["tokens"]["logp"] == [-1.0, None, None, -1.0, -1.0]
    assert row["tokens"]["more"] == [0.5, None, None, 0.5, 0.5]
