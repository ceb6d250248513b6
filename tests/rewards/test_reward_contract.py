"""What a reward function may look like and return: TRL's contract and the plain form."""

import math
from datetime import date
from functools import partial

import numpy
import pytest
import reward_specimens as specimens

from llm_pg.rewards import RewardError, Scorer, resolve
from llm_pg.rewards.contract import BadValueError, read_batch, read_number, read_plain, read_signature, text_of


def score(funcs, completions, rows=None, prompts=None, state=None, **options):
    rows = rows if rows is not None else [{} for _ in completions]
    prompts = prompts if prompts is not None else [f"p{i}" for i in range(len(completions))]
    ids = [[i, 7] for i in range(len(completions))]
    with Scorer(funcs, **{"in_process": True, **options}) as scorer:
        return scorer.grade(prompts, completions, ids, rows, state)


score_in_worker = partial(score, in_process=False, workers=1)


def test_trls_form_gets_all_of_trls_arguments_by_keyword():
    rows = [{"answer": "yes", "other": 1}, {"answer": "no", "other": 2}]
    scores = score_in_worker([specimens.trl_form], ["yes", "yes"], rows, state={"global_step": 5})
    assert scores.reward == [1.0, 0.0]
    assert scores.extra == {"seen": ["p0|[0, 7]", "p1|[1, 7]"]}
    assert scores.metrics == {"step": 5.0, "others": 2.0, "rewards/trl_form/mean": 0.5}


def test_a_batch_function_without_kwargs_gets_only_what_it_names():
    rows = [{"answer": "yes", "other": 1}, {"answer": "no", "other": 2}]
    assert score([specimens.trl_form_without_kwargs], ["yes", "yes"], rows).reward == [1.0, 0.0]


def test_the_plain_form_gets_one_completion_and_its_row():
    rows = [{"answer": "a", "other": 1}, {"answer": "b", "other": 2}]
    scores = score([specimens.plain_with_everything], ["yes", "no"], rows, state={"global_step": 3})
    assert scores.reward == [1.0, 0.0]
    assert scores.extra == {"seen": ["p0|[0, 7]|['answer', 'other']", "p1|[1, 7]|['answer', 'other']"]}
    assert scores.metrics["step"] == 3.0


def test_in_process_and_worker_scores_are_equal_in_every_field():
    rows = [{"answer": "yes", "other": 1}, {"answer": "no", "other": 2}]
    funcs = [
        specimens.trl_form,
        specimens.plain_with_everything,
        specimens.returns_parts,
        specimens.batch_judge,
        specimens.returns_none,
    ]
    there = score(funcs, ["yes", "no"], rows, state={"global_step": 3}, in_process=False, workers=2)
    here = score(funcs, ["yes", "no"], rows, state={"global_step": 3})
    assert there == here


def test_conversational_completions_go_as_messages_to_trls_form_and_as_text_to_the_plain_form():
    completions = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no way"}]]
    prompts = [[{"role": "user", "content": "well?"}]] * 2
    scores = score_in_worker([specimens.trl_form_of_messages, specimens.length], completions, prompts=prompts)
    assert scores.parts == {"trl_form_of_messages": [1.0, 0.0], "length": [3.0, 6.0]}


@pytest.mark.parametrize(
    "messages, text",
    [
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}], "xy"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "user", "content": "q"}], ""),
        ([], ""),
    ],
)
def test_the_text_of_messages_is_the_last_one_of_the_assistant(messages, text):
    assert text_of(messages) == text


def test_the_reward_functions_of_trl_run_unchanged():
    good = [{"role": "assistant", "content": "<think>\nhm\n</think>\nfour"}]
    bad = [{"role": "assistant", "content": "four"}]
    scores = score_in_worker(["trl.rewards:think_format_reward"], [good, bad])
    assert scores.reward == [1.0, 0.0]


def test_the_total_is_the_weighted_sum_that_skips_none():
    scores = score([specimens.returns_none, specimens.length], ["BAD", "four", "ab"], weights=[10.0, 0.5])
    assert scores.parts == {"returns_none": [None, 1.0, 1.0], "length": [3.0, 4.0, 2.0]}
    assert scores.reward == [1.5, 12.0, 11.0]
    assert scores.problems == {}


def test_a_completion_to_which_no_function_applies_has_no_reward_and_is_counted():
    scores = score([specimens.returns_none], ["BAD", "a", "b", "c", "d"])
    assert scores.reward == [None, 1.0, 1.0, 1.0, 1.0]
    assert scores.problems == {"returns_none": {"returned None": 1}}


def test_named_parts_are_logged_beside_the_reward_and_not_added_to_it():
    scores = score([specimens.returns_parts], ["BAD", "good"])
    assert scores.reward == [0.5, 0.5]
    assert scores.parts["returns_parts/format"] == [0.0, 1.0]
    assert scores.parts["returns_parts/depth"] == [None, 3.0]
    assert scores.metrics["rewards/returns_parts/format/mean"] == 0.5


def test_async_functions_wait_at_the_same_time():
    import time

    with Scorer([specimens.judge, specimens.batch_judge]) as scorer:
        scorer.grade(["p"], ["warm"], [[1]], [{}])
        start = time.monotonic()
        scores = scorer.grade(["p"] * 40, ["word"] * 40, [[1]] * 40, [{}] * 40)
    assert scores.parts == {"judge": [1.0] * 40, "batch_judge": [4.0] * 40}
    assert time.monotonic() - start < 3.0  # one after the other would be 16 s


def test_async_calls_of_one_worker_share_a_loop_so_that_clients_stay_usable():
    with Scorer([specimens.remembers_its_loop], workers=1) as scorer:
        for _ in range(3):
            scores = scorer.grade(["p"] * 2, ["a", "b"], [[1]] * 2, [{}] * 2)
    assert scores.reward == [1.0, 1.0]


def test_an_async_function_runs_in_process_under_a_running_loop():
    import asyncio

    async def inside():
        return score([specimens.judge], ["a", "b"])

    assert asyncio.run(inside()).reward == [1.0, 1.0]


def test_an_empty_batch_has_an_empty_score():
    assert score([specimens.one], []).reward == []


def test_equal_names_are_told_apart():
    funcs = [{"function": specimens.with_option, "factor": 2.0}, {"function": specimens.with_option, "factor": 3.0}]
    assert score(funcs, ["ab"]).parts == {"with_option": [4.0], "with_option_2": [6.0]}


def test_a_name_that_a_number_would_make_is_not_given_twice():
    def length_2(completion):
        return 0.0

    scores = score([specimens.length, specimens.length, length_2], ["abc"])
    assert scores.parts == {"length": [3.0], "length_2": [3.0], "length_2_2": [0.0]}


@pytest.mark.parametrize("value", [{1: 2.0}, [{"when": date(2026, 1, 1)}], object()])
def test_an_option_that_would_reach_a_worker_changed_is_refused_and_taken_in_process(value):
    spec = {"function": f"{specimens.__file__}:echo_of_option", "option": value}
    with pytest.raises(ValueError, match=r"'option' of reward function echo_of_option .* in_process=True"):
        Scorer([spec])
    with Scorer([spec], in_process=True) as scorer:
        assert scorer.grade(["p"], ["c"], [[1]], [{}]).extra == {"option": [str(value)]}


def test_a_partial_fixes_an_argument_in_the_worker_too():
    from reward_fns.text import number_match

    scores = score_in_worker([partial(number_match, tolerance=1.0)], ["5"], [{"answer": 5.5}])
    assert scores.reward == [1.0]


def test_a_fixed_argument_wins_over_a_column_of_its_name():
    funcs = [{"function": specimens.with_option, "factor": 2.0}]
    assert score(funcs, ["ab"], [{"factor": 100.0}]).reward == [4.0]


@pytest.mark.parametrize(
    "value, number",
    [(True, 1.0), (2, 2.0), (0.25, 0.25), (None, None), (numpy.float32(0.5), 0.5), (numpy.array([3]), 3.0)],
)
def test_numbers_of_any_kind_are_read(value, number):
    assert read_number(value, "a number", "it") == number


def test_a_tensor_is_read_like_a_list():
    torch = pytest.importorskip("torch")
    assert read_batch(torch.tensor([1.0, 0.5], dtype=torch.bfloat16), 2) == [1.0, 0.5]
    assert read_plain(torch.tensor(0.5)) == (0.5, {})


def test_a_list_of_a_completion_is_read_as_rewards_of_its_tokens():
    assert read_batch([[1.0, 2], 0.5, None], 3) == [[1.0, 2.0], 0.5, None]
    assert read_batch(numpy.ones((2, 2)), 2) == [[1.0, 1.0], [1.0, 1.0]]
    assert read_plain([1, 0]) == ([1.0, 0.0], {})
    assert read_plain({"reward": (1.0, 0.0), "x": 2}) == ([1.0, 0.0], {"x": 2.0})


def test_nan_is_read_as_nan_and_not_as_a_number():
    assert math.isnan(read_number(float("nan"), "a number", "it"))


@pytest.mark.parametrize(
    "result, words",
    [
        ([1.0, "0.5"], "value 1 is '0.5' (str)"),
        ([1.0], "it returned 1"),
        ([1.0] * 3, "it returned 3"),
        ({"a": 1}, "it returned {'a': 1} (dict)"),
        (0.5, "it returned 0.5 (float)"),
        ("12", "it returned '12' (str)"),
        (None, "it returned None (NoneType)"),
        ([1.0, math.inf], "value 1 is inf (float)"),
        ([10**400, 1.0], "value 0 is 1000"),
        ([[1.0], [None]], "value 1, token 0, is None"),
        ([1.0, [2.0, "x"]], "value 1, token 1, is 'x' (str)"),
        ([1.0, [2.0, [3.0]]], "value 1, token 1, is [3.0] (list)"),
        (numpy.ones(()), "it returned 1.0 (float)"),
        (numpy.full((2, 2), numpy.inf), "value 0, token 0, is inf (float)"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_with_the_first_bad_value(result, words):
    with pytest.raises(BadValueError) as caught:
        read_batch(result, 2)
    assert words in str(caught.value)
    assert "a list of 2 numbers or None" in str(caught.value)


def test_a_function_of_neither_form_is_refused_with_both_forms():
    with pytest.raises(ValueError, match=r"takes \(text, label\), which is neither form: f\(completion.*prompts"):
        resolve(specimens.wrong_names)


def test_a_misspelt_parameter_gets_a_hint():
    with pytest.raises(ValueError, match=r"Is 'completon' meant to be 'completion'"):
        resolve(specimens.misspelt)


def test_positional_only_parameters_are_refused():
    with pytest.raises(ValueError, match=r"takes completion by position only"):
        resolve(specimens.by_position)


def test_a_builtin_without_a_signature_is_refused():
    with pytest.raises(ValueError, match=r"no readable signature|neither form"):
        read_signature(max, "max")


def test_log_extra_of_another_length_is_an_error():
    with pytest.raises(RewardError, match=r"logs_too_few must log 2 values to the extra column 'seen'"):
        score([specimens.logs_too_few], ["a", "b"])


def test_rows_that_are_not_json_are_refused_by_column():
    with pytest.raises(ValueError, match=r"column 'picture' holds a set"):
        score_in_worker([specimens.one], ["a"], [{"picture": {1, 2}}])
    with pytest.raises(ValueError, match=r"column 'table' holds a mapping with keys that are no text"):
        score_in_worker([specimens.one], ["a"], [{"table": {1: 2}}])


def test_a_column_that_no_function_takes_may_hold_anything():
    assert score_in_worker([specimens.length], ["ab"], [{"picture": {1, 2}}]).reward == [2.0]


def test_arrays_in_rows_arrive_as_lists():
    rows = [{"numbers": numpy.array([1, 2])}, {"numbers": (3, 4)}]
    assert score_in_worker([specimens.clean], ["a", "b"], rows).reward == [102.0, 106.0]


def test_odd_text_arrives_as_it_is():
    completions = ["\ud800", "\x00\n", "𝔘🎉", '"\\'] * 3
    assert score_in_worker([specimens.length], completions).reward == [1.0, 2.0, 2.0, 2.0] * 3


@pytest.mark.parametrize("count", ["prompts", "completion_ids", "rows"])
def test_lists_of_different_lengths_are_refused(count):
    given = {"prompts": ["p"] * 2, "completions": ["c"] * 2, "completion_ids": [[1]] * 2, "rows": [{}] * 2}
    given[count] = given[count][:1]
    with Scorer([specimens.one]) as scorer, pytest.raises(ValueError, match=f"2 completions and 1 {count}"):
        scorer.grade(**given)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": [1.0, 2.0]}, "one finite number for each of the 1"),
        ({"weights": [math.nan]}, "one finite number"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"deadline": 0}, "deadline must be"),
        ({"max_unscorable": 1.5}, "max_unscorable must be a share"),
        ({"memory_gib": -1}, "memory_gib must be"),
        ({"batch_deadline": 0}, "batch_deadline must be"),
    ],
)
def test_bad_settings_of_a_scorer_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Scorer([specimens.one], **options)


def test_a_scorer_needs_a_function():
    with pytest.raises(ValueError, match="at least one reward function"):
        Scorer([])
