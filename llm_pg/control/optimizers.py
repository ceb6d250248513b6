"""Adam, RMSProp and plain descent on one flat tensor, with the formulas of torch.optim.

Why not torch.optim: making its first optimiser imports a compiler, 1.3 seconds of every process, and a step on a small
tensor is mostly its bookkeeping.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

OPTIMIZERS = ("adam", "rmsprop", "sgd")


class Optimizer(Protocol):
    learning_rate: float

    def step(self, grad: Tensor) -> None:
        """Move the parameters, in place."""
        ...


class SGD:
    """θ ← θ - α g."""

    def __init__(self, theta: Tensor, learning_rate: float) -> None:
        self.theta, self.learning_rate = theta, learning_rate

    def step(self, grad: Tensor) -> None:
        self.theta.sub_(grad, alpha=self.learning_rate)


class RMSProp:
    """θ ← θ - α g / (√v + ε), v the running mean of g². Source: Tieleman and Hinton 2012; shared by A3C's workers."""

    DECAY, EPS = 0.99, 1e-5

    def __init__(self, theta: Tensor, learning_rate: float) -> None:
        self.theta, self.learning_rate = theta, learning_rate
        self._square = torch.zeros_like(theta)

    def step(self, grad: Tensor) -> None:
        self._square.mul_(self.DECAY).addcmul_(grad, grad, value=1 - self.DECAY)
        self.theta.addcdiv_(grad, self._square.sqrt().add_(self.EPS), value=-self.learning_rate)


class Adam:
    """θ ← θ - α m̂ / (√v̂ + ε), m̂ and v̂ the running means of g and g², corrected for their start.

    Source: Kingma and Ba 2015 (arXiv 1412.6980).
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-5

    def __init__(self, theta: Tensor, learning_rate: float) -> None:
        self.theta, self.learning_rate = theta, learning_rate
        self._mean, self._square = torch.zeros_like(theta), torch.zeros_like(theta)
        self._num_steps = 0

    def step(self, grad: Tensor) -> None:
        self._num_steps += 1
        self._mean.lerp_(grad, 1 - self.BETA1)
        self._square.mul_(self.BETA2).addcmul_(grad, grad, value=1 - self.BETA2)
        deviation = self._square.sqrt().div_(math.sqrt(1 - self.BETA2**self._num_steps)).add_(self.EPS)
        size = self.learning_rate / (1 - self.BETA1**self._num_steps)
        self.theta.addcdiv_(self._mean, deviation, value=-size)


def make_optimizer(name: str, theta: Tensor, learning_rate: float) -> Optimizer:
    if name == "adam":
        return Adam(theta, learning_rate)
    if name == "rmsprop":
        return RMSProp(theta, learning_rate)
    if name == "sgd":
        return SGD(theta, learning_rate)
    raise ValueError(f"There is no optimizer {name!r}. Known: {', '.join(OPTIMIZERS)}.")
