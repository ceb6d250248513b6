"""How much of the returns' variance a critic predicts, against the quotient of variances."""

import pytest
import torch

from llm_pg.estimators.critics import explained_variance, length_adaptive_lambda

F64 = torch.float64
RETURN = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 50.0]], dtype=F64)
VALUE = torch.tensor([[1.5, 2.0, 3.0], [1.0, 0.0, -7.0]], dtype=F64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_the_explained_share_does_not_depend_on_the_unit_of_the_rewards(scale: float) -> None:
    expected = 1 - float((RETURN - VALUE)[MASK].var(correction=0) / RETURN[MASK].var(correction=0))
    assert explained_variance(scale * VALUE, scale * RETURN, MASK) == pytest.approx(expected, rel=1e-9)


def test_returns_that_vary_in_their_sixth_digit_can_be_explained_and_equal_ones_cannot() -> None:
    return_BT = 1 + 3.2e-6 * torch.tensor([[1.0, -1.0] * 4], dtype=F64)
    mask_BT = torch.ones(1, 8, dtype=torch.bool)
    assert explained_variance(return_BT, return_BT, mask_BT) == 1.0
    for equal in (0.0, 1.0, 1e6):
        assert explained_variance(return_BT, torch.full((1, 8), equal), mask_BT) is None
    assert explained_variance(return_BT, return_BT, ~mask_BT) is None


def test_lambda_sums_its_weights_to_a_share_of_the_row_and_is_zero_on_rows_too_short_for_one_step() -> None:
    length_B = torch.tensor([40, 2000, 20, 19, 1, 0])
    lam_B = length_adaptive_lambda(length_B, 0.05)
    assert lam_B.dtype == F64
    assert (1 / (1 - lam_B[:2])).tolist() == pytest.approx([0.05 * 40, 0.05 * 2000])
    assert lam_B[2:].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert length_adaptive_lambda(length_B, 3.0)[3:].tolist() == pytest.approx([1 - 1 / 57, 2 / 3, 2 / 3])
