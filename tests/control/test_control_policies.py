"""Networks, heads and what is drawn from them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_pg.control.adviser import count_parameters
from llm_pg.control.environments import inspect
from llm_pg.control.heads import GaussianHead, SigmoidHead, SoftmaxHead
from llm_pg.control.network import Perceptron, mlp
from llm_pg.control.policies import ControlPolicy
from llm_pg.control.prepare import prepare
from llm_pg.control.settings import resolve

CART = inspect("CartPole-v1")
PENDULUM = inspect("Pendulum-v1")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num_rows", [5, 700])  # numpy multiplies the small ones, torch the large ones
@pytest.mark.parametrize("sizes", [(4, 2), (3, 64, 1), (4, 64, 64, 2)])
def test_the_numpy_network_has_the_outputs_and_gradients_of_autograd(num_rows: int, sizes: tuple[int, ...]) -> None:
    network = mlp(sizes, 0.7)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(num_rows, sizes[0])
    up = torch.randn(num_rows, sizes[-1])
    fast = Perceptron(network)
    scores = fast.forward(x.numpy(), keep=True)
    assert torch.allclose(torch.from_numpy(scores), network(x), atol=1e-5)
    fast.backward(up.numpy())
    expected = torch.autograd.grad((network(x) * up).sum(), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_policy_trained_by_numpy_takes_the_steps_of_the_same_policy_trained_by_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained() -> torch.Tensor:
        _, collector, learner = prepare(resolve("cartpole", "ppo", num_envs=4, num_steps=32, num_epochs=3))
        stretch = collector.collect()
        learner.update(stretch, 0.0)
        return learner.policy.theta

    fast = trained()
    with monkeypatch.context() as patch:
        patch.setattr(Perceptron, "serves", staticmethod(lambda network: False))
        slow = trained()
    assert torch.allclose(fast, slow, atol=2e-5)


@pytest.mark.parametrize("head", [SoftmaxHead(CART), SigmoidHead(CART)])
def test_draws_have_the_frequencies_that_training_credits_them_with(head: SoftmaxHead) -> None:
    scores = np.array([[0.7, -0.4]], dtype=np.float32)[:, : head.num_scores]
    many = scores.repeat(40_000, 0)
    drawn = head.draw(many, head.noise(RNG, 40_000))
    probability = head.logp(torch.from_numpy(scores), torch.tensor([1])).exp().item()
    assert drawn.mean() == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 40_000))
    assert head.draw(scores, 0.0).tolist() == [0]  # without noise, the most probable


def test_the_log_probability_of_a_squashed_draw_integrates_to_one() -> None:
    """Over the actions that the environment gets: ∫ p(a) da = 1 between the bounds of Pendulum, -2 and 2."""
    head = GaussianHead(PENDULUM, squash=True, log_std=-0.3)
    raw = torch.linspace(-9, 9, 40_001)[:, None]
    scores = torch.full_like(raw, 0.4)
    action = torch.from_numpy(head.to_env(raw.numpy()))[:, 0]
    density = head.logp(scores, raw).exp().detach()
    assert float(torch.trapezoid(density, action)) == pytest.approx(1.0, abs=1e-3)
    assert action.min() >= -2
    assert action.max() <= 2


def test_the_entropy_of_a_squashed_gaussian_is_that_of_its_density() -> None:
    head = GaussianHead(PENDULUM, squash=True, log_std=-0.3)
    raw = torch.linspace(-9, 9, 40_001)[:, None]
    scores = torch.full_like(raw, 0.4)
    logp = head.logp(scores, raw).detach()
    action = torch.from_numpy(head.to_env(raw.numpy()))[:, 0]
    exact = -float(torch.trapezoid(logp.exp() * logp, action))
    mean = torch.full((20_000, 1), 0.4)
    drawn = torch.from_numpy(head.draw(mean.numpy(), head.noise(RNG, 20_000)))
    sampled = head.entropy(mean, drawn).detach()
    assert float(sampled.mean()) == pytest.approx(exact, abs=4 * float(sampled.std()) / 20_000**0.5)


def test_the_gradient_of_the_squashed_entropy_is_pathwise() -> None:
    """Against a difference quotient of the entropy with the same noise."""
    noise = torch.randn(5_000, 1, generator=torch.Generator().manual_seed(0))

    def entropy_at(mean: float) -> torch.Tensor:
        scores = torch.full((5_000, 1), mean, requires_grad=True)
        value = head.entropy(scores, scores.detach() + head.log_std.detach().exp() * noise).mean()
        return torch.stack([value, torch.autograd.grad(value, scores)[0].sum()]).detach()

    head = GaussianHead(PENDULUM, squash=True, log_std=-0.3)
    step = 1e-2
    quotient = (entropy_at(0.6 + step)[0] - entropy_at(0.6 - step)[0]) / (2 * step)
    assert float(entropy_at(0.6)[1]) == pytest.approx(float(quotient), abs=2e-3)


def test_a_plain_gaussian_clips_the_action_and_scores_the_draw() -> None:
    head = GaussianHead(PENDULUM, squash=False, log_std=0.0)
    raw = np.array([[3.5]], dtype=np.float32)
    assert head.to_env(raw).tolist() == [[2.0]]
    assert head.logp(torch.zeros(1, 1), torch.from_numpy(raw)).item() == pytest.approx(
        torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(3.5)).item()
    )
    assert head.entropy(torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(
        torch.distributions.Normal(0.0, 1.0).entropy().item()
    )


def test_squashing_needs_bounds() -> None:
    endless = PENDULUM.__class__(**{**PENDULUM.__dict__, "high": np.array([np.inf], dtype=np.float32)})
    with pytest.raises(ValueError, match="without bounds"):
        GaussianHead(endless, squash=True, log_std=0.0)


def test_a_sigmoid_policy_wants_two_actions() -> None:
    with pytest.raises(ValueError, match="chooses between 2"):
        SigmoidHead(inspect("Acrobot-v1"))


def test_all_parameters_lie_in_one_tensor() -> None:
    policy = ControlPolicy(PENDULUM, critic=True)
    policy.theta.fill_(0.25)
    assert all((parameter == 0.25).all() for parameter in policy.parameters())
    assert sum(parameter.numel() for parameter in policy.parameters()) == policy.theta.numel()
    raw, _ = policy.act(np.zeros((1, 3), dtype=np.float32), 0.0)
    inside = math.tanh(0.25)
    for _ in range(1):
        inside = math.tanh(64 * 0.25 * inside + 0.25)
    assert raw[0, 0] == pytest.approx(64 * 0.25 * inside + 0.25, rel=1e-5)


OWN = """
import torch
class Shared(torch.nn.Module):
    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Linear(num_inputs, 16), torch.nn.ReLU())
        self.scores, self.value = torch.nn.Linear(16, num_outputs), torch.nn.Linear(16, 1)
    def forward(self, x):
        hidden = self.trunk(x)
        return self.scores(hidden), self.value(hidden).squeeze(-1)
class Wrong(torch.nn.Module):
    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.scores = torch.nn.Linear(num_inputs, num_outputs + 1)
    def forward(self, x):
        return self.scores(x)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_control_net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_control_net", raising=False)
    return "own_control_net"


def test_a_module_of_the_users_own_learns_with_a_shared_trunk(own_module: str) -> None:
    _, collector, learner = prepare(resolve("cartpole", "a2c", policy=f"{own_module}:Shared"))
    assert learner.policy.critic is None
    before = learner.policy.theta.clone()
    stretch = collector.collect()
    stats = learner.update(stretch, 0.0)
    trunk = learner.policy.actor.trunk[0].weight
    assert not torch.equal(before, learner.policy.theta)
    assert stats["value_loss"] > 0
    assert trunk.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("Sharde", "Did you mean 'Shared'"),
        ("Wrong", r"shape \(2, 3\); CartPole-v1 needs \(2, 2\)"),
    ],
)
def test_a_module_that_does_not_fit_is_explained(own_module: str, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(resolve("cartpole", "a2c", policy=f"{own_module}:{name}"))


def test_a_network_is_found_in_a_file_too(own_module: str) -> None:
    _, _, by_name = prepare(resolve("cartpole", "a2c", policy=f"{own_module}:Shared"))
    _, _, by_file = prepare(resolve("cartpole", "a2c", policy=f"{own_module}.py:Shared"))
    assert torch.equal(by_name.policy.theta, by_file.policy.theta)
    with pytest.raises(ValueError, match=r"loading no_such.py raised FileNotFoundError"):
        prepare(resolve("cartpole", "a2c", policy="no_such.py:Shared"))


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ValueError, match="no_such_module_of_mine"):
        prepare(resolve("cartpole", "a2c", policy="no_such_module_of_mine:Net"))


def test_a_network_of_other_layers_goes_through_torch() -> None:
    assert not Perceptron.serves(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert Perceptron.serves(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "llm_pg/GridWorld-v0", "MountainCarContinuous-v0"])
@pytest.mark.parametrize("kind, hidden", [("linear", ()), ("mlp", (64, 64)), ("mlp", (7,)), ("mlp", ())])
def test_the_counted_parameters_are_those_of_the_policy_that_is_made(
    env: str, kind: str, hidden: tuple[int, ...]
) -> None:
    interface = inspect(env)
    heads = ["softmax"] if interface.discrete else ["gaussian", "tanh_gaussian"]
    for head in [*heads, *(["sigmoid"] if interface.discrete and interface.num_outputs == 2 else [])]:
        policy = ControlPolicy(interface, kind=kind, head=head, hidden=hidden, critic=True)
        of_head, whole, critic = count_parameters(kind, head, interface.num_inputs, interface.num_outputs, hidden)
        assert policy.critic is not None
        assert sum(p.numel() for p in policy.critic.parameters()) == critic
        assert policy.theta.numel() == whole + critic
        last = [layer for layer in policy.actor if isinstance(layer, nn.Linear)][-1]
        assert of_head == sum(p.numel() for p in [*last.parameters(), *policy.head.parameters()])


@pytest.mark.parametrize(
    "name, peer",
    [
        ("adam", lambda p: torch.optim.Adam([p], lr=0.01, eps=1e-5, foreach=False)),
        ("rmsprop", lambda p: torch.optim.RMSprop([p], lr=0.01, alpha=0.99, eps=1e-5, foreach=False)),
        ("sgd", lambda p: torch.optim.SGD([p], lr=0.01)),
    ],
)
def test_every_parameter_takes_the_steps_of_torchs_optimisers_to_the_last_bit(name: str, peer: Any) -> None:
    """The update moves one flat tensor; the layers and the sampler see the same memory."""
    settings = resolve("cartpole", "a2c", optimizer=name, learning_rate=0.01, max_grad_norm=0.0)
    _, collector, learner = prepare(settings)
    parameters = dict(learner.policy.named_parameters())
    copies = {key: parameter.detach().clone().requires_grad_() for key, parameter in parameters.items()}
    optimizers = {key: peer(copy) for key, copy in copies.items()}
    for _ in range(3):
        learner.update(collector.collect(), 0.0)
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            copies[key].grad = parameter.grad.clone()
            optimizers[key].step()
            assert torch.equal(parameter, copies[key]), key


def test_a_run_does_not_import_the_compiler() -> None:
    code = (
        "import sys; from llm_pg.control.settings import resolve; from llm_pg.control.train import train; "
        "train(resolve('cartpole', 'a2c', total_steps=300)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
