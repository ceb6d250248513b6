"""Small policies: a linear map, a multilayer perceptron or the user's own module, a head, and a critic if wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..rewards.loading import LoadError, Target, load
from ..words import nearest
from .heads import make_head
from .network import Perceptron, linear, mlp
from .spaces import Interface

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def load_network(spec: str, num_inputs: int, num_outputs: int) -> nn.Module:
    """The user's `module:Class` or `file.py:Class`, made as Class(num_inputs, num_outputs).

    Its forward takes (N, num_inputs) and returns scores (N, num_outputs), or a pair of scores and values (N,).
    """
    place, _, name = spec.rpartition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not see the folder it is called in
    file = str(Path(place).resolve()) if place.endswith(".py") else None
    try:
        made = load(Target(None if file else place, file, name))
    except LoadError as error:
        hint = nearest(name, error.near) or f" It has {', '.join(error.near[:8]) or 'nothing that can be called'}."
        raise ValueError(f"--policy {spec}: {error}.{hint if error.kind == 'name' else ''}") from error
    except Exception as error:
        raise ValueError(f"--policy {spec}: loading {place} raised {type(error).__name__}: {error}.") from error
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise ValueError(f"--policy {spec}: {name} is no class of torch.nn.Module.")
    return made(num_inputs, num_outputs)


def _through_torch(network: nn.Module) -> Forward:
    def forward(x_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = network(torch.from_numpy(x_ND))
        return (out[0] if isinstance(out, tuple) else out).numpy()

    return forward


class ControlPolicy(nn.Module):
    """Actor, head and critic. All parameters lie in one flat tensor, so that an optimiser step is one operation.

    Args:
        interface: sizes of both ends.
        kind: linear, mlp, or the user's `module:Class`.
        head: see `heads.make_head`.
        hidden: widths of the hidden layers of actor and critic.
        critic: whether there is a value head.
        log_std: logarithm of the first σ of a Gaussian head.
    """

    def __init__(
        self,
        interface: Interface,
        *,
        kind: str = "mlp",
        head: str = "auto",
        hidden: tuple[int, ...] = (64, 64),
        critic: bool = False,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.interface = interface
        self.head = make_head(interface, head, log_std)
        num_in, num_out = interface.num_inputs, self.head.num_scores
        self.gives_value = False
        if kind == "linear":
            self.actor: nn.Module = linear(num_in, num_out)
        elif kind == "mlp":
            self.actor = mlp((num_in, *hidden, num_out), 0.01)
        else:
            self.actor = load_network(kind, num_in, num_out)
            self.gives_value = self._check_user_module(kind, num_in, num_out)
        self.critic: nn.Module | None = None
        if critic and not self.gives_value:
            self.critic = linear(num_in, 1) if kind == "linear" else mlp((num_in, *hidden, 1), 1.0)
        self._flatten()
        self._fast_actor = Perceptron(self.actor) if Perceptron.serves(self.actor) else None
        self._fast_critic = Perceptron(self.critic) if Perceptron.serves(self.critic) else None
        self._forward = _through_torch(self.actor) if self._fast_actor is None else self._fast_actor.forward
        self._leaves: list[tuple[Perceptron, Tensor]] = []

    def _check_user_module(self, kind: str, num_in: int, num_out: int) -> bool:
        with torch.inference_mode():
            out = self.actor(torch.zeros(2, num_in))
        scores = out[0] if isinstance(out, tuple) else out
        if tuple(scores.shape) != (2, num_out):
            raise ValueError(
                f"--policy {kind}: for observations of shape (2, {num_in}) it gave scores of shape "
                f"{tuple(scores.shape)}; {self.interface.name} needs (2, {num_out})."
            )
        return isinstance(out, tuple)

    def _flatten(self) -> None:
        """Make every parameter a view of `theta` and every gradient one of `grad`."""
        parameters = list(self.parameters())
        self.theta = torch.cat([p.detach().reshape(-1).float() for p in parameters])
        self.theta.grad = self.grad = torch.zeros_like(self.theta)
        at = 0
        for parameter in parameters:
            end = at + parameter.numel()
            parameter.data = self.theta[at:end].view_as(parameter)
            parameter.grad = self.grad[at:end].view_as(parameter)
            at = end

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return self.head.noise(rng, *shape)

    def act(
        self, features_ND: NDArray[np.float32], noise_NA: NDArray[np.float32] | float
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The raw action, which training scores, and the action that the environment gets. Noise 0 is the mode."""
        raw_N = self.head.draw(self._forward(features_ND), noise_NA)
        return raw_N, self.head.to_env(raw_N)

    def evaluate(self, features_ND: Tensor, raw_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """log π of the raw actions, the entropies in nats, and the values where there is a critic, each (N,)."""
        self._leaves = []
        value_N: Tensor | None = None
        if self._fast_actor is not None:
            scores_NA = self._leaf(self._fast_actor, features_ND)
        else:
            out = self.actor(features_ND)
            scores_NA, value_N = out if isinstance(out, tuple) else (out, None)
        if self._fast_critic is not None:
            value_N = self._leaf(self._fast_critic, features_ND).squeeze(-1)
        elif self.critic is not None:
            value_N = self.critic(features_ND).squeeze(-1)
        return self.head.logp(scores_NA, raw_N), self.head.entropy(scores_NA, raw_N), value_N

    def _leaf(self, network: Perceptron, features_ND: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.from_numpy(network.forward(features_ND.numpy()))
        scores_NA = torch.from_numpy(network.forward(features_ND.numpy(), keep=True)).requires_grad_()
        self._leaves.append((network, scores_NA))
        return scores_NA

    def backward(self, loss: Tensor) -> None:
        """Put the gradient of a loss of the last `evaluate` into `grad`."""
        self.grad.zero_()
        loss.backward()
        for network, scores_NA in self._leaves:
            if scores_NA.grad is not None:  # a critic whose value the loss left out has none
                network.backward(scores_NA.grad.numpy())
        self._leaves = []

    @torch.no_grad()
    def values(self, features_ND: Tensor) -> Tensor:
        """V(s), (N,), without a gradient."""
        if self._fast_critic is not None:
            return torch.from_numpy(self._fast_critic.forward(features_ND.numpy())).squeeze(-1)
        return self.actor(features_ND)[1] if self.critic is None else self.critic(features_ND).squeeze(-1)
