"""No cut of a batch changes its gradient: order, micro-batches, padding, ranks, rows that teach nothing."""

import dataclasses

import pytest
import torch
from algorithm_batches import LIMIT, close, make, on_two_ranks, rows_of_the_table, weighed
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.estimators.baselines import AllSum
from llm_pg.rollouts import Rollouts

ROWS = rows_of_the_table()
DTYPES = (torch.float64, torch.float32)
BATCHES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "prompts": st.integers(1, 3),
        "generations": st.integers(2, 4),
        "dtype": st.sampled_from(DTYPES),
        "reused": st.booleans(),
        "unscored": st.booleans(),
    }
)


def algorithm(name: str) -> Algorithm:
    return Algorithm(ROWS[name], max_completion_length=LIMIT)


def whole(name: str, case: dict) -> tuple:
    rollouts, model = make(**case)
    batch = weighed(algorithm(name), rollouts, case["reused"])
    return rollouts, model, batch, *model.gradient(algorithm(name), batch)


@pytest.mark.parametrize("name", sorted(ROWS))
@given(case=BATCHES, data=st.data())
@settings(max_examples=12, deadline=None)
def test_micro_batches_of_any_size_in_any_order_add_up_to_the_batch(name: str, case: dict, data: st.DataObject) -> None:
    num = case["prompts"] * case["generations"]
    order = data.draw(st.permutations(range(num)))
    check_micro_batches(name, case, order, data.draw(st.integers(1, num)))


def check_micro_batches(name: str, case: dict, order: list[int], size: int) -> None:
    _, model, batch, gradient, stats = whole(name, case)
    parts = [model.rows(rows).gradient(algorithm(name), batch.rows(rows)) for rows in torch.tensor(order).split(size)]
    assert close(torch.stack([g for g, _ in parts]).sum(0), gradient, case["dtype"])
    for key, value in stats.items():
        assert close(torch.stack([s[key] for _, s in parts]).sum(), value, case["dtype"], unit=1.0), key


@pytest.mark.parametrize("name", sorted(ROWS))
@given(case=BATCHES, data=st.data())
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_rows_changes_no_weight(name: str, case: dict, data: st.DataObject) -> None:
    rollouts, _, batch, _, _ = whole(name, case)
    order = torch.tensor(data.draw(st.permutations(range(len(rollouts.group_B)))))
    turned = weighed(algorithm(name), rollouts.rows(order), case["reused"])
    assert close(turned.advantage_BT, batch.advantage_BT[order], case["dtype"])
    assert close(turned.loss_scale_BT, batch.loss_scale_BT[order], case["dtype"])


def padded(rollouts: Rollouts, columns: int, junk: float) -> Rollouts:
    """The same rollouts with more columns; what a trainer leaves there is arbitrary, rewards and discounts are 0."""
    extra = {}
    for name in rollouts.__dataclass_fields__:
        value = getattr(rollouts, name)
        if not name.endswith("_BT") or value is None:
            continue
        fill = junk if name.endswith("logp_BT") else {"value_BT": -30.0, "bootstrap_BT": 7.0}.get(name, 0)
        extra[name] = torch.nn.functional.pad(value, (0, columns), value=fill)
    return Rollouts(
        **{n: extra.get(n, getattr(rollouts, n)) for n in rollouts.__dataclass_fields__}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", sorted(ROWS))
@given(case=BATCHES, columns=st.integers(1, 5), junk=st.sampled_from([0.0, -30.0, float("nan")]))
@settings(max_examples=10, deadline=None)
def test_padding_changes_nothing_whatever_stands_in_it(name: str, case: dict, columns: int, junk: float) -> None:
    check_padding(name, case, columns, junk)


def check_padding(name: str, case: dict, columns: int, junk: float) -> None:
    rollouts, model, _, gradient, stats = whole(name, case)
    longer = padded(rollouts, columns, junk)
    for field in ("logp_BTK", "entropy_BTK", "value_BTK"):
        setattr(model, field, torch.nn.functional.pad(getattr(model, field), (0, 0, 0, columns)))
    found, found_stats = model.gradient(algorithm(name), weighed(algorithm(name), longer, case["reused"]))
    assert close(found, gradient, case["dtype"])
    for key, value in stats.items():
        assert close(found_stats[key], value, case["dtype"], unit=1.0), key


@pytest.mark.parametrize("name", sorted(ROWS))
@given(case=BATCHES)
@settings(max_examples=12, deadline=None)
def test_rows_that_cannot_contribute_may_be_dropped(name: str, case: dict) -> None:
    _, model, batch, gradient, _ = whole(name, case)
    kept = algorithm(name).contributes_B(batch).nonzero().squeeze(1)
    found = model.rows(kept).gradient(algorithm(name), batch.rows(kept))[0] if len(kept) else gradient * 0
    assert close(found, gradient, case["dtype"])


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "rloo", "cispo", "dr_grpo"])
def test_a_group_of_equal_rewards_is_dropped_and_its_neighbour_is_not(name: str) -> None:
    rollouts = Rollouts.of_scored_text(
        mask_BT=torch.ones(6, 4),
        logp_BT=torch.full((6, 4), -1.0),
        group_B=torch.tensor([0, 0, 0, 1, 1, 1]),
        reward_B=torch.tensor([1.0, 0.0, 1.0, 0.7, 0.7, 0.7]),
    )
    kept_B = algorithm(name).contributes_B(algorithm(name).compute_advantages(rollouts))
    assert kept_B.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("name", sorted(ROWS))
@given(seed=st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_two_ranks_with_whole_groups_add_up_to_one(name: str, seed: int) -> None:
    check_two_ranks(name, seed)


def check_two_ranks(name: str, seed: int) -> None:
    rollouts, model = make(seed, prompts=3)
    batch = algorithm(name).compute_advantages(rollouts)
    expected, _ = model.gradient(algorithm(name), batch)
    shards = [(rollouts.group_B == 0).nonzero().squeeze(1), (rollouts.group_B > 0).nonzero().squeeze(1)]

    def rank(i: int, all_sum: AllSum) -> torch.Tensor:
        mine = rollouts.rows(shards[i])
        mine.group_B = mine.group_B - mine.group_B.min()
        shard = algorithm(name).compute_advantages(mine, all_sum=all_sum)
        return model.rows(shards[i]).gradient(algorithm(name), shard)[0]

    parts = on_two_ranks(rank)
    assert close(parts[0] + parts[1], expected, torch.float64)


@pytest.mark.parametrize("name", ["a2c", "ppo", "reinforce"])
def test_steps_as_rows_of_their_own_add_up_to_the_batch(name: str) -> None:
    """Minibatches of steps, as classic control trains on, cut a batch inside its rows."""
    rollouts, model = make(1)
    batch = algorithm(name).compute_advantages(rollouts)
    expected, _ = model.gradient(algorithm(name), batch)
    steps = batch.steps()
    kept = batch.mask_BT.reshape(-1).nonzero().squeeze(1)
    flat = model.rows(torch.arange(len(rollouts.group_B)))
    for field in ("logp_BTK", "entropy_BTK", "value_BTK"):
        setattr(flat, field, getattr(model, field).flatten(0, 1)[kept].unsqueeze(1))
    parts = [
        flat.rows(rows).gradient(algorithm(name), steps.rows(rows))[0] for rows in torch.arange(len(kept)).split(4)
    ]
    assert close(torch.stack(parts).sum(0), expected, torch.float64)


@pytest.mark.parametrize("full", [False, True])
def test_each_step_inside_the_mask_is_a_row_with_its_own_numbers(full: bool) -> None:
    """Also where no row has an end inside the batch, so that nothing is left out."""
    rollouts, _ = make(1)
    if full:
        rollouts.mask_BT = torch.ones_like(rollouts.mask_BT)
    batch = dataclasses.replace(algorithm("a2c").compute_advantages(rollouts), entropy_coef=0.25)
    steps = batch.steps()
    inside = batch.mask_BT.reshape(-1)
    assert bool(inside.all()) == full
    assert (steps.entropy_coef, steps.num_tokens) == (0.25, batch.num_tokens)
    for name, value in batch.__dict__.items():
        if name.endswith("_BT") and value is not None:
            assert torch.equal(getattr(steps, name), value.reshape(-1)[inside].unsqueeze(1)), name
    assert torch.equal(steps.rollouts.reward_BT, rollouts.reward_BT.reshape(-1)[inside].unsqueeze(1))
