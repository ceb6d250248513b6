"""From a stretch of experience to a step of the policy, through `Algorithm` alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from ..algorithms.algorithm import Algorithm, Batch
from .collect import ControlRollouts, Stretch
from .policies import ControlPolicy
from .settings import ControlSettings

# torch.optim's functions and not its classes: the bookkeeping of a class costs more than the arithmetic of a small
# tensor, and the first object imports a compiler, a second of every process. foreach=False, as the kernels for many
# tensors round differently. eps as A2C and PPO are usually run.
Move = Callable[[float], None]  # by theta.grad, at a learning rate


def _adam(theta: Tensor) -> Move:
    means, squares, num_steps = [torch.zeros_like(theta)], [torch.zeros_like(theta)], [torch.zeros(())]
    options: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0}
    options.update(foreach=False, amsgrad=False, maximize=False)
    return lambda lr: adam([theta], [_grad(theta)], means, squares, [], num_steps, lr=lr, **options)


def _rmsprop(theta: Tensor) -> Move:
    squares, num_steps = [torch.zeros_like(theta)], [torch.zeros(())]
    options: dict[str, Any] = {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0.0, "momentum": 0.0}
    options.update(foreach=False, centered=False)
    return lambda lr: rmsprop([theta], [_grad(theta)], squares, [], [], num_steps, lr=lr, **options)


def _sgd(theta: Tensor) -> Move:
    options: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
    options.update(foreach=False, nesterov=False, maximize=False)
    return lambda lr: sgd([theta], [_grad(theta)], [None], lr=lr, **options)


def _grad(theta: Tensor) -> Tensor:
    assert theta.grad is not None
    return theta.grad


OPTIMIZERS: dict[str, Callable[[Tensor], Move]] = {"adam": _adam, "rmsprop": _rmsprop, "sgd": _sgd}


class ControlLearner:
    """Holds the policy's optimiser and the algorithm's state.

    Args:
        optimize: False leaves the step to somebody else (an asynchronous worker's parent): gradients only.
    """

    def __init__(
        self, settings: ControlSettings, policy: ControlPolicy, horizon: int | None, optimize: bool = True
    ) -> None:
        self.settings, self.policy = settings, policy
        self.algorithm = Algorithm(settings.spec, max_completion_length=horizon)
        self.learning_rate = settings.learning_rate
        self._move = OPTIMIZERS[settings.optimizer](policy.theta) if optimize else None
        self._rng = np.random.default_rng(settings.seed)

    def update(self, stretch: Stretch, progress: float) -> dict[str, float]:
        """One update from one stretch; statistics as means over steps.

        Args:
            progress: share of the run that is over, 0..1.
        """
        settings = self.settings
        self.set_learning_rate(progress)
        once = settings.num_epochs == 1 and settings.num_minibatches == 1
        # With a single pass the forward that the weights need is also the one that is differentiated.
        with torch.set_grad_enabled(once):
            batch, parts = self.compute_batch(stretch, progress)
        if once:
            stats = self._step(batch, parts, 1)
        else:
            stats = self._epochs(batch)
        self.algorithm.observe_kl(stats["approx_kl"])
        self.algorithm.observe_entropy(stats["entropy"])
        stats["entropy_coef"] = batch.entropy_coef
        if self.algorithm.kl_penalty is not None:
            stats["kl_penalty"] = self.algorithm.kl_penalty.weight
        return stats

    def gradient(self, stretch: Stretch, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The gradient of the loss over the stretch, flat and a copy, and no step."""
        with torch.enable_grad():
            batch, parts = self.compute_batch(stretch, progress)
        stats = self.backward(batch, parts, 1)
        return self.policy.grad.clone(), stats

    def set_learning_rate(self, progress: float) -> None:
        settings = self.settings
        if settings.learning_rate_final is not None:
            change = settings.learning_rate_final - settings.learning_rate
            self.learning_rate = settings.learning_rate + change * min(progress, 1.0)

    def compute_batch(self, stretch: Stretch, progress: float) -> tuple[Batch, tuple[Tensor, Tensor, Tensor | None]]:
        """The weighed steps inside the mask, a row each where the algorithm allows it, and their forward pass."""
        settings, mask_BT = self.settings, stretch.mask_BT
        critic = settings.spec.needs_critic
        logp_N, entropy_N, value_N = self.policy.evaluate(
            stretch.feature_BT[:, :-1][mask_BT], stretch.action_BT[mask_BT]
        )
        value_BT = None
        if critic:
            with torch.no_grad():
                value_BT = self.policy.values(stretch.feature_BT.flatten(0, 1)).view(stretch.feature_BT.shape[:2])
        logp_BT = torch.zeros(mask_BT.shape)
        logp_BT[mask_BT] = logp_N.detach()
        rollouts = stretch.rollouts(
            logp_BT, value_BT, settings.spec.gamma, settings.reward_scale, whole_episodes=settings.num_steps == 0
        )
        batch = self.algorithm.compute_advantages(rollouts, progress=progress)
        batch.proximal_logp_BT = logp_BT
        if self._by_steps:
            batch = batch.steps()
        return batch, (logp_N, entropy_N, value_N)

    @property
    def _by_steps(self) -> bool:
        """Ratios of whole rows need whole rows, unless every ratio is 1 because nothing is used twice."""
        settings = self.settings
        once = settings.num_epochs == 1 and settings.num_minibatches == 1
        return once or settings.spec.importance_sampling_level == "token"

    def _epochs(self, batch: Batch) -> dict[str, float]:
        num_parts = self.settings.num_minibatches
        num_rows = len(batch.mask_BT)
        if num_rows < num_parts:
            raise ValueError(
                f"A batch of {num_rows} rows cannot be cut into {num_parts} minibatches; take fewer minibatches or "
                "more environments."
            )
        bounds = np.linspace(0, num_rows, num_parts + 1).astype(int)
        history: list[dict[str, Any]] = []
        for epoch in range(self.settings.num_epochs):
            last = epoch == self.settings.num_epochs - 1
            shuffled = batch.rows(torch.from_numpy(self._rng.permutation(num_rows)))
            for low, high in itertools.pairwise(bounds):
                part = shuffled if num_parts == 1 else shuffled.rows(slice(int(low), int(high)))
                stats = self._step(part, self.forward(part), num_parts, measure=last)
                if last:  # it tells how far the update went
                    history.append(stats)
        return {key: float(np.mean([stats[key] for stats in history])) for key in history[0]}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        rollouts = batch.rollouts
        assert isinstance(rollouts, ControlRollouts)
        assert rollouts.feature_BT is not None
        assert rollouts.action_BT is not None
        return self.policy.evaluate(rollouts.feature_BT.flatten(0, 1), rollouts.action_BT.flatten(0, 1))

    def _step(
        self, batch: Batch, forward: tuple[Tensor, Tensor, Tensor | None], num_parts: int, measure: bool = True
    ) -> dict[str, float]:
        stats = self.backward(batch, forward, num_parts, measure)
        stats["grad_norm"] = self.apply()
        return stats

    def apply(self) -> float:
        """A clipped step along the policy's gradient; returns the norm that it had before the clipping."""
        assert self._move is not None
        grad = self.policy.grad
        norm = float(torch.linalg.vector_norm(grad))
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            grad.mul_(limit / norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of {self.settings.spec.name} on {self.settings.env} is {norm}: the run has diverged. "
                f"Take a smaller learning rate than {self.settings.learning_rate} or a smaller reward_scale."
            )
        self._move(self.learning_rate)
        return norm

    def backward(
        self, batch: Batch, forward: tuple[Tensor, Tensor, Tensor | None], num_parts: int, measure: bool = True
    ) -> dict[str, float]:
        """The gradient of the mean over one of `num_parts` equal parts: the scales are those of the whole batch."""
        shape = batch.mask_BT.shape
        logp_BT, entropy_BT = forward[0].view(shape), forward[1].view(shape)
        value_BT = None if forward[2] is None else forward[2].view(shape)
        loss, stats = self.algorithm.loss(logp_BT, batch, entropy_BT=entropy_BT, value_BT=value_BT, measure=measure)
        self.policy.backward(loss * num_parts)
        return {key: float(value) * num_parts for key, value in stats.items()} if measure else {}
