"""Surrogates and ratios: their gradients, by hand."""

import math

import pytest
import torch

from llm_pg.estimators.critics import value_loss
from llm_pg.estimators.masked import masked_mean, masked_sum
from llm_pg.estimators.ratios import importance_ratio
from llm_pg.estimators.surrogates import cispo, clipped, reinforce

F64 = torch.float64
ONES = torch.ones(1, 3, dtype=torch.bool)


def slope(ratio: float, weight: float, **settings: float) -> float:
    """d(surrogate)/d(ratio) at one token."""
    r = torch.tensor([[ratio]], dtype=F64, requires_grad=True)
    clipped(r, torch.tensor([[weight]], dtype=F64), settings.pop("epsilon", 0.2), **settings).sum().backward()
    assert r.grad is not None
    return float(r.grad)


@pytest.mark.parametrize(
    ("ratio", "weight", "expected"),
    [(1.0, 2.0, -2.0), (1.3, 2.0, 0.0), (0.7, 2.0, -2.0), (1.3, -2.0, 2.0), (0.7, -2.0, 0.0)],
)
def test_clipping_stops_only_what_would_go_further(ratio: float, weight: float, expected: float) -> None:
    """A token that already gained may gain no more; one that lost may always come back."""
    assert slope(ratio, weight) == expected


def test_a_wider_upper_bound_lets_rare_tokens_rise() -> None:
    assert slope(1.25, 1.0, epsilon=0.2) == 0.0
    assert slope(1.25, 1.0, epsilon=0.2, epsilon_high=0.28) == -1.0


def test_two_sided_clipping_bounds_the_push_on_a_token_that_fell_out_of_favour() -> None:
    assert slope(5.0, -1.0) == 1.0
    assert slope(5.0, -1.0, delta=2.0) == 0.0


def test_at_ratio_one_all_surrogates_have_the_gradient_of_reinforce() -> None:
    logp = torch.tensor([[-1.0, -2.0, -0.5]], dtype=F64, requires_grad=True)
    weight = torch.tensor([[0.5, -2.0, 1.0]], dtype=F64)
    for level in ("token", "sequence", "sequence_sum"):
        ratio = importance_ratio(logp, logp.detach(), ONES, level)
        for loss in (clipped(ratio, weight, 0.2), cispo(ratio, logp, weight, 5.0), reinforce(logp, weight)):
            (gradient,) = torch.autograd.grad(loss.sum(), logp, retain_graph=True)
            assert torch.allclose(gradient, -weight, atol=1e-14)


def test_cispo_keeps_a_bounded_gradient_where_clipping_has_none() -> None:
    old = torch.tensor([[-3.0]], dtype=F64)
    logp = torch.tensor([[-1.0]], dtype=F64, requires_grad=True)
    ratio = importance_ratio(logp, old, ONES[:, :1], "token")
    (gradient,) = torch.autograd.grad(cispo(ratio, logp, torch.ones(1, 1, dtype=F64), 2.0).sum(), logp)
    assert float(gradient) == -2.0
    assert float(ratio.detach()) == pytest.approx(math.exp(2.0))


def test_ratios_of_a_row_are_its_product_or_its_geometric_mean() -> None:
    logp, old = torch.tensor([[-1.0, -2.0, 50.0]], dtype=F64), torch.tensor([[-1.5, -1.9, 0.0]], dtype=F64)
    mask = torch.tensor([[True, True, False]])
    product = importance_ratio(logp, old, mask, "sequence_sum")
    assert product[0, :2].tolist() == pytest.approx([math.exp(0.4)] * 2)
    assert importance_ratio(logp, old, mask, "sequence")[0, :2].tolist() == pytest.approx([math.exp(0.2)] * 2)
    assert importance_ratio(logp, old, mask, "token")[0, :2].tolist() == pytest.approx([math.exp(0.5), math.exp(-0.1)])


def test_the_gradient_of_a_rows_ratio_reaches_each_of_its_tokens() -> None:
    """Summed over tokens with weight 1, the product's gradient is that of exp(Σ log ratio) itself."""
    logp = torch.tensor([[-1.0, -2.0, -0.3]], dtype=F64, requires_grad=True)
    old = torch.tensor([[-1.4, -1.9, -0.5]], dtype=F64)
    (by_token,) = torch.autograd.grad(importance_ratio(logp, old, ONES, "sequence_sum").sum(), logp)
    (direct,) = torch.autograd.grad((logp - old).sum().exp(), logp)
    assert torch.allclose(by_token, direct, atol=1e-14)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown importance_sampling_level 'row'"):
        importance_ratio(torch.zeros(1, 3), torch.zeros(1, 3), ONES, "row")


def test_the_value_loss_is_a_half_square_and_clipping_it_never_makes_it_smaller() -> None:
    value, target = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert value_loss(value, target).item() == 2.0
    assert value_loss(value, target, torch.tensor([[0.5]]), clip=0.2).item() == 2.0
    assert value_loss(value, target, torch.tensor([[4.0]]), clip=0.2).item() == pytest.approx(0.5 * 2.8**2)
    risen = value_loss(torch.tensor([[2.9]]), torch.tensor([[3.0]]), torch.tensor([[1.0]]), clip=0.2)
    assert risen.item() == pytest.approx(0.5 * 1.8**2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_stands_outside_the_mask_reaches_neither_sum_nor_gradient(poison: float) -> None:
    x = torch.tensor([[1.0, 2.0, poison]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    total = masked_sum(x, mask)
    total.backward()
    assert total.item() == 3.0
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0]]
    assert masked_mean(x.detach(), mask).item() == 1.5
    assert masked_mean(x.detach(), torch.tensor([[False, True, False]])).item() == 2.0
    assert masked_mean(x.detach(), torch.zeros_like(mask)).item() == 0.0
