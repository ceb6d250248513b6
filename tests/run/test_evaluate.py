"""Pass rates and their intervals."""

from itertools import combinations

import pytest

from llm_pg.evaluate import bootstrap, pass_at_k, summarise


@pytest.mark.parametrize("n, c", [(5, 0), (5, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int, c: int) -> None:
    passes = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(combinations(passes, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(4, 2, 5)


def test_the_interval_covers_the_normal_one_for_many_prompts() -> None:
    values = [1.0] * 300 + [0.0] * 700
    interval = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.006)
    assert interval.high == pytest.approx(0.3 + half, abs=0.006)


def test_sampled_pass_at_1_is_the_mean_and_pass_at_k_grows() -> None:
    sampled = [[True, False, False, False], [False] * 4, [True] * 4]
    result = summarise([True, False, True], sampled, [3, 4, 5], unscorable=0)
    assert result.sampled is not None
    assert result.sampled.mean == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert result.pass_at[2].mean == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert result.pass_at[4].mean == pytest.approx(2 / 3)
    assert result.mean_length == 4
