"""The distribution that is sampled is the one that is trained: against transformers' own filters, and by sums."""

import math

import pytest
import torch

from llm_pg.estimators.distributions import (
    entropy,
    gaussian_entropy,
    gaussian_logp,
    kl_full,
    tanh_log_jacobian,
    token_logp,
    warp_logits,
)
from llm_pg.estimators.kl import k1, k2, k3


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.7, "min_p": 0.05},
    ],
)
def test_supports_and_probabilities_are_those_of_transformers(logits: torch.Tensor, settings: dict) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if "temperature" in settings:
        chain.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        chain.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(MinPLogitsWarper(settings["min_p"]))
    expected = chain(torch.zeros(64, 1, dtype=torch.long), logits.clone()).softmax(-1)
    assert torch.allclose(warp_logits(logits, **settings).softmax(-1), expected, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_k": 25}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.7, "min_p": 0.1}]
)
def test_every_row_is_cut_by_itself_whatever_axes_stand_before_the_vocabulary(
    logits: torch.Tensor, settings: dict
) -> None:
    """25 of 20 tokens are all of them."""
    tokens, ref = torch.arange(64) % 20, logits.roll(1, 0)
    batch, of_batch, ref_batch = logits.view(2, 32, 20), tokens.view(2, 32), ref.view(2, 32, 20)
    rows = torch.cat([warp_logits(row, keep=token, **settings) for row, token in zip(logits, tokens, strict=True)])
    warped = warp_logits(batch, keep=of_batch, **settings)
    assert torch.equal(warped.reshape(-1), rows)
    for whole, by_row in (
        (token_logp(warped, of_batch), [token_logp(row, t) for row, t in zip(rows.view(64, 20), tokens, strict=True)]),
        (entropy(warped), [entropy(row) for row in rows.view(64, 20)]),
        (kl_full(warped, ref_batch), [kl_full(row, r) for row, r in zip(rows.view(64, 20), ref, strict=True)]),
    ):
        assert torch.allclose(whole, torch.stack(by_row).view(2, 32), rtol=1e-14)


@pytest.mark.parametrize(
    "settings, logits, kept",
    [
        ({"top_k": 2, "top_p": 1.0}, [100.0, 0.0, -1.0], [True, True, False]),  # 1.0 cuts nothing, rounding or not
        ({"top_p": 0.5}, [0.0, 0.0], [True, False]),  # the first token's mass already reaches it
        ({"min_p": 0.5}, [0.0, math.log(0.5), math.log(0.49)], [True, True, False]),  # at least half of the largest
        ({"top_k": 3, "min_p": 0.5}, [0.0, -0.1, -2.0, -2.0, -9.0], [True, True, False, False, False]),
    ],
)
def test_supports_at_their_edges(settings: dict, logits: list[float], kept: list[bool]) -> None:
    warped = warp_logits(torch.tensor([logits], dtype=torch.float64), **settings)
    assert torch.isfinite(warped).tolist() == [kept]


def test_a_token_that_was_sampled_stays_in_the_support() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    kept = warp_logits(logits, top_k=2, keep=torch.tensor([3]))
    assert torch.isfinite(kept).tolist() == [[True, True, False, True]]
    assert torch.isfinite(token_logp(kept, torch.tensor([3]))).all()


def test_half_precision_logits_give_float32_log_probabilities() -> None:
    """A sum of bf16 log-probabilities is off in the third digit, and ratios with it."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = token_logp(warp_logits(logits), torch.tensor([1, 2, 3, 4]))
    assert found.dtype == torch.float32
    exact = logits.double().log_softmax(-1)[torch.arange(4), torch.tensor([1, 2, 3, 4])]
    assert torch.allclose(found.double(), exact, rtol=1e-6)


def test_entropy_is_minus_the_expected_log_probability_also_on_a_cut_support(logits: torch.Tensor) -> None:
    for warped in (logits, warp_logits(logits, top_k=3)):
        p = warped.softmax(-1)
        direct = -torch.where(p > 0, p * p.log(), torch.zeros_like(p)).sum(-1)
        assert torch.allclose(entropy(warped), direct, atol=1e-12)
    assert entropy(torch.zeros(1, 8, dtype=torch.float64)).item() == pytest.approx(torch.tensor(8.0).log().item())


def test_full_kl_is_the_mean_of_k1_and_of_k3_and_zero_against_itself(logits: torch.Tensor) -> None:
    ref = torch.randn(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
    for estimator in (k1, k3):
        assert torch.allclose((logp.exp() * estimator(logp, ref_logp)).sum(-1), kl_full(logits, ref), atol=1e-12)
    assert (kl_full(logits, ref) > 0).all()
    assert kl_full(logits, logits).abs().max() < 1e-14


def test_full_kl_of_a_cut_support_is_a_sum_over_what_is_left(logits: torch.Tensor) -> None:
    cut, ref = warp_logits(logits, top_k=3), logits.roll(1, 0)
    p, ref_logp = cut.softmax(-1), ref.log_softmax(-1)
    direct = torch.where(p > 0, p * (p.log() - ref_logp), torch.zeros_like(p)).sum(-1)
    assert torch.allclose(kl_full(cut, ref), direct, atol=1e-12)
    assert kl_full(cut, cut).abs().max() < 1e-14


def test_k1_is_positive_where_the_policy_gives_more_than_the_reference_and_k2_k3_never_negative() -> None:
    logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]])
    assert k1(logp, ref).tolist() == [[1.0, -1.0]]
    assert (k2(logp, ref) >= 0).all()
    assert (k3(logp, ref) >= 0).all()
    assert k3(logp, logp).tolist() == [[0.0, 0.0]]


def test_k3_near_zero_keeps_its_digits_in_float32() -> None:
    """exp(-k) - 1 + k by subtraction has none left at k = 1e-4; expm1 keeps them."""
    k = torch.tensor([[1e-3]])
    assert float(k3(k, torch.zeros(1, 1))) == pytest.approx(0.5e-6 - 1e-9 / 6, rel=2e-4)


def test_gaussian_densities_and_entropies_are_those_of_torch() -> None:
    g = torch.Generator().manual_seed(3)
    x, mean, log_std = (torch.randn(2, 5, 4, dtype=torch.float64, generator=g) for _ in range(3))
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(gaussian_logp(x, mean, log_std), normal.log_prob(x).sum(-1), rtol=1e-13)
    assert torch.allclose(gaussian_entropy(log_std), normal.entropy().sum(-1), rtol=1e-13)


def test_the_jacobian_of_tanh_is_its_derivative_and_does_not_overflow() -> None:
    x = torch.linspace(-3, 3, 40, dtype=torch.float64).view(2, 5, 4)
    assert torch.allclose(tanh_log_jacobian(x), (1 - x.tanh().square()).log().sum(-1), rtol=1e-10)
    far = torch.tensor([[400.0], [-400.0]])
    assert tanh_log_jacobian(far).tolist() == pytest.approx([2 * math.log(2) - 800] * 2)
