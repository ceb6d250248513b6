"""From the scores of a network to actions: a softmax over choices, or a Gaussian over vectors.

A head draws with numpy (one call a step, no graph) and scores with torch what was drawn; `noise` for a whole stretch of
steps is made in one call. N steps, A coordinates or choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..estimators.distributions import entropy, gaussian_entropy, gaussian_logp, tanh_log_jacobian, token_logp
from ..words import one_of
from .settings import HEADS
from .spaces import Interface

LOG_STD_RANGE = (-5.0, 2.0)


class SoftmaxHead(nn.Module):
    """π(a|s) = softmax(scores)_a. The raw action is the index."""

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.num_scores = interface.num_outputs
        self.first_action = interface.first_action

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """Gumbel noise: the largest of scores + noise is a draw from the softmax."""
        uniform = rng.random((*shape, self.num_scores), dtype=np.float32)
        # A uniform draw of exactly 0 would be +inf - inf further on.
        return -np.log(-np.log(np.maximum(uniform, np.float32(1e-12))))

    def draw(self, scores_NA: NDArray[np.float32], noise_NA: NDArray[np.float32] | float) -> NDArray[np.int64]:
        return (scores_NA + noise_NA).argmax(1)

    def to_env(self, raw_N: NDArray[np.int64]) -> NDArray[np.int64]:
        return raw_N + self.first_action if self.first_action else raw_N

    def logp(self, scores_NA: Tensor, raw_N: Tensor) -> Tensor:
        return token_logp(scores_NA, raw_N)

    def entropy(self, scores_NA: Tensor, raw_N: Tensor) -> Tensor:
        return entropy(scores_NA)


class SigmoidHead(SoftmaxHead):
    """Two actions and one score: π(a = first) = σ(score). The softmax of (score, 0)."""

    def __init__(self, interface: Interface) -> None:
        super().__init__(interface)
        if interface.num_outputs != 2:
            raise ValueError(
                f"{interface.name} has {interface.num_outputs} actions; a sigmoid policy chooses between 2. Use linear."
            )
        self.num_scores = 1

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """Logistic noise, the difference of two Gumbel draws."""
        uniform = np.clip(rng.random((*shape, 1)), 1e-12, 1 - 1e-12)
        return np.log(uniform / (1 - uniform)).astype(np.float32)

    def draw(self, scores_NA: NDArray[np.float32], noise_NA: NDArray[np.float32] | float) -> NDArray[np.int64]:
        return (scores_NA + noise_NA <= 0)[:, 0].astype(np.int64)

    def logp(self, scores_NA: Tensor, raw_N: Tensor) -> Tensor:
        return token_logp(self._both(scores_NA), raw_N)

    def entropy(self, scores_NA: Tensor, raw_N: Tensor) -> Tensor:
        return entropy(self._both(scores_NA))

    def _both(self, scores_NA: Tensor) -> Tensor:
        return torch.cat([scores_NA, torch.zeros_like(scores_NA)], -1)


class GaussianHead(nn.Module):
    """N(mean(s), σ²) with a learned σ per coordinate. The raw action is the draw before clipping or squashing.

    Without `squash` the environment gets the draw clipped to its bounds and the log-probability is that of the
    unclipped draw. With `squash` it gets low + (tanh(draw) + 1)/2 (high - low), and the log-probability is corrected
    for that change of variables.
    """

    def __init__(self, interface: Interface, squash: bool, log_std: float) -> None:
        super().__init__()
        self.num_scores = interface.num_outputs
        self.squash = squash
        self.low, self.high = interface.low, interface.high
        if squash and not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError(
                f"{interface.name} has an action without bounds ({self.low} to {self.high}); tanh_gaussian squashes "
                "into bounds. Use the gaussian head."
            )
        self.log_std = nn.Parameter(torch.full((self.num_scores,), float(log_std)))
        self.log_scale = float(np.log((self.high - self.low) / 2).sum()) if squash else 0.0

    def _log_std(self) -> Tensor:
        return self.log_std.clamp(*LOG_STD_RANGE)

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return rng.standard_normal((*shape, self.num_scores), dtype=np.float32)

    def draw(self, scores_NA: NDArray[np.float32], noise_NA: NDArray[np.float32] | float) -> NDArray[np.float32]:
        return scores_NA + np.exp(self.log_std.detach().numpy().clip(*LOG_STD_RANGE)) * noise_NA

    def to_env(self, raw_NA: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.squash:
            return self.low + (np.tanh(raw_NA) + 1) / 2 * (self.high - self.low)
        return np.minimum(np.maximum(raw_NA, self.low), self.high)

    def logp(self, scores_NA: Tensor, raw_NA: Tensor) -> Tensor:
        logp_N = gaussian_logp(raw_NA, scores_NA, self._log_std())
        return logp_N - tanh_log_jacobian(raw_NA) - self.log_scale if self.squash else logp_N

    def entropy(self, scores_NA: Tensor, raw_NA: Tensor) -> Tensor:
        """Exact without `squash`; with it, an unbiased estimate from the draw, whose gradient is pathwise."""
        log_std = self._log_std()
        entropy_N = gaussian_entropy(log_std).expand(len(scores_NA))
        if not self.squash:
            return entropy_N
        z_NA = ((raw_NA - scores_NA) * (-log_std).exp()).detach()
        return entropy_N + tanh_log_jacobian(scores_NA + log_std.exp() * z_NA) + self.log_scale


def make_head(interface: Interface, head: str, log_std: float) -> Any:
    """The head by name: auto, softmax, sigmoid, gaussian, tanh_gaussian. Mismatches are refused by the adviser."""
    if head == "auto":
        head = "softmax" if interface.discrete else "gaussian"
    if head == "softmax":
        return SoftmaxHead(interface)
    if head == "sigmoid":
        return SigmoidHead(interface)
    one_of("head", head, HEADS)
    return GaussianHead(interface, head == "tanh_gaussian", log_std)
