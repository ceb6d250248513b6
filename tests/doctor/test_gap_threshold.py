"""The gap between sampler and trainer at which the doctor speaks is where it turns the gradient: by enumeration."""

import statistics

import torch

from llm_pg.doctor.live import SAMPLER_GAP
from tests.algorithms.test_stale_bias import F64, REWARD_B, STATES, T, V, bias, logp


def gap_and_bias(noise: float, seed: int, draws: int) -> tuple[float, float]:
    """Of a random policy whose sampler has Gaussian noise on its logits, in `draws` equal parts of the batches another
    one: the mean distance of log-probabilities of sampled tokens, and that of the expected update from the gradient
    (relative; the advantage is the reward less its mean)."""
    g = torch.Generator().manual_seed(seed)
    present = torch.randn(len(STATES), V, generator=g, dtype=F64).requires_grad_()
    logp_BT = logp(present)
    advantage_B = REWARD_B - float((logp_BT.sum(1).exp() * REWARD_B).sum())
    (wanted,) = torch.autograd.grad((logp_BT.sum(1).exp() * advantage_B).sum(), present, retain_graph=True)
    found, gaps = torch.zeros_like(wanted), []
    for _ in range(draws):
        sampled_BT = logp(present.detach() + noise * torch.randn(present.shape, generator=g, dtype=F64))
        share_B = sampled_BT.sum(1).exp()
        gaps.append(float((share_B.unsqueeze(1) * (sampled_BT - logp_BT.detach()).abs()).sum() / T))
        score = (share_B * advantage_B * logp_BT.sum(1)).sum()
        found += torch.autograd.grad(score, present, retain_graph=True)[0] / draws
    return statistics.fmean(gaps), bias(found, wanted)


def middle(noise: float, draws: int) -> tuple[float, float]:
    gaps, biases = zip(*(gap_and_bias(noise, seed, draws) for seed in range(12)), strict=True)
    return statistics.median(gaps), statistics.median(biases)


def test_a_gap_that_stays_the_same_turns_the_gradient_by_a_tenth_where_the_doctor_warns() -> None:
    gap, share = middle(0.1, draws=1)
    assert 0.04 < gap < 0.06
    assert abs(gap - SAMPLER_GAP) < 0.01
    assert 0.07 < share < 0.13


def test_where_the_doctor_calls_it_a_problem_it_is_a_third() -> None:
    gap, share = middle(0.4, draws=1)
    assert abs(gap - 4 * SAMPLER_GAP) < 0.03
    assert 0.3 < share < 0.5


def test_the_same_gap_by_rounding_averages_out() -> None:
    _, share = middle(0.1, draws=30)
    assert share < 0.03
