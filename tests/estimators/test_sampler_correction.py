"""What is done about data of another policy: the correction for the sampler, rows left behind, and the soft gate."""

import itertools
import math

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.estimators.masked import in_top_share
from llm_pg.estimators.ratios import has_left, sampler_correction
from llm_pg.estimators.surrogates import sapo
from llm_pg.rollouts import Rollouts

F64 = torch.float64
MASK = torch.tensor([[True, True, False], [True, True, True]])
SAMPLED = torch.tensor([[-1.0, -1.0, float("nan")], [-1.0, -1.0, -1.0]], dtype=F64)
OWN = SAMPLED + torch.tensor([[math.log(4.0), math.log(0.5), 9.0], [0.0, math.log(0.25), math.log(1.5)]], dtype=F64)


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 3.0, [3.0, 0.5, 1.0, 0.25, 1.5]),
        ("token_truncate", 0.4, 3.0, [3.0, 0.5, 1.0, 0.4, 1.5]),
        ("token_mask", 0.4, 3.0, [0.0, 0.5, 1.0, 0.0, 1.5]),
        ("token_mask", None, None, [4.0, 0.5, 1.0, 0.25, 1.5]),
        ("sequence_truncate", None, 1.5, [1.5, 1.5, 0.375, 0.375, 0.375]),
        ("sequence_mask", 0.4, 3.0, [2.0, 2.0, 0.0, 0.0, 0.0]),
        ("sequence_mask", None, 1.5, [0.0, 0.0, 0.375, 0.375, 0.375]),
    ],
)
def test_a_correction_is_the_bounded_ratio_of_the_token_or_of_the_completion(
    mode: str, low: float | None, high: float | None, expected: list[float]
) -> None:
    found, bounded = sampler_correction(OWN, SAMPLED, MASK, mode, low, high)
    assert found[MASK].tolist() == pytest.approx(expected)
    free = sampler_correction(OWN, SAMPLED, MASK, mode, None, None)[0]
    assert torch.equal(bounded[MASK], (found != free)[MASK])


def test_a_correction_carries_no_gradient() -> None:
    own = OWN.clone().requires_grad_()
    assert not sampler_correction(own, SAMPLED, MASK, "sequence_truncate", None, 3.0)[0].requires_grad


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask"])
def test_a_ratio_on_the_very_bound_is_kept(mode: str) -> None:
    ratio_BT, outside_BT = sampler_correction(
        torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), mode, 1.0, 1.0
    )
    assert ratio_BT.tolist() == [[1.0, 1.0]]
    assert not outside_BT.any()


@pytest.mark.parametrize("mode", ["token_drop", "row_mask", "token", "mask"])
def test_an_unknown_mode_of_correction_is_refused_with_those_that_there_are(mode: str) -> None:
    known = "token_truncate, token_mask, sequence_truncate, sequence_mask or sequence_binary_kl."
    with pytest.raises(ValueError, match=f"cannot be '{mode}'; it is {known}$"):
        sampler_correction(OWN, SAMPLED, MASK, mode, None, None)


def test_a_row_of_one_token_is_left_behind_above_the_threshold_and_not_on_it() -> None:
    own, sampled, mask = torch.tensor([[-1.5, 9.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[True, False]])
    assert has_left(own, sampled, mask, 0.49).tolist() == [[True]]
    assert has_left(own, sampled, mask, 0.5).tolist() == [[False]]


def test_a_row_is_left_behind_when_its_mean_log_probability_fell_by_more_than_the_threshold() -> None:
    """The means over the tokens inside the mask: -(log 4 + log ½)/2 and -(log ¼ + log 1.5)/3."""
    fell = [-(math.log(4.0) + math.log(0.5)) / 2, -(math.log(0.25) + math.log(1.5)) / 3]
    assert fell[0] < 0 < fell[1]
    for threshold, left in ((fell[1] - 1e-9, [False, True]), (fell[1] + 1e-9, [False, False]), (-1.0, [True, True])):
        assert has_left(OWN, SAMPLED, MASK, threshold).squeeze(1).tolist() == left


@pytest.mark.parametrize(("number", "share"), itertools.product((1, 2, 7, 50), (0.0, 0.2, 1 / 3, 0.5, 0.99, 1.0)))
def test_the_top_share_is_what_stands_at_or_above_the_quantile(number: int, share: float) -> None:
    generator = torch.Generator().manual_seed(number)
    x_BT = 3 * torch.rand(3, number, generator=generator, dtype=F64)
    mask_BT = torch.rand(3, number, generator=generator) < 0.7
    mask_BT[0, 0] = True
    level = torch.quantile(x_BT[mask_BT], 1 - share)
    assert torch.equal(in_top_share(x_BT, mask_BT, share), mask_BT & (x_BT >= level - 1e-12))


def test_equal_entries_are_in_or_out_together() -> None:
    """So that the rows' order does not matter."""
    x_BT = torch.tensor([[2.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
    inside = in_top_share(x_BT, torch.ones(2, 3, dtype=torch.bool), 0.2)
    assert inside.tolist() == [[True, True, False], [True, False, False]]


def test_an_empty_mask_has_no_top_share() -> None:
    assert not in_top_share(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5).any()


def gate(ratio: float, weight: float, pos: float = 1.0, neg: float = 1.05) -> float:
    """d(surrogate)/d(ratio)."""
    r = torch.tensor([[ratio]], dtype=F64, requires_grad=True)
    sapo(r, torch.tensor([[weight]], dtype=F64), pos, neg).sum().backward()
    assert r.grad is not None
    return float(r.grad)


@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 2.0), (1.0, -0.5), (1.7, 1.0), (0.2, -3.0)])
def test_the_soft_gate_is_the_plain_push_times_a_bell_around_ratio_one(ratio: float, weight: float) -> None:
    """4σ(1 - σ) = 1/cosh²(τ(r - 1)/2)."""
    tau = 2.0 if weight > 0 else 3.0
    bell = 1 / math.cosh(tau * (ratio - 1) / 2) ** 2
    assert gate(ratio, weight, 2.0, 3.0) == pytest.approx(-weight * bell)


def test_flash_reinforce_is_the_papers_loss_token_by_token() -> None:
    """-1/B Σᵢ 1/Tᵢ Σₜ [mean KL of i ≤ δ] (πₜ/μₜ) (Rᵢ - mean R) ∇log πₜ, written out in plain Python."""
    lengths, rewards, delta = [3, 1, 2, 3], [1.0, 0.0, 0.0, 1.0], 3e-3
    generator = torch.Generator().manual_seed(5)
    behavior_BT = -torch.rand(4, 3, generator=generator, dtype=torch.float64) - 0.2
    step_BT = torch.tensor([[0.03, -0.05, 0.02], [0.3, 0, 0], [0.04, 0.01, 0], [-0.4, 0.02, 0.01]])
    mask_BT = torch.arange(3) < torch.tensor(lengths).unsqueeze(1)
    logp_BT = (behavior_BT + step_BT).requires_grad_()
    rollouts = Rollouts.of_scored_text(
        mask_BT=mask_BT, logp_BT=behavior_BT, group_B=torch.arange(4), reward_B=torch.tensor(rewards).double()
    )
    algorithm = Algorithm("flash_reinforce")
    batch = algorithm.compute_advantages(rollouts)
    algorithm.loss(logp_BT, batch)[0].backward()
    kept = 0
    for i, length in enumerate(lengths):
        pairs = [(math.exp(logp_BT[i, t]), math.exp(behavior_BT[i, t])) for t in range(length)]
        kl = sum(q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) for p, q in pairs) / length
        advantage = rewards[i] - sum(rewards) / 4
        for t, (p, q) in enumerate(pairs):
            expected = -p / q * advantage / length / 4 if kl <= delta else 0.0
            kept += expected != 0
            assert float(logp_BT.grad[i, t]) == pytest.approx(expected, rel=1e-9)
    assert kept == 5  # the first and the third completion


def test_a_divergence_has_no_lower_bound() -> None:
    with pytest.raises(ValueError, match=r"clip_min is 0.5, and sequence_binary_kl bounds a divergence"):
        Algorithm("flash_reinforce", vllm_importance_sampling_clip_min=0.5)
