"""The networks of small policies: made by torch, run by numpy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Up to this many multiplications OpenBLAS stays on one thread whatever its settings; more go to torch, which obeys
# set_num_threads. Two threads on one small matrix are many times slower than one when the machine is busy.
_SINGLE_THREADED = 1 << 18


def _matmul(
    a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    if a.shape[0] * a.shape[1] * b.shape[1] <= _SINGLE_THREADED:
        return np.matmul(a, b, out=out)
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), dtype=np.float32)
    torch.mm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))
    return out


def _grad(parameter: Tensor) -> NDArray[np.float32]:
    assert parameter.grad is not None
    return parameter.grad.numpy()


class Perceptron:
    """Linear layers with tanh between them, forward and backward in numpy, on the memory of a torch module.

    A step of a small network is all overhead: numpy's calls cost a fifth of torch's and its tanh a seventh, and no
    graph is kept. The loss stays with autograd, down to the scores.

    Args:
        network: Sequential of Linear and Tanh, whose parameters and gradients already lie where they stay.
    """

    def __init__(self, network: Any) -> None:
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        self._weights = [layer.weight.detach().numpy() for layer in linears]
        self._biases = [None if layer.bias is None else layer.bias.detach().numpy() for layer in linears]
        self._weight_grads = [_grad(layer.weight) for layer in linears]
        self._bias_grads = [None if layer.bias is None else _grad(layer.bias) for layer in linears]
        self._inputs: list[NDArray[np.float32]] = []

    @staticmethod
    def serves(network: nn.Module | None) -> bool:
        return isinstance(network, nn.Sequential) and all(isinstance(x, (nn.Linear, nn.Tanh)) for x in network)

    def forward(self, x_ND: NDArray[np.float32], keep: bool = False) -> NDArray[np.float32]:
        """Scores (N, num_out); `keep` remembers what `backward` needs."""
        inputs = []
        for i, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            if i:
                np.tanh(x_ND, out=x_ND)
            inputs.append(x_ND)
            x_ND = _matmul(x_ND, weight.T)
            if bias is not None:
                x_ND += bias
        if keep:
            self._inputs = inputs
        return x_ND

    def backward(self, grad_NA: NDArray[np.float32]) -> None:
        """Write the parameters' gradients, given the loss's gradient with respect to the scores last kept."""
        for i in range(len(self._weights) - 1, -1, -1):
            x_ND, bias_grad = self._inputs[i], self._bias_grads[i]
            _matmul(grad_NA.T, x_ND, out=self._weight_grads[i])
            if bias_grad is not None:
                grad_NA.sum(0, out=bias_grad)
            if i:
                grad_NA = _matmul(grad_NA, self._weights[i])
                grad_NA *= 1 - x_ND * x_ND


def mlp(sizes: tuple[int, ...], last_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal weights: gain √2 inside, `last_gain` at the end."""
    layers: list[nn.Module] = []
    for i, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(num_in, num_out)
        nn.init.orthogonal_(linear.weight, math.sqrt(2) if i < len(sizes) - 2 else last_gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def linear(num_in: int, num_out: int) -> nn.Sequential:
    """One linear map that starts at 0: every action equally likely."""
    layer = nn.Linear(num_in, num_out, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer)
