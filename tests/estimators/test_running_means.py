"""A running mean for each role, against plain Python and by enumeration."""

from __future__ import annotations

import json

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import RunningMeans
from llm_pg.prove.measure import compare, expect_in, target
from llm_pg.prove.worlds import WorldSpec, build
from llm_pg.rollouts import Rollouts

BATCHES = [
    (["x", "y", "x", "y"], [1.0, 0.0, 3.0, 4.0], [True, True, True, True]),
    (["x", "x", "x", "z"], [2.0, 7.0, 6.0, 5.0], [True, False, True, True]),
    (["z", "y", "y", "x"], [1.0, 1.0, 2.0, 9.0], [True, True, True, False]),
]


def by_hand(decay: float) -> list[list[float]]:
    """The baseline of each rollout: the averages of its role's earlier batches, corrected for their start."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    found = []
    for roles, returns, valid in BATCHES:
        found.append([sums[r] / weights[r] if weights.get(r) else 0.0 for r in roles])
        for role in set(roles):
            of = [x for r, x, v in zip(roles, returns, valid, strict=True) if r == role and v]
            if of:
                sums[role] = decay * sums.get(role, 0.0) + (1 - decay) * sum(of) / len(of)
                weights[role] = decay * weights.get(role, 0.0) + (1 - decay)
    return found


def tensors(batch: tuple[list[str], list[float], list[bool]]) -> tuple[torch.Tensor, ...]:
    roles, returns, valid = batch
    return torch.tensor(returns), torch.tensor([RunningMeans.role_of(r) for r in roles]), torch.tensor(valid)


def test_each_role_has_the_mean_of_its_own_earlier_batches() -> None:
    means = RunningMeans(0.9)
    for batch, expected in zip(BATCHES, by_hand(0.9), strict=True):
        return_B, role_B, valid_B = tensors(batch)
        assert means.value_B(role_B).tolist() == pytest.approx(expected)
        means.update(return_B, role_B, valid_B)


def test_ranks_that_hold_different_roles_agree_on_the_means() -> None:
    whole, ranks = RunningMeans(0.5), [RunningMeans(0.5), RunningMeans(0.5)]
    parts = (slice(0, 1), slice(1, 4))
    for batch in BATCHES:
        return_B, role_B, valid_B = tensors(batch)
        whole.update(return_B, role_B, valid_B)
        brought: list[torch.Tensor] = []

        def bring(x: torch.Tensor, to: list[torch.Tensor] = brought) -> torch.Tensor:
            to.append(x)
            return x

        for part in parts:
            RunningMeans(0.5).update(return_B[part], role_B[part], valid_B[part], bring)
        both = brought[0] + brought[1]
        for rank, part in zip(ranks, parts, strict=True):
            rank.update(return_B[part], role_B[part], valid_B[part], lambda _, both=both: both)  # type: ignore[misc]
    for rank in ranks:
        assert rank.state_dict() == whole.state_dict()


def rollouts_of(batch: tuple[list[str], list[float], list[bool]]) -> Rollouts:
    return_B, role_B, valid_B = tensors(batch)
    rollouts: Rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(4, 2), logp_BT=-torch.ones(4, 2), group_B=torch.arange(4), reward_B=return_B, valid_B=valid_B
    )
    rollouts.role_B = role_B
    return rollouts


def test_rae_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    algorithm = Algorithm("rae", baseline_column="role")
    for place, (batch, expected) in enumerate(zip(BATCHES, by_hand(0.95), strict=True)):
        if place == 2:
            state = json.loads(json.dumps(algorithm.state_dict()))
            algorithm = Algorithm("rae", baseline_column="role")
            algorithm.load_state_dict(state)
        found = algorithm.compute_advantages(rollouts_of(batch)).advantage_BT[:, 0].tolist()
        wanted = [(r - b) * v for r, b, v in zip(batch[1], expected, batch[2], strict=True)]
        assert found == pytest.approx(wanted, abs=1e-6)


def test_rollouts_without_roles_are_refused() -> None:
    rollouts = rollouts_of(BATCHES[0])
    rollouts.role_B = None
    with pytest.raises(ValueError, match=r"baseline_column is 'role'.*role_B"):
        Algorithm("rae", baseline_column="role").compute_advantages(rollouts)


def test_a_column_without_a_running_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"baseline_column 'role'.*the baseline is leave_one_out"):
        Algorithm("rloo", baseline_column="role")


def takes_its_own_in_first(rollouts: Rollouts) -> torch.Tensor:
    """The role's mean before the batch is 0.4, and the batch goes into it before it is subtracted, as in SPIRAL."""
    return_B = rollouts.reward_BT.sum(1)
    assert rollouts.role_B is not None
    same = (rollouts.role_B.unsqueeze(0) == rollouts.role_B.unsqueeze(1)).to(return_B.dtype)
    return return_B - (0.75 * 0.4 + 0.25 * same @ return_B / same.sum(1))


def test_a_mean_that_takes_its_own_rollouts_in_first_shrinks_the_gradient() -> None:
    spec, world = ALGORITHMS["rae"], build(WorldSpec(horizon=2, num_generations=3, prompts_per_step=2))
    found = compare(expect_in(world, Algorithm(spec, 2, advantage=takes_its_own_in_first)), target(spec, world))
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.scale == pytest.approx(1 - 0.25 / 3, rel=1e-10)
