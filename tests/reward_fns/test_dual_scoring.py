"""Strict and lenient readings of the same answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns import countdown, dual_scoring, math_equivalence, registry, sort_letters, text

PUZZLE = {"numbers": [3, 5, 7], "target": 22}
CASES = {  # name -> row, completions that only the lenient reading passes, that both pass, that neither does
    "countdown": (
        PUZZLE,
        ["I would say 3*5+7.", "Let me see:\n3 * 5 + 7 = 22, so that is it!", "So (3×5)+7 it is"],
        ["3*5+7", "<answer>(3*5)+7 = 22</answer>", "The answer is 3*5+7.", "\\boxed{3 \\times 5 + 7}"],
        ["It is 22.", "3*5+7, or is it 3+5+7?", "22 3 5 7", ""],
    ),
    "sort_letters": (
        {"letters": "cab"},
        ["The letters in order: abc.", "**abc**", "ABC", "Sorted, this is 'abc'"],
        ["abc", " abc\n"],
        ["abc or cab", "cab", "", "abcd"],
    ),
    "exact_match": (
        {"answer": "New York"},
        ["The capital is New York.", "new york", "It is (New York)!"],
        ["New York", " New York\n", "**New York**", "<answer>New York</answer>"],
        ["York", "New York, or Boston", "Anew York", ""],
    ),
    "number_match": (
        {"answer": "9 * 8 = 72\n#### 72"},
        ["The answer is 72.", "72", "So 9 * 8 = 72"],
        ["So 9 * 8 = 72\n#### 72", "<answer>72</answer>", "\\boxed{72}", "#### 7\n#### 72 dollars"],
        ["#### 73", "72 or 73", "", "#### 72, no, 73", "#### 70\nno, it is 72"],
    ),
    "math_equivalence": (
        {"answer": "\\frac{1}{2}"},
        ["The answer is 0.5", "#### 1/2"],
        ["So it is \\boxed{\\frac{1}{2}}.", "\\boxed{0.5}"],
        ["\\boxed{2}", "", "I give up"],
    ),
}


def test_every_twin_is_of_a_shipped_function_and_has_its_cases() -> None:
    assert set(dual_scoring.OTHER_READINGS) == set(CASES) <= set(registry.rewards())


@pytest.mark.parametrize("name", CASES)
def test_what_the_strict_reading_passes_the_lenient_one_passes_too_and_it_passes_more(name: str) -> None:
    if name == "math_equivalence":
        pytest.importorskip("math_verify")
    kind, twin = dual_scoring.OTHER_READINGS[name]
    pair = {
        kind: getattr(dual_scoring, twin),
        "lenient" if kind == "strict" else "strict": registry.rewards()[name].function,
    }
    row, lenient, both, neither = CASES[name]
    for texts, expected in ((lenient, (0.0, 1.0)), (both, (1.0, 1.0)), (neither, (0.0, 0.0))):
        for answer in texts:
            assert (pair["strict"](answer, **row), pair["lenient"](answer, **row)) == expected, answer


@pytest.mark.parametrize(
    "completion, passes",
    [("it is 5.", True), ("x = 5", True), ("(5)", True), ("it is 3.5", False), ("it is -5", False), ("so 1/5", False)],
)
def test_the_end_of_another_number_is_not_the_answer(completion: str, passes: bool) -> None:
    assert dual_scoring.answer_at_the_end(completion, "5") == float(passes)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123457+-*/()= <>answer/#\\boxed{}.abcABC\n", max_size=60))
def test_strict_is_never_above_lenient_on_any_text(completion: str) -> None:
    row = {"letters": "cab", "answer": "5", **PUZZLE}
    assert countdown.countdown(completion, **row) <= dual_scoring.countdown_anywhere(completion, **row)
    assert sort_letters.sort_letters(completion, **row) <= dual_scoring.sorted_anywhere(completion, **row)
    assert text.exact_match(completion, **row) <= dual_scoring.answer_at_the_end(completion, **row)
    assert dual_scoring.marked_number(completion, **row) <= text.number_match(completion, **row)


def test_a_twin_is_no_reward_to_train_on_by_name() -> None:
    names = {name for _, name in dual_scoring.OTHER_READINGS.values()}
    assert not names & set(registry.rewards())
    assert not any(hasattr(getattr(dual_scoring, name), "reward_info") for name in names)
    assert math_equivalence.boxed("\\boxed{5}") == "5"
