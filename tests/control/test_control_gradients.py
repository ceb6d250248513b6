"""The update of a policy through the whole track, from environment to gradient, against the exact one."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.control.collect import ControlCollector, Stretch
from llm_pg.control.learner import ControlLearner
from llm_pg.control.mdp import FiniteMDP, bandit, gridworld
from llm_pg.control.prepare import prepare
from llm_pg.control.settings import SPECS, resolve
from llm_pg.control.tabular import exact_gradient, tensors
from llm_pg.estimators.distributions import token_logp
from llm_pg.estimators.tabular import state_values
from llm_pg.rollouts import Rollouts

LOGITS = torch.linspace(-0.8, 0.9, 9 * 4, dtype=torch.float64).view(9, 4).sin()


def _every_episode(mdp: FiniteMDP) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions and mask of every sequence of actions in a deterministic process, (B, T)."""
    actions = np.array(list(itertools.product(range(mdp.num_actions), repeat=mdp.horizon)))
    state_B = np.full(len(actions), int(mdp.start_S.argmax()))
    states, masks = [], []
    for action_B in actions.T:
        states.append(state_B)
        masks.append(~mdp.terminal_S[state_B])
        state_B = mdp.transition_SAS[state_B, action_B].argmax(1)
    mask_BT = torch.from_numpy(np.stack(masks, 1))
    # Sequences that differ only after the end are one episode: keep the one whose idle actions are all 0.
    action_BT = torch.from_numpy(actions)
    kept = ((action_BT == 0) | mask_BT).all(1)
    return torch.from_numpy(np.stack(states, 1))[kept], action_BT[kept], mask_BT[kept]


def _expected_update(mdp: FiniteMDP, logits_SA: Tensor, row_changes: dict[str, object], value_TS: Tensor) -> Tensor:
    """The update that the algorithm makes on average, as a sum over every episode with its probability."""
    _, reward_SA, _ = tensors(mdp)
    state_BT, action_BT, mask_BT = _every_episode(mdp)
    logits_SA = logits_SA.clone().requires_grad_()
    logp_BT = token_logp(logits_SA[state_BT], action_BT)
    num_rows, num_steps = mask_BT.shape
    at_BT = torch.arange(num_steps).expand(num_rows, -1)
    after_BT = torch.cat([state_BT[:, 1:], state_BT[:, -1:]], 1)
    row = dataclasses.replace(SPECS["reinforce"], **row_changes)  # type: ignore[arg-type]
    rollouts = Rollouts(
        mask_BT=mask_BT,
        logp_BT=logp_BT.detach(),
        group_B=torch.zeros(num_rows, dtype=torch.long),
        reward_BT=reward_SA[state_BT, action_BT] * mask_BT,
        discount_BT=(mask_BT & (at_BT < num_steps - 1) & (torch.from_numpy(~mdp.terminal_S)[after_BT])) * row.gamma,
        cut_BT=torch.zeros_like(mask_BT),
        valid_B=torch.ones(num_rows, dtype=torch.bool),
        truncated_B=torch.zeros(num_rows, dtype=torch.bool),
        value_BT=value_TS[at_BT, state_BT],
    )
    algorithm = Algorithm(row)
    algorithm.running_mean.update(1.7)
    batch = algorithm.compute_advantages(rollouts)
    probability_B = (logp_BT.detach() * mask_BT).sum(1).exp()
    assert float(probability_B.sum()) == pytest.approx(1.0)
    batch.loss_scale_BT = batch.loss_scale_BT * probability_B[:, None] * num_rows
    loss, _ = algorithm.loss(logp_BT, batch)
    return -torch.autograd.grad(loss, logits_SA)[0]


GRID = gridworld(size=3, horizon=6)
EXACT = [
    ({}, 0.0),
    ({"returns": "total"}, 0.0),
    ({"returns": "total", "gamma": 0.9}, 0.0),
    ({"baseline": "running_mean"}, 0.0),
    ({"baseline": "value", "lam": 1.0}, 0.5),  # a wrong critic, at λ = 1
    ({"baseline": "value", "lam": 0.0}, 0.0),  # an exact critic, at any λ
    ({"baseline": "value", "lam": 0.7}, 0.0),
]


@pytest.mark.parametrize("changes, wrong", EXACT)
def test_the_expected_update_on_a_grid_is_the_exact_gradient(changes: dict[str, object], wrong: float) -> None:
    discount = float(changes.get("gamma", 1.0))  # type: ignore[arg-type]
    transition_SAS, reward_SA, _ = tensors(GRID)
    value_TS = state_values(LOGITS.softmax(1), transition_SAS, reward_SA, GRID.horizon, discount)
    value_TS = value_TS + wrong * torch.arange(9.0, dtype=torch.float64)
    _, exact_SA = exact_gradient(GRID, LOGITS, discount)
    update_SA = _expected_update(GRID, LOGITS, changes, value_TS)
    assert torch.allclose(update_SA, exact_SA, atol=1e-12)


def test_a_wrong_critic_biases_the_td_error() -> None:
    """The counterpart: the check above can tell a biased update from an unbiased one."""
    value_TS = torch.arange(9.0, dtype=torch.float64).expand(7, 9)
    _, exact_SA = exact_gradient(GRID, LOGITS)
    update_SA = _expected_update(GRID, LOGITS, {"baseline": "value", "lam": 0.0}, value_TS)
    assert torch.cosine_similarity(update_SA.flatten(), exact_SA.flatten(), 0) < 0.99


def test_the_expected_update_on_a_bandit_is_the_exact_gradient() -> None:
    arms = bandit([0.3, -1.0, 2.0])
    logits_SA = torch.tensor([[0.1, 0.4, -0.3], [0.0, 0.0, 0.0]], dtype=torch.float64)
    update_SA = _expected_update(arms, logits_SA, {}, torch.zeros(2, 2, dtype=torch.float64))
    probability_A = logits_SA[0].softmax(0)
    mean_A = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(update_SA[0], probability_A * (mean_A - probability_A @ mean_A))
    assert torch.allclose(update_SA, exact_gradient(arms, logits_SA)[1])


@pytest.mark.parametrize(
    "algorithm, changes",
    [
        ("reinforce", {}),
        ("reinforce", {"baseline": "running_mean"}),
        ("rloo", {"group_size": 8}),
        ("rloo", {"group_size": 8, "baseline_per_step": True}),
    ],
)
def test_sampled_updates_on_the_grid_average_to_the_exact_gradient(algorithm: str, changes: dict[str, object]) -> None:
    """Environment, sampling, time and loss as they run: the mean over 60 batches lies within its own error."""
    settings = resolve("gridworld", algorithm, policy="linear", num_envs=64, total_steps=10**9, **changes)
    _, collector, learner = prepare(settings)
    policy = learner.policy
    policy.theta.copy_(0.5 * torch.linspace(-3, 3, policy.theta.numel()).sin())
    mdp = gridworld()
    logits_SA = policy.theta.view(4, 16).T.double()
    value, exact_SA = exact_gradient(mdp, logits_SA)
    samples = torch.stack([-learner.gradient(collector.collect(), 0.0)[0] for _ in range(60)]).double()
    _assert_mean(samples, exact_SA.T.flatten())
    returns = np.array(collector.episodes.returns)
    assert returns.mean() == pytest.approx(float(value), abs=4 * returns.std() / np.sqrt(len(returns)))


def _assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean of the samples lies within four standard errors, along the expected vector and across it."""
    across = torch.randn(7, len(expected), generator=torch.Generator().manual_seed(3), dtype=expected.dtype)
    directions = torch.cat([expected[None], across])
    projected = samples @ directions.T
    z = (projected.mean(0) - directions @ expected) / (projected.std(0) / len(samples) ** 0.5)
    assert z.abs().max() < 4, f"{z.tolist()} standard errors off"
    assert torch.cosine_similarity(samples.mean(0), expected, 0) > 0.95


def test_the_sigmoid_bandit_takes_the_two_steps_of_the_lecture() -> None:
    """θ = 0 and α = 1: a rewarded sample gives θ = 0.5, σ = 0.622; another one θ = 0.878, σ = 0.706."""
    settings = resolve("sigmoid-bandit", "reinforce", num_envs=1, learning_rate=1.0, max_grad_norm=0.0)
    _, collector, learner = prepare(settings)
    seen = []
    while len(seen) < 2:
        stretch = collector.collect()
        if float(stretch.reward_BT) == 1.0:
            learner.update(stretch, 0.0)
            seen.append(float(learner.policy.theta[0]))
    assert seen == pytest.approx([0.5, 0.878], abs=5e-4)
    assert float(torch.sigmoid(torch.tensor(seen[1]))) == pytest.approx(0.706, abs=5e-4)


def test_one_sample_of_the_sigmoid_bandit_has_mean_and_deviation_a_quarter() -> None:
    settings = resolve("sigmoid-bandit", "reinforce", num_envs=1)
    _, collector, learner = prepare(settings)
    samples = torch.stack([-learner.gradient(collector.collect(), 0.0)[0][0] for _ in range(400)])
    # It is 0.5 or 0 with even chances, so the deviation is as sure as the mean.
    assert set(samples.tolist()) == {0.0, 0.5}
    assert float(samples.mean()) == pytest.approx(0.25, abs=4 * 0.25 / 400**0.5)
    assert float(samples.std()) == pytest.approx(0.25, abs=0.01)


def _advantages(lam: float, stretch: Stretch, value_BT: Tensor) -> Tensor:
    row = dataclasses.replace(SPECS["a2c"], lam=lam, gamma=0.9)
    rollouts = stretch.rollouts(torch.zeros(stretch.mask_BT.shape), value_BT, 0.9, 1.0, whole_episodes=False)
    return Algorithm(row).compute_advantages(rollouts).advantage_BT


def _stretch(seed: int = 0) -> tuple[Stretch, Tensor]:
    """Forty steps of eight carts pushed about, with their ends, and values that nobody learned."""
    settings = resolve("cartpole", "a2c", num_envs=8, num_steps=40, seed=seed)
    _, collector, _ = prepare(settings)
    stretch = collector.collect()
    assert stretch.terminated_BT.any()
    assert not stretch.mask_BT.all()
    return stretch, torch.randn(8, 41, generator=torch.Generator().manual_seed(1))


def test_lambda_0_is_the_td_error_of_every_step() -> None:
    stretch, value_BT = _stretch()
    alive_BT = (~stretch.terminated_BT).float()
    delta_BT = stretch.reward_BT + 0.9 * alive_BT * value_BT[:, 1:] - value_BT[:, :-1]
    assert torch.allclose(_advantages(0.0, stretch, value_BT), delta_BT * stretch.mask_BT, atol=1e-6)


def test_lambda_1_is_the_monte_carlo_return_minus_the_value() -> None:
    """By hand, episode by episode: rewards up to its end, and the value where the stretch stops."""
    stretch, value_BT = _stretch()
    expected_BT = torch.zeros_like(stretch.reward_BT)
    for row in range(8):
        for start in range(40):
            total, factor, t = 0.0, 1.0, start
            while t < 40:
                total += factor * float(stretch.reward_BT[row, t])
                factor *= 0.9
                if stretch.terminated_BT[row, t]:
                    factor = 0.0
                    break
                t += 1
            total += factor * float(value_BT[row, 40])
            expected_BT[row, start] = total - float(value_BT[row, start])
    assert torch.allclose(_advantages(1.0, stretch, value_BT), expected_BT * stretch.mask_BT, atol=1e-4)


def test_a_time_limit_takes_the_value_of_the_state_after_it_and_an_end_does_not() -> None:
    mask = torch.tensor([[True, True, False, True]])
    stretch = Stretch(
        feature_BT=torch.zeros(1, 5, 1),
        action_BT=torch.zeros(1, 4, dtype=torch.long),
        reward_BT=torch.tensor([[1.0, 1.0, 0.0, 1.0]]),
        mask_BT=mask,
        terminated_BT=torch.zeros(1, 4, dtype=torch.bool),
        truncated_BT=torch.tensor([[False, True, False, False]]),
        group_B=torch.zeros(1, dtype=torch.long),
    )
    value_BT = torch.tensor([[0.0, 0.0, 10.0, 0.0, 20.0]])
    # Step 1 hits the limit: 1 + 0.9·10. Step 3 ends the stretch: 1 + 0.9·20. Step 2 only starts a new episode.
    assert _advantages(1.0, stretch, value_BT).tolist() == [pytest.approx([1 + 0.9 * 10.0, 10.0, 0.0, 19.0])]
    stretch.terminated_BT, stretch.truncated_BT = stretch.truncated_BT, stretch.terminated_BT
    assert _advantages(1.0, stretch, value_BT).tolist() == [pytest.approx([1.9, 1.0, 0.0, 19.0])]


def test_a_truncated_episode_of_a_real_environment_is_bootstrapped() -> None:
    """Pendulum never ends: its 200th step is a cut, and the column after it shows where the pendulum was."""
    settings = resolve("pendulum", "a2c", num_envs=2, num_steps=205)
    _, collector, _ = prepare(settings)
    stretch = collector.collect()
    assert stretch.truncated_BT.nonzero().tolist() == [[0, 199], [1, 199]]
    assert not stretch.terminated_BT.any()
    assert not stretch.mask_BT[:, 200].any()
    assert int(stretch.mask_BT.sum()) == 2 * 204
    # The pendulum moves at most 8 · 0.05 rad a step, so the column after the cut continues the swing.
    angle_BT = torch.atan2(stretch.feature_BT[..., 1], stretch.feature_BT[..., 0])
    moved_B = (angle_BT[:, 200] - angle_BT[:, 199]).abs()
    assert (torch.minimum(moved_B, 2 * torch.pi - moved_B) <= 0.41).all()
    value_BT = torch.ones(2, 206)
    rollouts = stretch.rollouts(torch.zeros(2, 205), value_BT, 0.9, 1.0, whole_episodes=False)
    assert (rollouts.discount_BT[:, 199] == 0.9).all()
    assert rollouts.cut_BT[:, 199].all()


def test_minibatches_of_steps_add_up_to_the_gradient_of_the_whole() -> None:
    settings = resolve("cartpole", "ppo", num_envs=4, num_steps=30, entropy_coef=0.01)
    _, collector, learner = prepare(settings)
    stretch = collector.collect()
    whole, _ = learner.gradient(stretch, 0.0)
    with torch.no_grad():
        batch, _ = learner.compute_batch(stretch, 0.0)
    index = torch.randperm(len(batch.mask_BT), generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(whole)
    for part in index.split(17):
        cut = batch.rows(part)
        learner.backward(cut, learner.forward(cut), 1)
        total += learner.policy.grad
    assert torch.allclose(total, whole, atol=1e-6)


def test_the_penalty_finds_the_target_kl() -> None:
    settings = resolve("cartpole", "trpo_penalty", num_envs=8, num_steps=64, kl_target=0.02, learning_rate=3e-3)
    _, collector, learner = prepare(settings)
    reached = [learner.update(collector.collect(), 0.0)["approx_kl"] for _ in range(40)]
    assert 0.01 < float(np.median(reached[10:])) < 0.04


def test_a_collector_counts_the_steps_of_the_policy_alone() -> None:
    _, collector, _ = prepare(resolve("cartpole", "a2c", num_envs=4, num_steps=50))
    assert isinstance(collector, ControlCollector)
    total = sum(collector.collect().num_steps for _ in range(3))
    ended = collector.episodes.lengths
    assert collector.steps == total < 600
    assert sum(ended) + int(collector.episodes.length_B.sum()) == total
    assert ended == [int(r) for r in collector.episodes.returns]  # a cart earns 1 a step


def test_asking_for_a_gradient_moves_nothing() -> None:
    _, collector, learner = prepare(resolve("cartpole", "a2c"))
    assert isinstance(learner, ControlLearner)
    before = learner.policy.theta.clone()
    gradient, _ = learner.gradient(collector.collect(), 0.0)
    assert torch.equal(learner.policy.theta, before)
    assert gradient.abs().sum() > 0
