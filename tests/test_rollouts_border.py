"""What rollouts may not be."""

import pytest
import torch

from llm_pg.rollouts import Rollouts


def fields(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(2, 3)
    return {
        "mask_BT": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "logp_BT": zeros - 1,
        "group_B": torch.tensor([0, 0]),
        "reward_BT": zeros,
        "discount_BT": zeros,
        "cut_BT": zeros.bool(),
        "valid_B": torch.ones(2),
        "truncated_B": zeros[:, 0].bool(),
        **changes,
    }


def test_a_number_that_is_not_finite_is_named_with_its_place() -> None:
    bad = torch.zeros(2, 3)
    bad[1, 2] = float("inf")
    with pytest.raises(ValueError, match="reward_BT holds inf at row 1, step 2"):
        Rollouts(**fields(reward_BT=bad))


def test_outside_the_mask_anything_may_stand() -> None:
    junk = torch.zeros(2, 3)
    junk[0, 2] = float("nan")
    assert Rollouts(**fields(logp_BT=junk)).length_B.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logp_BT", torch.zeros(2, 4), "logp_BT has shape"),
        ("group_B", torch.tensor([0, 0, 1]), "group_B has shape"),
        ("group_B", torch.tensor([0, -1]), "negative"),
        ("mask_BT", torch.zeros(0, 3), "at least one row"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, value: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rollouts(**fields(**{name: value}))


def test_rows_are_taken_in_the_order_asked_for() -> None:
    rollouts = Rollouts(**fields(reward_BT=torch.arange(6.0).reshape(2, 3)))
    turned = rollouts.rows(torch.tensor([1, 0, 1]))
    assert turned.reward_BT[:, 0].tolist() == [3.0, 0.0, 3.0]
    assert turned.length_B.tolist() == [3, 2, 3]
    assert rollouts.length_B.tolist() == [2, 3]
