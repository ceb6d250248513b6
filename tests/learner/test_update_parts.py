"""What an update counts, watches and leaves alone: its statistics over steps, its progress, its idle passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.distributed.strategy import Strategy
from llm_pg.estimators.noise import GradientNoise
from llm_pg.learner.update import SeenTokens, Updater, UpdateStats, update_metrics
from llm_pg.model.output import PolicyOutput
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts

# --- the numbers of several steps as those of one update


def test_steps_of_a_batch_are_averaged_and_sums_of_minibatches_stay_sums() -> None:
    """Two passes of two minibatches: an entropy is a sum over a pass, a balance loss a mean over steps."""
    values = [{"entropy": 1.0, "aux_loss": 2.0}, {"entropy": 3.0, "aux_loss": 4.0}, {"entropy": 5.0}, {}]
    steps = [UpdateStats(v, norm, norm != 3.0) for v, norm in zip(values, (1.0, 2.0, 3.0, 4.0), strict=True)]
    assert update_metrics(steps, 2) == {
        "skipped_updates": 1,
        "entropy": (1 + 3 + 5) / 4 * 2,
        "aux_loss": (2 + 4) / 4,
        "grad_norm": 2.5,
    }


def test_a_critics_norm_is_over_the_steps_that_have_one_and_halvings_are_added_up() -> None:
    steps = [UpdateStats({}, 1.0, True, splits=2, critic_grad_norm=3.0), UpdateStats({}, 1.0, True, splits=1)]
    found = update_metrics([*steps, UpdateStats({}, 1.0, True, critic_grad_norm=0.0)], 3)
    assert found == {"skipped_updates": 0, "grad_norm": 1.0, "critic_grad_norm": 1.5, "oom_splits": 3}


def test_signal_and_noise_are_those_of_the_step_that_measured_them() -> None:
    noise = GradientNoise(signal=2.0, noise=7.0, num_groups=4)
    found = update_metrics([UpdateStats({}, 1.0, True, noise=noise), UpdateStats({}, 1.0, True)], 1)
    assert (found["gradient_signal"], found["gradient_noise"]) == (2.0, 7.0)


def test_a_number_that_is_none_stays_none() -> None:
    found = update_metrics([UpdateStats({"loss": math.nan}, math.nan, False), UpdateStats({"loss": 1.0}, 1.0, True)], 1)
    assert math.isnan(found["loss"])
    assert math.isnan(found["grad_norm"])


# --- what passes saw of each token


def output(logp: list[list[float]], entropy: list[list[float]]) -> PolicyOutput:
    return PolicyOutput(torch.tensor(logp, requires_grad=True), torch.tensor(entropy, requires_grad=True))


def test_entropies_are_of_the_first_pass_ratios_of_the_last_and_unseen_tokens_have_neither() -> None:
    seen = SeenTokens(torch.zeros(3, 2, dtype=torch.float64))
    rows = torch.tensor([2, 0])
    seen.note(rows, output([[-1.0, -2.0], [-3.0, -4.0]], [[0.1, 0.2], [0.3, 0.4]]))
    seen.note(rows, output([[-1.5, -2.5], [-3.5, -4.5]], [[9.0, 9.0], [9.0, 9.0]]))
    found = seen.numbers(torch.tensor([[-3.0, -4.5], [0.0, 0.0], [-1.5, -2.0]]))
    assert not found["entropy"].requires_grad
    assert found["entropy"].dtype == found["ratio"].dtype == torch.float32
    assert found["entropy"][rows].tolist() == [[pytest.approx(0.1), pytest.approx(0.2)], pytest.approx([0.3, 0.4])]
    expected = [[1.0, math.exp(-0.5)], [math.exp(-0.5), 1.0]]
    assert [row.tolist() for row in found["ratio"][rows]] == [pytest.approx(row) for row in expected]
    assert found["entropy"][1].isnan().all()
    assert found["ratio"][1].isnan().all()


# --- steps


def updater_of(model: Any, strategy: Strategy | None = None, name: str = "grpo", **options: Any) -> Updater:
    policy, algorithm = Policy(model, params=SamplingParams(), pad_id=0), Algorithm(name, 7)
    trained = list(policy.parameters())
    if algorithm.spec.needs_critic:
        trained += policy.add_critic().trainable()
    optimizer = torch.optim.SGD(trained, lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    given = {"micro_rows": 2, "max_grad_norm": 0.0, **options}
    return Updater(policy, algorithm, optimizer, scheduler, strategy, **given)


def updated(updater: Updater, batch: TextRollouts, **options: Any) -> list[UpdateStats]:
    if updater.policy.critic is not None:
        batch = dataclasses.replace(batch, value_BT=torch.zeros_like(batch.logp_BT))
    order = torch.arange(len(batch.mask_BT)).expand(updater.num_iterations, -1)
    return updater.update(updater.algorithm.compute_advantages(batch), order, **options)


def gradient(updater: Updater) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in updater.policy.parameters() if p.grad is not None])


def silent_group(batch: TextRollouts, group: int) -> TextRollouts:
    equal_B1 = (batch.group_B == group).unsqueeze(1)
    return dataclasses.replace(batch, reward_BT=torch.where(equal_B1, (batch.reward_BT != 0).float(), batch.reward_BT))


def test_progress_is_told_the_rows_of_each_pass_without_those_that_teach_nothing(
    make_model: Callable[..., Any],
) -> None:
    updater, told = updater_of(make_model("llama"), num_iterations=2), []
    updater.progress = told.append
    stats = updated(updater, silent_group(rollouts(), 1))
    assert len(stats) == 2
    assert sum(told) == 2 * 4
    assert max(told) <= 2


def test_the_tokens_of_a_step_are_those_that_a_pass_came_by(make_model: Callable[..., Any]) -> None:
    batch = silent_group(rollouts(), 1)
    stats = updated(updater_of(make_model("llama")), batch)[0]
    assert stats.tokens == int(batch.mask_BT[batch.group_B != 1].sum())
    assert stats.splits == 0
    assert stats.critic_grad_norm is None


def test_the_schedule_moves_once_a_batch_and_not_while_the_critic_learns_alone(make_model: Callable[..., Any]) -> None:
    updater = updater_of(make_model("llama"), name="ppo", num_iterations=2, num_minibatches=3)
    updated(updater, rollouts(), critic_only=True)
    assert updater.scheduler.last_epoch == 0
    updated(updater, rollouts())
    assert updater.scheduler.last_epoch == 1


def test_gradients_are_clipped_to_one_and_a_batch_is_one_step_unless_it_is_asked_otherwise(
    make_model: Callable[..., Any],
) -> None:
    policy, algorithm, batch = Policy(make_model("llama"), params=SamplingParams(), pad_id=0), Algorithm(), rollouts()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    updater = Updater(policy, algorithm, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), micro_rows=6)
    before = [p.detach().clone() for p in policy.parameters()]
    batch.reward_BT = 1000 * batch.reward_BT
    (stats,) = updated(updater, batch)
    assert stats.grad_norm > 10
    moved = sum(float((p.detach() - b).square().sum()) for p, b in zip(policy.parameters(), before, strict=True))
    assert math.sqrt(moved) == pytest.approx(1.0, rel=1e-3)


def test_nothing_of_the_policy_moves_while_the_critic_learns_alone(make_model: Callable[..., Any]) -> None:
    updater = updater_of(make_model("llama"), name="ppo")
    stats = updated(updater, rollouts(), critic_only=True)[0]
    assert stats.grad_norm == 0.0
    assert stats.critic_grad_norm is not None
    assert stats.critic_grad_norm > 1e-3
    assert all(p.grad is None for p in updater.policy.parameters())
    updated(updater, rollouts())
    assert float(gradient(updater).norm()) > 1e-3


def test_log_probabilities_that_are_known_are_the_reference_points_of_the_ratios(
    make_model: Callable[..., Any],
) -> None:
    updater, batch = updater_of(make_model("llama"), num_iterations=2), rollouts()
    weighted = updater.algorithm.compute_advantages(batch)
    weighted.proximal_logp_BT = batch.logp_BT
    stats = updater.update(weighted, torch.arange(6).repeat(2, 1))
    assert weighted.proximal_logp_BT is batch.logp_BT
    assert stats[0].values["approx_kl"] > 0.1


def test_passes_are_made_in_training_mode(make_model: Callable[..., Any]) -> None:
    updater = updater_of(make_model("llama"), name="ppo")
    updater.policy.model.eval()
    updater.policy.critic.eval()  # type: ignore[union-attr]
    updated(updater, rollouts())
    assert updater.policy.model.training
    assert updater.policy.critic.training  # type: ignore[union-attr]


# --- noise


@pytest.mark.parametrize(
    "options, told, measured",
    [
        ({}, {}, True),
        ({}, {"measure_noise": False}, False),
        ({"num_minibatches": 2}, {}, False),
        ({"name": "ppo"}, {}, True),
        ({"name": "ppo"}, {"critic_only": True}, False),
        ({"strategy": Strategy("cpu", torch.amp.GradScaler("cpu"))}, {}, False),
    ],
    ids=["whole", "unasked", "in minibatches", "with a critic", "of the critic", "under a loss scaler"],
)
def test_noise_is_measured_in_the_first_pass_of_whole_batches_alone(
    options: dict[str, Any], told: dict[str, bool], measured: bool, make_model: Callable[..., Any]
) -> None:
    updater = updater_of(make_model("llama"), num_iterations=2, **options)
    stats = updated(updater, rollouts(), **{"measure_noise": True, **told})
    assert [step.noise is not None for step in stats] == [measured, *[False] * (len(stats) - 1)]


def test_a_weight_that_no_token_reaches_has_no_noise(make_model: Callable[..., Any]) -> None:
    found = []
    for unused in (False, True):
        model = make_model("llama")
        if unused:
            model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
        (stats,) = updated(updater_of(model), rollouts(), measure_noise=True)
        assert stats.noise is not None
        found.append((stats.noise.signal, stats.noise.noise))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_ranks_measure_no_noise(make_model: Callable[..., Any]) -> None:
    class TwoRanks(Strategy):
        num_ranks = 2

    updater = updater_of(make_model("llama"), TwoRanks("cpu"))
    assert updated(updater, rollouts(), measure_noise=True)[0].noise is None


def test_a_step_that_was_dropped_has_no_noise(make_model: Callable[..., Any]) -> None:
    updater = updater_of(make_model("llama"))
    weighted = updater.algorithm.compute_advantages(rollouts())
    weighted.advantage_BT[0, 0] = math.nan
    (stats,) = updater.update(weighted, torch.arange(6).unsqueeze(0), measure_noise=True)
    assert not stats.stepped
    assert stats.noise is None


def test_an_odd_number_of_groups_is_halved_with_the_larger_half_first(make_model: Callable[..., Any]) -> None:
    """Of three groups the first half is groups 0 and 2; the estimates take their numbers into account."""
    from llm_pg.estimators.noise import gradient_noise

    batch = rollouts(num_prompts=3, group=2)
    updater = updater_of(make_model("llama"), name="rloo")
    (stats,) = updated(updater, batch, measure_noise=True)
    whole = gradient(updater).double()
    part = updater_of(make_model("llama"), name="rloo")
    weighted = part.algorithm.compute_advantages(batch)
    index = (batch.group_B != 1).nonzero().squeeze(1)
    part.update(weighted.rows(index), torch.arange(4).unsqueeze(0))
    first = gradient(part).double()
    other = whole - first
    expected = gradient_noise([float(first @ first), float(other @ other)], float(whole @ whole), [2, 1])
    assert stats.noise is not None
    assert stats.noise.num_groups == 3
    assert stats.noise.signal == pytest.approx(expected.signal, rel=1e-3)
    assert stats.noise.noise == pytest.approx(expected.noise, rel=1e-3)


# --- passes that keep the pace of other ranks


class Paced(Strategy):
    """One of two ranks, of which the other makes `more` passes more; counts what it is asked."""

    def __init__(self, more: int = 0) -> None:
        super().__init__("cpu")
        self.more = more
        self.asked: list[int] = []
        self.losses: list[float] = []

    def idle_passes(self, passes: int) -> int:
        self.asked.append(passes)
        return self.more

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss.detach()))
        super().backward(loss)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_passes_without_weight_keep_the_pace_and_leave_the_gradient(more: int, make_model: Callable[..., Any]) -> None:
    """Each of the shortest completion alone, and of loss 0."""
    plain, paced = updater_of(make_model("llama")), updater_of(make_model("llama"), Paced(more))
    rows: list[int] = []
    forward = paced.policy.forward

    def counted(batch: TextRollouts, **options: Any) -> PolicyOutput:
        rows.append(len(batch.mask_BT))
        return forward(batch, **options)

    paced.policy.forward = counted  # type: ignore[method-assign]
    batch = rollouts()
    for updater in (plain, paced):
        updated(updater, batch)
    torch.testing.assert_close(gradient(paced), gradient(plain), rtol=1e-6, atol=1e-8)
    strategy: Any = paced.strategy
    passes = len(strategy.losses) - more
    assert strategy.asked == [passes]
    assert rows[passes:] == [1] * more
    assert strategy.losses[passes:] == [0.0] * more
    assert paced.policy.strategy is strategy


def test_idle_passes_of_a_critic_leave_the_policy_without_a_gradient_while_it_learns_alone(
    make_model: Callable[..., Any],
) -> None:
    plain, paced = (updater_of(make_model("llama"), strategy, name="ppo") for strategy in (None, Paced(2)))
    norms = [updated(updater, rollouts(), critic_only=True)[0].critic_grad_norm for updater in (plain, paced)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert all(p.grad is None for p in paced.policy.parameters())
    critic: Any = paced.policy.critic
    strategy: Any = paced.strategy
    assert strategy.losses[-2:] == [0.0, 0.0]
    assert all(p.grad is not None for p in critic.trainable())


@pytest.mark.parametrize("alive, expected", [(0, False), (1, True), (6, True)])
def test_a_strategy_is_told_whether_any_row_has_a_gradient(
    alive: int, expected: bool, make_model: Callable[..., Any]
) -> None:
    told: list[tuple[bool, bool]] = []

    class Told(Strategy):
        def step(self, own: Any, critic: Any, *, has_rows: bool, is_finite: bool, spoil: Any) -> Any:
            told.append((has_rows, is_finite))
            return super().step(own, critic, has_rows=has_rows, is_finite=is_finite, spoil=spoil)

    updater, batch = updater_of(make_model("llama"), Told("cpu"), name="reinforce"), rollouts()
    batch.reward_BT[alive:] = 0.0
    (stats,) = updated(updater, batch)
    assert told == [(expected, True)]
    assert stats.stepped
    assert (stats.grad_norm > 0) == expected


def test_a_step_that_others_decided_to_drop_has_a_gradient_that_is_no_number(make_model: Callable[..., Any]) -> None:
    class Spoiled(Strategy):
        def step(self, own: Iterable[Any], critic: Any, *, spoil: Callable[[], None], **given: Any) -> Any:
            spoil()
            return super().step(list(own), critic, spoil=spoil, **given)

    updater = updater_of(make_model("llama"), Spoiled("cpu"))
    before = [p.detach().clone() for p in updater.policy.parameters()]
    (stats,) = updated(updater, rollouts())
    assert not stats.stepped
    assert gradient(updater).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(before, updater.policy.parameters(), strict=True))


def test_ranks_that_hold_parts_do_not_halve_their_passes_alone(make_model: Callable[..., Any]) -> None:
    """The others wait for this one in the same pass: memory that ends is an error there."""

    class Sharded(Strategy):
        sharded = True

    updater = updater_of(make_model("llama"), Sharded("cpu"), micro_rows=6)

    def no_room(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    updater.policy.forward = no_room  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        updated(updater, rollouts())
