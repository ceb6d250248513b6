"""How much of a step's gradient is signal: from the squared lengths of its parts, without a second pass.

A step's gradient is a sum over groups of rollouts. Cut into parts (two halves, or the micro-batches that gradient
accumulation makes anyway) it is g = Σ_k g_k, where part k holds n_k of the N groups and the reduction already
divided by N. For independent groups of mean μ and covariance Σ

    E|g|² = |μ|² + tr Σ / N          E|g_k|² = (n_k/N)² |μ|² + n_k tr Σ / N²

so two measured numbers, |g|² and Σ_k |g_k|², give unbiased estimates of |μ|² and of tr Σ. The groups are not quite
independent where a whole batch is normalised (batch mean or deviation, token mean); the error is of order 1/N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientNoise:
    """Unbiased estimates from one step.

    Attributes:
        signal: |μ|², squared length of the expected gradient; negative when the noise hides it.
        noise: tr Σ, variance of one group's gradient.
        num_groups: N, groups in the step.
    """

    signal: float
    noise: float
    num_groups: int


def square_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Σ |x|² over tensors, float64, on the device of the first; a scalar tensor, so that nothing waits for it.

    Args:
        tensors: any shapes and devices.
    """
    total: Tensor | None = None
    for x in tensors:
        square = x.detach().float().square().sum(dtype=torch.float64)
        total = square if total is None else total + square.to(total.device)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def half_square_norms(first: Iterable[Tensor], whole: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """|g_1|², |g - g_1|² and |g|² from the gradient kept after the first half and the one after both.

    Args:
        first: a copy of each gradient after the first half of the micro-batches.
        whole: the gradients after all of them, in the same order.
    """
    first, whole = list(first), list(whole)
    rest = (total.detach().float() - part.detach().float() for part, total in zip(first, whole, strict=True))
    return square_norm(first), square_norm(rest), square_norm(whole)


def gradient_noise(part_squares: Sequence[float], whole_square: float, part_groups: Sequence[int]) -> GradientNoise:
    """Signal and noise of a step's gradient.

    |μ|² ≈ (|g|² - Σ_k |g_k|²) / (1 - Σ_k (n_k/N)²) and tr Σ ≈ N (|g|² - |μ|²).

    Bias: none for independent groups; any two parts of whole groups will do, halves have the least variance.

    Args:
        part_squares: |g_k|² of each part, which add up to the whole gradient (not averages of their own).
        whole_square: |g|².
        part_groups: n_k, groups in each part, all >= 1, at least two parts.

    Raises:
        ValueError: for fewer than two parts, or an empty one.

    Source: the two-batch estimator of McCandlish et al. 2018 (arXiv 1812.06162, appendix A), for parts of a sum.
    """
    if len(part_groups) < 2 or len(part_groups) != len(part_squares) or min(part_groups) < 1:
        raise ValueError(
            f"Signal and noise are distinguished by at least two parts of a step, each of whole groups; got "
            f"{len(part_squares)} squared lengths for parts of {list(part_groups)} groups. A step of one group has "
            f"no noise estimate: sample more prompts a step."
        )
    num_groups = sum(part_groups)
    overlap = sum((n / num_groups) ** 2 for n in part_groups)
    signal = (whole_square - math.fsum(part_squares)) / (1 - overlap)
    return GradientNoise(signal, num_groups * (whole_square - signal), num_groups)


class NoiseScale:
    """Averages of the estimates over steps, and the two ratios that are read off them.

    One step's estimates are themselves noisy and their ratio is biased, so signal and noise are averaged separately,
    exponentially and corrected for the start, before they are divided.

    Args:
        decay: weight of the past in [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of an average must be in [0, 1); it is {decay}. 0.9 remembers ten estimates.")
        self.decay = decay
        self.signal = 0.0
        self.noise = 0.0
        self.weight = 0.0

    def update(self, estimate: GradientNoise) -> None:
        kept, new = self.decay, 1 - self.decay
        self.signal = kept * self.signal + new * estimate.signal
        self.noise = kept * self.noise + new * estimate.noise
        self.weight = kept * self.weight + new

    @property
    def simple_noise_scale(self) -> float:
        """B_simple = tr Σ / |μ|², in groups: the number of groups a step at which noise and signal are equal.

        Far fewer waste the learning rate, far more waste samples. inf while the noise hides the signal.
        """
        return self.noise / self.signal if self.signal > 0 else math.inf

    def signal_to_noise(self, num_groups: int) -> float:
        """|μ| / sqrt(tr Σ / N), length of the expected gradient over the deviation of a step's; 0 while hidden.

        Args:
            num_groups: N, groups of a step, >= 1.
        """
        if self.signal <= 0:
            return 0.0
        return math.sqrt(num_groups * self.signal / self.noise) if self.noise > 0 else math.inf

    def state_dict(self) -> dict[str, float]:
        return {"signal": self.signal, "noise": self.noise, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.signal, self.noise, self.weight = (float(state[key]) for key in ("signal", "noise", "weight"))
