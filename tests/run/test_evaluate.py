"""Pass rates and their intervals."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_pg.cli import main
from llm_pg.evaluate import bootstrap, evaluate, pass_at_k, summarise, wilson


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


@pytest.mark.parametrize("n", [1, 5, 20, 256])
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_prompts_without_any_spread_have_an_interval_all_the_same(n: int, share: float) -> None:
    """Wilson's bounds are the p whose own deviation puts the share seen 1.96 deviations away."""
    interval = bootstrap([share] * n)
    assert interval.mean == share
    for bound in (interval.low, interval.high):
        if bound != share:
            assert abs(bound - share) == pytest.approx(1.959964 * (bound * (1 - bound) / n) ** 0.5)
    assert interval.high - interval.low > 0.5 / n
    assert (interval.low == 0.0) == (share == 0.0)
    assert (interval.high == 1.0) == (share == 1.0)


def test_the_score_interval_of_an_all_pass_sample_covers_the_exact_one() -> None:
    """Clopper and Pearson: 20 of 20 are seen with chance 2.5 % where p = 0.025^(1/20)."""
    assert wilson(1.0, 20).low == pytest.approx(0.025 ** (1 / 20), abs=0.01)


def test_sampled_pass_at_1_is_the_mean_and_pass_at_k_grows() -> None:
    sampled = [[True, False, False, False], [False] * 4, [True] * 4]
    result = summarise([True, False, True], sampled, [3, 4, 5], unscorable=0)
    assert result.sampled is not None
    assert result.sampled.mean == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert result.pass_at[2].mean == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert result.pass_at[4].mean == pytest.approx(2 / 3)
    assert result.mean_length == 4


@pytest.mark.faults
def test_a_dense_reward_has_a_mean_beside_a_pass_rate_of_zero_and_the_threshold_is_explained() -> None:
    """-|20 - length| never reaches the threshold 1; its mean is told, and that the pass rate says nothing."""
    lengths = [5, 10, 20, 25]
    answers = [("x" * n, [1] * n) for n in lengths]
    prompts = [SimpleNamespace(text="p", messages=None) for _ in lengths]

    def scores(some: Any, texts: Any, ids: Any) -> Any:
        dense = [-abs(20.0 - len(text)) for text in texts]
        return dense, [2 * value for value in dense]

    result = evaluate(prompts, lambda *_: answers, scores, num_samples=0, threshold=1.0)
    assert result.greedy.mean == 0.0
    assert result.reward is not None
    assert result.reward.mean == 2 * -(15 + 10 + 0 + 5) / 4
    assert -30 <= result.reward.low < result.reward.mean < result.reward.high <= 0
    assert result.metrics()["eval/reward"] == -15.0
    assert result.metrics()["eval/highest_score"] == 0.0
    assert "pass_threshold 1 (the highest score is 0)" in result.unreached()
    reached = evaluate(prompts, lambda *_: answers, scores, num_samples=0, threshold=-5.0)
    assert (reached.greedy.mean, reached.unreached()) == (0.5, "")


def test_a_verdict_of_right_or_wrong_that_is_never_right_is_a_pass_rate_of_zero_as_it_seems() -> None:
    prompts, answers = [SimpleNamespace(text="p", messages=None)] * 3, [("x", [1])] * 3
    result = evaluate(prompts, lambda *_: answers, lambda *_: ([0.0] * 3, [0.0] * 3), num_samples=0, threshold=1.0)
    assert result.unreached() == ""
    assert result.reward == result.greedy


def test_the_eval_command_scores_every_row_of_a_file(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy answers of a model that was made to say one thing: it passes exactly the rows that want it."""
    model = make_model("llama")
    with torch.no_grad():  # all logits equal, whatever was read: greedy takes token 0, the pad, which reads as nothing
        model.lm_head.weight.zero_()
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert tokenizer.decode([0], skip_special_tokens=False) == "<pad>"
    rows = [{"prompt": "x=", "answer": answer} for answer in ("nothing", "a", "b", "nothing")]
    (tmp_path / "mine.py").write_text(
        "def says(completion, answer, **row):\n    return float((completion or 'nothing') == answer)\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--json"]
    settings = [
        f"reward_funcs=['{tmp_path}/mine.py:says']",
        "max_completion_length=3",
        "use_cpu=true",
        "eval_num_samples=0",
    ]
    assert main([*command, *settings]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["eval/greedy"] == result["eval/reward"] == 0.5
    assert result["eval/length"] == 3
