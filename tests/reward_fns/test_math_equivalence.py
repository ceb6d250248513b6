"""Mathematical equivalence, and its bounds."""

import time

import pytest

pytest.importorskip("math_verify")

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_fns.math_equivalence import boxed, candidate_of, is_bounded, math_equivalence


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"\boxed{72}", 72),
        (r"so $x = 1$ and \boxed{x = 72}", "72"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1,234"),
        ("The answer is 72 dollars.", "72"),
        ("#### 72", r"\boxed{72}"),
        (r"we get $\frac{1}{2}$", "0.5"),
        (r"The final answer is: \frac{2}{4}", "1/2"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\frac{\sqrt{2}}{2}}", r"$\frac{1}{\sqrt{2}}$"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{\left(1, 2\right)}", "(1,2)"),
        (r"\boxed{10^{-3}}", "0.001"),
        (r"\boxed{(2^{30})^{33}}", "2^{990}"),
        ("no formula, just 5", "5"),
    ],
)
def test_the_same_in_another_form_is_paid(completion, answer):
    assert math_equivalence(completion, answer=answer) == 1.0


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"\boxed{71}", "72"),
        (r"\boxed{72} no, \boxed{71}", "72"),
        (r"\boxed{71 = 72}", "72"),
        (r"\boxed{72, 71}", "72"),
        (r"\boxed{71 \text{ or } 72}", "72"),
        (r"\boxed{\pm 72}", "72"),
        (r"\boxed{70 \le x \le 73}", "72"),
        (r"\boxed{[0, 100]}", "72"),
        (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}"),
        (r"\boxed{72", "71"),
        ("The answer is 72 or 71 dollars.", "72"),
        (r"\boxed{\infty}", "72"),
        (r"\boxed{\frac{72}{0}}", "72"),
        (r"\boxed{}", "72"),
        ("", "72"),
    ],
)
def test_another_value_or_a_choice_of_values_is_not(completion, answer):
    assert math_equivalence(completion, answer=answer) == 0.0


@pytest.mark.parametrize("answer", ["", None, "  "])
def test_an_empty_answer_is_refused(answer):
    with pytest.raises(ValueError, match="needs an answer"):
        math_equivalence(r"\boxed{}", answer=answer)


def test_the_last_closed_box_is_read_with_its_brackets():
    assert boxed(r"\boxed{1} \boxed{\frac{a}{b}}") == r"\frac{a}{b}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


def test_one_candidate_is_cut_out_by_the_stated_order():
    assert candidate_of(r"answer is 1. $2$ \boxed{3} 4") == "3"
    assert candidate_of("$2$ 4\n#### 1") == "1"
    assert candidate_of("$7$ then 4 $2$ 4") == "2"
    assert candidate_of("4. Or it is 1,005") == "1005"
    assert candidate_of("there is none that I can think of") == ""
    assert [candidate_of(text) for text in ("none", "x^2+1.", "**(1, 2)**", "2 3")] == ["none", "x^2+1", "(1, 2)", ""]


@pytest.mark.parametrize(
    "text", ["x^{20}", "(a+b)^{20}", "2^{1000}", "e^{0.12345}", "((1))", "x^2 + y^3", "(x^2)^{10}"]
)
def test_ordinary_answers_are_within_the_bounds(text):
    assert is_bounded(text)


@pytest.mark.faults
@pytest.mark.parametrize(
    "text",
    [
        "94**56**35",
        "94^{56^{35}}",
        "9^{9}^{9}",
        "{9^{99}}^{99}",
        "((9^{99})^{99})^{9}",
        "2^{1001}",
        "2^{10 \\cdot 101}",
        "(a+b+c)^{21}",
        "(" * 13 + "1" + ")" * 13,
        "1" * 31,
        "x+" * 151,
        "1000!",
        r"\sum_{i=1}^{10} i",
        r"\binom{10}{5}",
        r"\int x",
    ],
)
def test_what_algebra_could_not_finish_is_scored_zero_unread(text):
    assert not is_bounded(text)
    start = time.process_time()
    assert math_equivalence(f"\\boxed{{{text}}}", answer="5") == 0.0
    assert time.process_time() - start < 0.1


@pytest.mark.faults
def test_the_librarys_own_limit_ends_what_the_bounds_let_through():
    start = time.monotonic()
    assert math_equivalence(r"\boxed{\tan^{200}(x)}", answer="5") == 0.0
    assert time.monotonic() - start < 8.0


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<think>The answer is 5?</think>\nIt is 7.", "5"),
        (r"<answer>\frac{1}{2}</answer>", "2"),
        ("It equals −5", "5"),
        ("It equals 10-5", "-5"),
        ("It is 1.5e3", "3"),
        (r"\boxed{cat}", "act"),
        (r"\boxed{101_2}", "101"),
        (r"\boxed{1F_{16}}", "30"),
        (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}"),
        (r"\boxed{10^{-20}}", "10^{-21}"),
        (r"\boxed{\{1, 2\}}", "(1, 2)"),
        (r"\boxed{[1, 2]}", "(1, 2)"),
        (r"\boxed{(2, 1)}", "(1, 2)"),
        (r"\boxed{(1, 2]}", "(1, 2)"),
        (r"\boxed{1, 2, 3}", "1, 2"),
        (r"\boxed{X}", "x"),
        (r"\boxed{x = 5}", "y = 5"),
        ("#### 17 3", "20"),
        (r"\boxed{17 3}", "51"),
        (r"\boxed{2 3 x}", "6x"),
        (r"\boxed{1{,}5}", "15"),
        (r"\boxed{3 \text{ cm}}", r"3 \text{ m}"),
        (r"\boxed{\sqrt{x^2}}", "x"),
        (r"\boxed{1.41}", r"\sqrt{2}"),
        (r"\boxed{0.3333333}", r"\frac{1}{3}"),
        (r"\boxed{\text{odd}}", r"\text{even}"),
        (r"\boxed{B}", "A"),
    ],
)
def test_what_the_library_or_a_careless_reader_takes_for_equal_is_not_paid(completion, answer):
    assert math_equivalence(completion, answer) == 0.0


@pytest.mark.faults
@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<answer>7</answer>", "7"),
        ("The answer is **73**.", "73"),
        ("<think>It is 5.</think> The answer is $7$.", "7"),
        ("It is 1.5e3", "1500"),
        (r"\boxed{101_2}", "5"),
        (r"\boxed{1F_{16}}", "31"),
        (r"\boxed{\text{Even}}", "even"),
        (r"\boxed{\text{(A)}}", "A"),
        (r"\boxed{1, 2}", r"\{2, 1\}"),
        (r"\boxed{x = 1 \text{ or } x = 2}", "1, 2"),
        (r"\boxed{\pm 3}", "-3, 3"),
        (r"\boxed{(1,2)}", r"x \in (1, 2)"),
        (r"\boxed{e^{i\pi}}", "-1"),
        (r"\boxed{i^2}", "-1"),
        (r"\boxed{1.414214}", r"\sqrt{2}"),
        (r"\boxed{√2/2}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{3×4}", "12"),
        (r"\boxed{\varnothing}", r"\emptyset"),
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{1{,}5}", "1.5"),
        ("So x = 5.", "5"),
        (r"It follows that $x^2 = y$, so $\frac{10}{4}$ it is.", "5/2"),
    ],
)
def test_what_means_the_same_is_paid_in_the_form_that_was_asked_for(completion, answer):
    assert math_equivalence(completion, answer) == 1.0


X, Y = sympy.symbols("x y")
LEAVES = st.one_of(
    st.integers(-9, 9).map(sympy.Integer),
    st.builds(sympy.Rational, st.integers(-9, 9), st.integers(2, 9)),
    st.sampled_from([X, Y, sympy.pi, sympy.sqrt(2), sympy.sqrt(3)]),
)
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(sympy.Add, inner, inner),
        st.builds(sympy.Mul, inner, inner),
        st.builds(lambda base, power: base**power, inner, st.integers(1, 3)),
    ),
    max_leaves=5,
)
REWRITE = (sympy.expand, sympy.factor, sympy.together, lambda e: e, lambda e: sympy.collect(sympy.expand(e), X))


def _agrees_with_sympy(first, rewrite, change):
    """A formula and the same one rewritten, or another: what is paid is what SymPy's simplify calls equal."""
    second = rewrite(first + change)
    texts = [sympy.latex(first), sympy.latex(second)]
    if not all(is_bounded(text) for text in texts):
        return
    expected = sympy.simplify(first - second) == 0
    assert math_equivalence(f"\\boxed{{{texts[0]}}}", texts[1]) == float(expected), texts


DRAWN = (FORMULAS, st.sampled_from(REWRITE), st.one_of(st.just(sympy.Integer(0)), LEAVES))


@settings(max_examples=40, deadline=None)
@given(*DRAWN)
def test_formulas_are_equal_where_sympy_says_so(first, rewrite, change):
    _agrees_with_sympy(first, rewrite, change)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None)
@given(*DRAWN)
def test_a_thousand_pairs_of_formulas_are_equal_where_sympy_says_so(first, rewrite, change):
    _agrees_with_sympy(first, rewrite, change)
