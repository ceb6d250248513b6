"""One update from one batch: the step it makes, what it reports, and what moves over the updates of a run."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_pg import Algorithm, Learner, Policy
from llm_pg.distributed.strategy import Strategy
from llm_pg.estimators.kl import k3
from llm_pg.learner.learner import ORDER_STREAM
from llm_pg.metrics import Clock
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key, uniform
from tests.model.test_policy import rollouts

RATE = 0.1


@pytest.fixture
def make(make_model: Callable[..., Any]) -> Callable[..., Learner]:
    """A learner that makes plain steps of gradient descent, of rate `RATE`."""

    def learner(algorithm: str = "reinforce", *, spec: dict[str, Any] | None = None, **changes: Any) -> Learner:
        policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0)
        chosen = Algorithm(algorithm, max_completion_length=7, **(spec or {}))
        trained = list(policy.parameters())
        if chosen.spec.needs_critic:
            trained += policy.add_critic().trainable()
        return Learner(policy, chosen, torch.optim.SGD(trained, lr=RATE), **{"max_grad_norm": 0.0, **changes})

    return learner


def scored(batch: TextRollouts) -> Any:
    return SimpleNamespace(rollouts=batch)


def weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True)))


def test_an_update_is_one_step_down_the_gradient_of_the_weighted_log_probabilities(
    make: Callable[..., Learner],
) -> None:
    """REINFORCE by hand: the mean over rows of reward times log-probability, its gradient by one backward pass."""
    learner, batch = make(), rollouts()
    before = weights(learner.policy)
    logp_BT = learner.policy.forward(batch).logp_BT
    objective = (batch.reward_BT.sum(1) * logp_BT.sum(1)).mean()
    gradient = torch.autograd.grad(objective, learner.policy.parameters())
    update = learner.update(scored(batch))
    for old, new, g in zip(before, weights(learner.policy), gradient, strict=True):
        torch.testing.assert_close(new, old + RATE * g, rtol=1e-4, atol=1e-7)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert update.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert update.metrics["policy_loss"] == pytest.approx(-float(objective.detach()), rel=1e-4)
    assert [step.stepped for step in update.steps] == [True]
    assert all(p.grad is None for p in learner.policy.parameters())
    assert (learner.step, learner.batch, learner.experience.rollouts) == (1, update.batch, batch)
    assert update.seen is learner.updater.seen


@pytest.mark.parametrize("changes", [{"micro_rows": 1}, {"micro_rows": 4}])
def test_the_gradient_is_the_same_in_pieces_of_any_size(changes: dict[str, int], make: Callable[..., Learner]) -> None:
    whole, cut = make("grpo"), make("grpo", **changes)
    for learner in (whole, cut):
        learner.update(scored(rollouts()))
    assert distance(weights(whole.policy), weights(cut.policy)) < 1e-6
    assert cut.updater.micro_rows == changes["micro_rows"]


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_limit_and_reported_as_they_were(
    limit: float, make: Callable[..., Learner]
) -> None:
    learner = make("grpo", max_grad_norm=limit)
    before = weights(learner.policy)
    norm = learner.update(scored(rollouts())).metrics["grad_norm"]
    assert norm > 0.02
    moved = distance(before, weights(learner.policy)) / RATE
    assert moved == pytest.approx(limit if limit == 0.01 else norm, rel=1e-3)


def test_gradients_are_clipped_to_one_unless_it_is_asked_otherwise(make_model: Callable[..., Any]) -> None:
    policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0)
    learner = Learner(policy, Algorithm("reinforce"), torch.optim.SGD(policy.parameters(), lr=RATE))
    before = weights(policy)
    batch = rollouts()
    batch.reward_BT = 1000 * batch.reward_BT
    assert learner.update(scored(batch)).metrics["grad_norm"] > 10
    assert distance(before, weights(policy)) == pytest.approx(RATE, rel=1e-3)


def test_the_rate_is_that_of_the_step_and_the_schedule_moves_once_an_update(make: Callable[..., Learner]) -> None:
    learner = make("grpo", num_minibatches=3, num_iterations=2)
    learner.scheduler = learner.updater.scheduler = torch.optim.lr_scheduler.LambdaLR(
        learner.optimizer, lambda step: 1 / (1 + step)
    )
    rates = [learner.update(scored(rollouts())).metrics["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([RATE, RATE / 2, RATE / 3])


def test_without_a_schedule_the_rate_is_constant(make: Callable[..., Learner]) -> None:
    learner = make()
    assert [learner.update(scored(rollouts())).metrics["learning_rate"] for _ in range(2)] == [RATE, RATE]


def test_each_pass_takes_every_row_once_in_an_order_of_its_own(make: Callable[..., Learner]) -> None:
    """A function of seed, update and pass."""

    def orders(**seed: int) -> list[list[list[int]]]:
        learner = make(num_iterations=2, num_minibatches=2, **seed)
        found, update = [], learner.updater.update

        def noted(batch: Any, order: torch.Tensor, **options: Any) -> Any:
            found.append(order.tolist())
            return update(batch, order, **options)

        learner.updater.update = noted  # type: ignore[method-assign]
        for _ in range(2):
            learner.update(scored(rollouts()))
        return found

    found = orders(seed=0)
    rows = [tuple(order) for step in (*found, *orders(seed=1)) for order in step]
    assert len(set(rows)) == 8
    assert all(sorted(order) == list(range(6)) for order in rows)
    assert orders(seed=0) == found
    keys = [stream_key(0, ORDER_STREAM, 2, number) for number in (0, 1)]  # of the second update
    assert found[1] == [uniform(key, torch.arange(6)).argsort().tolist() for key in keys]
    assert orders() == found


def test_a_batch_of_any_number_of_rows_is_one_pass_unless_it_is_asked_otherwise(
    make_model: Callable[..., Any],
) -> None:
    policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0, packing="padded")
    learner = Learner(policy, Algorithm("reinforce"), torch.optim.SGD(policy.parameters(), lr=RATE))
    passes: list[int] = []
    learner.updater.progress = passes.append
    learner.update(scored(rollouts(num_prompts=3, group=40)))
    assert passes == [120]


@pytest.mark.parametrize("iterations, minibatches", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_batch_makes_a_step_for_each_minibatch_of_each_pass(
    iterations: int, minibatches: int, make: Callable[..., Learner]
) -> None:
    """The log-probabilities from before the first step are the denominators of all ratios."""
    learner, batch = make("grpo", num_iterations=iterations, num_minibatches=minibatches), rollouts()
    with torch.no_grad():
        before_BT = learner.policy.forward(batch).logp_BT
    update = learner.update(scored(batch))
    assert len(update.steps) == iterations * minibatches
    assert learner.updater.reuses == (iterations * minibatches > 1)
    if learner.updater.reuses:
        torch.testing.assert_close(update.batch.proximal_logp_BT, before_BT, atol=1e-5, rtol=1e-5)
        assert update.metrics["approx_kl"] > 0
    else:
        assert update.batch.proximal_logp_BT is None
        assert update.metrics["approx_kl"] == 0


def test_coefficients_move_over_the_updates_of_the_run_and_stay_where_its_length_is_unknown(
    make: Callable[..., Learner],
) -> None:
    spec = {"entropy_coef": 0.4, "entropy_coef_final": 0.0}
    moving, staying = make(spec=spec, num_steps=4), make(spec=spec)
    for learner, expected in ((moving, [0.4, 0.3, 0.2]), (staying, [0.4, 0.4, 0.4])):
        found = [learner.update(scored(rollouts())).metrics["entropy_coef"] for _ in range(3)]
        assert found == pytest.approx(expected)


def test_an_entropy_bonus_is_a_mean_over_tokens_in_the_gradient(make: Callable[..., Learner]) -> None:
    learner, batch = make(spec={"entropy_coef": 0.5}), rollouts()
    before = weights(learner.policy)
    seen = learner.policy.forward(batch, entropy_grad=True)
    objective = (batch.reward_BT.sum(1) * seen.logp_BT.sum(1)).mean()
    objective = objective + 0.5 * seen.entropy_BT[batch.mask_BT].mean()
    gradient = torch.autograd.grad(objective, learner.policy.parameters())
    metrics = learner.update(scored(batch)).metrics
    for old, new, g in zip(before, weights(learner.policy), gradient, strict=True):
        torch.testing.assert_close(new, old + RATE * g, rtol=1e-4, atol=1e-7)
    assert metrics["entropy"] == pytest.approx(seen.entropy_BT[batch.mask_BT].mean().item(), rel=1e-5)


def test_noise_is_measured_at_every_so_many_updates(make: Callable[..., Learner]) -> None:
    learner = make(noise_steps=2)
    measured = ["gradient_noise" in learner.update(scored(rollouts())).metrics for _ in range(4)]
    assert measured == [False, True, False, True]
    never = make()
    assert not any("gradient_noise" in never.update(scored(rollouts())).metrics for _ in range(2))


def test_a_penalty_makes_the_reference_of_the_policy_as_it_is_and_leaves_one_that_is_there(
    make: Callable[..., Learner],
) -> None:
    assert not make().policy.has_reference
    learner = make("grpo", spec={"beta": 0.1})
    start = weights(learner.policy)
    reference = learner.policy.reference
    for _ in range(2):
        learner.update(scored(rollouts()))
    assert distance(start, [p.detach() for p in reference.parameters()]) == 0
    assert distance(start, weights(learner.policy)) > 1e-3
    Learner(learner.policy, learner.algorithm, learner.optimizer)
    assert learner.policy.reference is reference


def test_kl_is_k3_of_the_sampled_tokens_and_is_reported_with_a_reference_alone(make: Callable[..., Learner]) -> None:
    batch = rollouts()
    learner = make("grpo", spec={"beta": 0.1})
    update = learner.update(scored(batch))
    ref_BT = update.batch.rollouts.ref_logp_BT
    with torch.no_grad():
        torch.testing.assert_close(ref_BT, make().policy.forward(batch).logp_BT, atol=1e-5, rtol=1e-5)
    expected = float(k3(batch.logp_BT, ref_BT)[batch.mask_BT].mean())
    assert update.metrics["kl"] == pytest.approx(expected, rel=1e-5)
    assert "kl" not in make("grpo").update(scored(rollouts())).metrics


def test_a_reference_moves_by_its_share_at_every_so_many_updates(make: Callable[..., Learner]) -> None:
    learner = make("grpo", spec={"beta": 0.1}, reference_steps=2, reference_share=0.25)
    start = weights(learner.policy)
    learner.update(scored(rollouts()))
    assert distance(start, list(learner.policy.reference.parameters())) == 0
    learner.update(scored(rollouts()))
    expected = [0.75 * old + 0.25 * new for old, new in zip(start, weights(learner.policy), strict=True)]
    assert distance(expected, [p.detach() for p in learner.policy.reference.parameters()]) < 1e-6
    assert distance(start, expected) > 1e-4


def test_a_reference_that_moves_takes_the_whole_way_unless_it_is_asked_otherwise(make: Callable[..., Learner]) -> None:
    learner = make("grpo", spec={"beta": 0.1}, reference_steps=1)
    learner.update(scored(rollouts()))
    assert distance(weights(learner.policy), [p.detach() for p in learner.policy.reference.parameters()]) == 0


def test_an_adaptive_penalty_sees_the_kl_of_the_last_pass(make: Callable[..., Learner]) -> None:
    learner = make("grpo", spec={"kl_target": 1e-9}, num_iterations=2, num_minibatches=2)
    seen: list[float] = []
    learner.algorithm.observe_kl = seen.append  # type: ignore[method-assign]
    update = learner.update(scored(rollouts()))
    assert seen == pytest.approx([sum(step.values["approx_kl"] for step in update.steps[2:])])
    assert update.metrics["kl_penalty"] == learner.algorithm.kl_penalty.weight
    seen.clear()
    longer = make("grpo", spec={"kl_target": 1e-9}, num_iterations=3, num_minibatches=2)
    longer.algorithm.observe_kl = seen.append  # type: ignore[method-assign]
    steps = longer.update(scored(rollouts())).steps
    assert seen == pytest.approx([sum(step.values["approx_kl"] for step in steps[4:])])
    moving = make("grpo", spec={"kl_target": 1e-9}, num_iterations=2)
    penalties = [moving.update(scored(rollouts())).metrics["kl_penalty"] for _ in range(2)]
    assert penalties[1] > penalties[0]
    assert "kl_penalty" not in make("grpo").update(scored(rollouts())).metrics


def test_an_adaptive_penalty_sees_no_kl_where_no_completion_could_be_scored(make: Callable[..., Learner]) -> None:
    learner, batch = make("grpo", spec={"kl_target": 0.01}), rollouts()
    batch.valid_B = torch.zeros_like(batch.valid_B)
    assert learner.update(scored(batch)).metrics["kl_penalty"] == 0.5


def test_a_strategy_that_is_given_makes_the_steps_and_else_the_policys_own(make: Callable[..., Learner]) -> None:
    class Counting(Strategy):
        passes = 0

        def backward(self, loss: Tensor) -> None:
            self.passes += 1
            super().backward(loss)

    strategy = Counting("cpu")
    learner = make(strategy=strategy)
    assert (learner.step, learner.experience, learner.batch) == (0, None, None)
    learner.update(scored(rollouts()))
    assert strategy.passes == 1
    assert learner.strategy is learner.policy.strategy is strategy
    plain = make()
    assert plain.strategy is plain.policy.strategy


@pytest.fixture
def experts(make_model: Callable[..., Any]) -> Callable[..., Learner]:
    """A learner of a mixture of experts, whose passes are padded, so that `micro_rows` cuts them; counts in `calls`
    how often its last layer is called."""

    def learner(**changes: Any) -> Learner:
        sizes = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
        model = make_model("llama", **sizes)
        policy = Policy(model, params=SamplingParams(), pad_id=0, packing="padded")
        optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
        made: Any = Learner(policy, Algorithm("reinforce"), optimizer, **{"max_grad_norm": 0.0, **changes})
        made.calls = []
        model.model.norm.register_forward_hook(lambda *_: made.calls.append(1))
        return made  # type: ignore[no-any-return]

    return learner


def test_the_loss_of_a_mixture_of_experts_has_their_balance_in_it(experts: Callable[..., Learner]) -> None:
    metrics = experts().update(scored(rollouts())).metrics
    assert metrics["aux_loss"] > 1
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.3 * metrics["aux_loss"], rel=1e-5)


def test_updates_balance_the_experts(experts: Callable[..., Learner]) -> None:
    """Where rewards are next to nothing, all that is left to go down is the load-balancing loss."""
    learner, batch = experts(), rollouts()
    batch.reward_BT = 1e-6 * batch.reward_BT
    losses = [learner.update(scored(batch)).metrics["aux_loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1e-6


@pytest.mark.parametrize(
    "changes", [{"micro_rows": 3}, {"micro_rows": 1}, {"noise_steps": 1}, {"noise_steps": 1, "micro_rows": 2}], ids=str
)
def test_experts_are_balanced_over_a_whole_step_however_it_is_cut(
    changes: dict[str, int], experts: Callable[..., Learner]
) -> None:
    whole, cut = experts(), experts(**changes)
    found = [learner.update(scored(rollouts())).metrics for learner in (whole, cut)]
    assert distance(weights(whole.policy), weights(cut.policy)) < 1e-6
    for name in ("aux_loss", "loss", "policy_loss", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name


def test_choices_of_experts_are_counted_apart_where_a_step_is_more_than_one_pass(
    experts: Callable[..., Learner],
) -> None:
    """By as many passes again; on ranks always, as one does not see what the others chose."""

    class TwoRanks(Strategy):
        num_ranks = 2

    passes = {}
    for name, changes in {
        "one": {},
        "two": {"micro_rows": 3},
        "halves": {"noise_steps": 1},
        "ranks": {"strategy": TwoRanks("cpu")},
    }.items():
        learner: Any = experts(**changes)
        learner.update(scored(rollouts()))
        passes[name] = len(learner.calls)
    assert passes == {"one": 1, "two": 4, "halves": 3, "ranks": 2}


def test_each_minibatch_makes_a_step_of_the_size_of_the_whole_batch(make_model: Callable[..., Any]) -> None:
    """At a rate that leaves the gradient as it is three minibatches move the weights three times as far as one step."""
    moves = []
    for number in (1, 3):
        policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-4)
        before = torch.cat([p.flatten() for p in weights(policy)])
        learner = Learner(policy, Algorithm("reinforce"), optimizer, num_minibatches=number, max_grad_norm=0.0)
        learner.update(scored(rollouts()))
        moves.append(torch.cat([p.flatten() for p in weights(policy)]) - before)
    assert float((moves[1] - 3 * moves[0]).norm() / moves[1].norm()) < 0.02


class LessSure:
    """A teacher that gives each sampled token half a nat less than the sampler did; junk outside the mask."""

    def logp(self, batch: TextRollouts, micro_rows: int) -> Tensor:
        assert micro_rows == 2
        return (batch.logp_BT - 0.5).masked_fill(~batch.mask_BT, -70.0)


def test_a_teacher_scores_the_sampled_tokens_before_the_update(make: Callable[..., Learner]) -> None:
    clock = Clock()
    update = make("rloo", spec={"teacher_coef": 0.5}, teacher=LessSure(), clock=clock, micro_rows=2).update(
        scored(rollouts())
    )
    batch = update.batch.rollouts
    assert torch.equal(batch.teacher_logp_BT[batch.mask_BT], batch.logp_BT[batch.mask_BT] - 0.5)
    assert update.metrics["teacher_kl"] == pytest.approx(0.5, rel=1e-5)
    assert sorted(clock.seconds) == ["teacher", "update"]
    assert "teacher_kl" not in make("rloo", teacher=LessSure()).update(scored(rollouts())).metrics


def test_an_algorithm_with_a_teacher_says_how_to_give_it_one(make: Callable[..., Learner]) -> None:
    with pytest.raises(ValueError) as error:
        make("rloo", spec={"teacher_coef": 0.5})
    assert str(error.value) == (
        "Algorithm rloo learns from a teacher and none is given: pass teacher=Teacher.from_pretrained(name, policy)."
    )


def test_an_adaptive_bonus_sees_the_entropy_of_the_last_pass(make: Callable[..., Learner]) -> None:
    learner = make("grpo", spec={"use_adaptive_entropy": True, "entropy_coef": 0.01}, num_iterations=3)
    seen: list[float] = []
    learner.algorithm.observe_entropy = seen.append  # type: ignore[method-assign]
    steps = learner.update(scored(rollouts())).steps
    assert seen == pytest.approx([steps[-1].values["entropy"]])
    assert seen[0] > 1


def test_denominators_are_those_of_all_ranks(make: Callable[..., Learner]) -> None:
    """The other rank has the same completions, so there are twice as many."""

    class TwoAlike(Strategy):
        num_ranks = 2

        def all_sum(self, x: Tensor) -> Tensor:
            return 2 * x

    alone, together = make(), make(strategy=TwoAlike("cpu"))
    losses = [learner.update(scored(rollouts())).metrics["policy_loss"] for learner in (alone, together)]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-5)
    assert float(together.batch.num_tokens) == 2 * float(alone.batch.num_tokens)


def test_an_algorithm_with_a_critic_needs_a_policy_that_has_one(make_model: Callable[..., Any]) -> None:
    policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0)
    with pytest.raises(ValueError, match=r"ppo learns from a critic and the policy has none: call policy\.add_critic"):
        Learner(policy, Algorithm("ppo"), torch.optim.SGD(policy.parameters(), lr=RATE))


def test_the_first_updates_may_be_of_the_critic_alone(make: Callable[..., Learner]) -> None:
    learner = make("ppo", critic_only_steps=2)
    learner.scheduler = learner.updater.scheduler = torch.optim.lr_scheduler.LambdaLR(
        learner.optimizer, lambda step: 1 / (1 + step)
    )
    start = weights(learner.policy)
    critic = [p.detach().clone() for p in learner.policy.critic.trainable()]
    found = [learner.update(scored(rollouts())).metrics for _ in range(2)]
    assert distance(start, weights(learner.policy)) == 0
    assert distance(critic, [p.detach() for p in learner.policy.critic.trainable()]) > 1e-4
    assert [each["learning_rate"] for each in found] == [0.0, 0.0]
    assert learner.update(scored(rollouts())).metrics["learning_rate"] == RATE
    assert distance(start, weights(learner.policy)) > 1e-4


def test_a_critic_reports_what_it_explains_and_its_own_gradient(make: Callable[..., Learner]) -> None:
    learner = make("ppo")
    first = learner.update(scored(rollouts()))
    assert first.batch.rollouts.value_BT.abs().sum() == 0  # a new critic says 0
    assert first.metrics["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert first.metrics["critic_grad_norm"] > 0
    assert first.metrics["value_loss"] > 0
    for _ in range(5):
        last = learner.update(scored(rollouts()))
    assert last.metrics["value_loss"] < first.metrics["value_loss"]
    mask_BT, values = last.batch.mask_BT, last.batch.rollouts.value_BT
    returns = last.batch.rollouts.reward_BT.sum(1, keepdim=True).expand_as(values)[mask_BT]
    explained = 1 - float((returns - values[mask_BT]).var() / returns.var())
    assert last.metrics["explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert abs(explained) > 1e-3
    equal = rollouts()
    equal.reward_BT = torch.where(equal.reward_BT != 0, 1.0, 0.0)
    assert "explained_variance" not in make("ppo").update(scored(equal)).metrics  # there is nothing to explain
    without = make("grpo").update(scored(rollouts())).metrics
    assert not {"explained_variance", "critic_grad_norm", "value_loss"} & set(without)


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_critics_pass_also_gives_the_log_probabilities_of_before_where_they_are_needed(
    iterations: int, make: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, batch = make("ppo", num_iterations=iterations), rollouts()
    with torch.no_grad():
        before_BT = learner.policy.forward(batch).logp_BT
    monkeypatch.setattr(Policy, "logp", lambda *_: pytest.fail("a second pass"))
    update = learner.update(scored(batch))
    if iterations == 1:
        assert update.batch.proximal_logp_BT is None
    else:
        torch.testing.assert_close(update.batch.proximal_logp_BT, before_BT, atol=1e-5, rtol=1e-5)


def test_a_cut_row_is_bootstrapped_with_the_value_after_it_where_the_algorithm_says_so(
    make: Callable[..., Learner],
) -> None:
    batch = rollouts()
    batch.truncated_B = torch.arange(6) < 3
    assert make("ppo").update(scored(copy.copy(batch))).batch.rollouts.cut_BT.sum() == 0
    learner = make("ppo", spec={"truncated": "bootstrap", "gamma": 0.75})
    seen = learner.update(scored(copy.copy(batch))).batch.rollouts
    assert seen.cut_BT.any(1).tolist() == batch.truncated_B.tolist()
    assert set(seen.discount_BT[seen.cut_BT].tolist()) == {0.75}  # of the value that comes after


def test_only_tokens_of_large_entropy_are_trained_where_the_algorithm_says_so(make: Callable[..., Learner]) -> None:
    learner, batch = make(spec={"top_entropy_quantile": 0.25}), rollouts()
    with torch.no_grad():
        entropy_BT = learner.policy.forward(batch).entropy_BT
    update = learner.update(scored(batch))
    torch.testing.assert_close(update.batch.rollouts.entropy_BT, entropy_BT, atol=1e-5, rtol=1e-5)
    kept = (update.batch.advantage_BT != 0).sum().item()
    assert kept == math.ceil(0.25 * int(batch.mask_BT.sum()))
    assert entropy_BT[update.batch.advantage_BT != 0].min() >= entropy_BT[batch.mask_BT].quantile(0.7)
    assert make().update(scored(rollouts())).batch.rollouts.entropy_BT is None


def test_seconds_are_counted_by_phase(make: Callable[..., Learner]) -> None:
    clock = Clock()
    make(clock=clock).update(scored(rollouts()))
    assert list(clock.seconds) == ["update"]
    clock = Clock()
    make("ppo", spec={"beta": 0.1, "top_entropy_quantile": 0.5}, clock=clock).update(scored(rollouts()))
    assert sorted(clock.seconds) == ["reference", "update", "value"]
    assert min(clock.seconds.values()) > 0


def test_a_loss_that_is_no_number_makes_no_step(make: Callable[..., Learner]) -> None:
    learner = make(spec={"loss": lambda logp_BT, batch: logp_BT.sum() * float("nan")})
    before = weights(learner.policy)
    update = learner.update(scored(rollouts()))
    assert [step.stepped for step in update.steps] == [False]
    assert math.isnan(update.metrics["grad_norm"])
    assert update.metrics["skipped_updates"] == 1
    assert distance(before, weights(learner.policy)) == 0


def test_a_batch_that_teaches_nothing_moves_nothing(make: Callable[..., Learner]) -> None:
    batch = rollouts()
    batch.reward_BT = torch.where(batch.reward_BT != 0, 1.0, 0.0)
    learner = make("grpo")
    before = weights(learner.policy)
    update = learner.update(scored(batch))
    assert update.metrics["grad_norm"] == 0
    assert distance(before, weights(learner.policy)) == 0


def test_a_failed_update_leaves_its_experience_and_no_batch_of_the_one_before(make: Callable[..., Learner]) -> None:
    learner, batch = make("remax"), rollouts()
    learner.update(scored(batch))
    bad = scored(dataclasses.replace(batch, greedy_B=None))
    with pytest.raises(ValueError, match="greedy_B"):
        learner.update(bad)
    assert (learner.step, learner.experience, learner.batch) == (2, bad, None)
