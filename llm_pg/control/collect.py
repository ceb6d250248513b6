"""Sample rows of steps from an environment: whole episodes, or stretches of fixed length.

Axes: B rows (environments), T steps, D features of an observation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..rollouts import Rollouts
from .environments import RowEnvs
from .policies import ControlPolicy
from .spaces import Interface


@dataclass
class ControlRollouts(Rollouts):
    """Rollouts with what the policy saw and did.

    Attributes:
        feature_BT: what it saw, (B, T, D).
        action_BT: the raw action: an index (B, T), or a vector before clipping (B, T, A).
    """

    feature_BT: Tensor | None = None
    action_BT: Tensor | None = None


@dataclass
class Stretch:
    """What the environment did, row by row; `feature_BT` has one column more than the others, what came last.

    Attributes:
        mask_BT: False where a row had ended before (its next episode begins there) or does not move any more.
        terminated_BT, truncated_BT: the step that ended an episode by itself, or by the time limit.
        group_B: rows that started from the same state.
    """

    feature_BT: Tensor
    action_BT: Tensor
    reward_BT: Tensor
    mask_BT: Tensor
    terminated_BT: Tensor
    truncated_BT: Tensor
    group_B: Tensor

    @property
    def num_steps(self) -> int:
        return int(self.mask_BT.sum())

    def rollouts(
        self, logp_BT: Tensor, value_BT: Tensor | None, gamma: float, reward_scale: float, whole_episodes: bool
    ) -> ControlRollouts:
        """In the convention of time of `Rollouts`.

        A time limit is a cut, not an end: the value of the state after it replaces what would have followed. Without
        a critic nothing can, so that the rewards within the limit are the objective.

        Args:
            value_BT: V of all T + 1 columns of `feature_BT`, or None.
        """
        ended_BT = self.terminated_BT if value_BT is not None else self.terminated_BT | self.truncated_BT
        cut_BT = self.truncated_BT & ~self.terminated_BT
        if not whole_episodes:
            cut_BT = cut_BT.clone()
            cut_BT[:, -1] |= ~self.terminated_BT[:, -1]
        num_rows = len(self.group_B)
        return ControlRollouts(
            mask_BT=self.mask_BT,
            logp_BT=logp_BT,
            group_B=self.group_B,
            reward_BT=self.reward_BT * reward_scale if reward_scale != 1 else self.reward_BT,
            discount_BT=(self.mask_BT & ~ended_BT) * torch.tensor(gamma),
            cut_BT=cut_BT,
            valid_B=torch.ones(num_rows, dtype=torch.bool),
            truncated_B=self.truncated_BT.any(1) if whole_episodes else torch.zeros(num_rows, dtype=torch.bool),
            value_BT=None if value_BT is None else value_BT[:, :-1],
            bootstrap_BT=None if value_BT is None else value_BT[:, 1:],
            feature_BT=self.feature_BT[:, :-1],
            action_BT=self.action_BT,
        )


class Scaler:
    """Shows coordinates with finite bounds in [-1, 1] and leaves the others alone."""

    def __init__(self, interface: Interface, low: NDArray[Any] | None, high: NDArray[Any] | None) -> None:
        self.interface = interface
        self.centre_D, self.factor_D = np.float32(0.0), np.ones(interface.num_inputs, dtype=np.float32)
        if low is not None and high is not None:
            low, high = low.reshape(-1).astype(np.float64), high.reshape(-1).astype(np.float64)
            bounded = (np.abs(low) < 1e6) & (np.abs(high) < 1e6) & (high > low)
            low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
            self.centre_D = ((low + high) / 2).astype(np.float32)
            self.factor_D = (2 / (high - low)).astype(np.float32)

    def __call__(self, observation_B: NDArray[Any]) -> NDArray[np.float32]:
        features_BD = self.interface.features(observation_B)
        return features_BD if self.interface.one_hot else (features_BD - self.centre_D) * self.factor_D


class Episodes:
    """Returns and lengths of the episodes that ended, the last `window` of them kept for the mean."""

    def __init__(self, num_envs: int, window: int) -> None:
        self.window = window
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.true_returns: list[float] = []
        self.ended_at: list[int] = []
        self._return_B, self._true_B = np.zeros((2, num_envs))
        self.length_B = np.zeros(num_envs, dtype=np.int64)
        self._recent: deque[float] = deque(maxlen=window)

    def restart(self) -> None:
        self._return_B[:], self._true_B[:], self.length_B[:] = 0.0, 0.0, 0

    def add(
        self,
        reward_B: NDArray[Any],
        true_reward_B: NDArray[Any] | None,
        moved_B: NDArray[np.bool_],
        ended_B: NDArray[np.bool_],
        steps: int,
    ) -> None:
        self._return_B += reward_B * moved_B
        self.length_B += moved_B
        if true_reward_B is not None:
            self._true_B += true_reward_B * moved_B
        if not ended_B.any():
            return
        for row in np.flatnonzero(ended_B):
            true_return = None if true_reward_B is None else float(self._true_B[row])
            self.append(float(self._return_B[row]), int(self.length_B[row]), steps, true_return)
        self._return_B[ended_B], self._true_B[ended_B], self.length_B[ended_B] = 0.0, 0.0, 0

    def append(self, return_: float, length: int, ended_at: int, true_return: float | None) -> None:
        self.returns.append(return_)
        self.lengths.append(length)
        self.ended_at.append(ended_at)
        self._recent.append(return_)
        if true_return is not None:
            self.true_returns.append(true_return)

    def mean(self) -> float:
        """Mean return of the last `window` episodes; NaN before the first has ended."""
        return float(np.mean(self._recent)) if self._recent else float("nan")

    def std(self) -> float:
        return float(np.std(self._recent)) if self._recent else float("nan")

    @property
    def window_full(self) -> bool:
        return len(self._recent) == self.window


NOISE_STEPS = 64  # of whole episodes, drawn at once


class ControlCollector:
    """Moves the rows with a policy and keeps what happened.

    Args:
        num_steps: length of a stretch; 0 collects one whole episode a row, all starting together. So no row's
            number of episodes depends on how long they are, and the batch is an unbiased sample of episodes.
        seed: of the environments and of the actions.
    """

    def __init__(
        self,
        envs: RowEnvs,
        policy: ControlPolicy,
        scaler: Scaler,
        *,
        num_steps: int,
        group_size: int,
        seed: int,
        window: int,
    ) -> None:
        self.envs, self.policy, self.scaler = envs, policy, scaler
        self.num_steps, self.group_size = num_steps, group_size
        self.episodes = Episodes(envs.num_envs, window)
        self.steps = 0
        self._rng = np.random.default_rng(seed)
        self._first_seed: int | None = int(self._rng.integers(2**31))
        self._observation_B: NDArray[Any] | None = None
        self._over_B = np.zeros(envs.num_envs, dtype=bool)

    def collect(self) -> Stretch:
        """A stretch of `num_steps` from where the rows are, or one whole episode of each."""
        whole = not self.num_steps
        observation_B = self._reset() if whole or self._observation_B is None else self._observation_B
        active_B = np.ones(self.envs.num_envs, dtype=bool)
        num_columns = self.num_steps or NOISE_STEPS
        columns: list[tuple[NDArray[Any], ...]] = []
        while active_B.any() if whole else len(columns) < self.num_steps:
            at = len(columns) % num_columns
            if at == 0:
                noise_TBA = self.policy.noise(self._rng, num_columns, self.envs.num_envs)
            feature_BD = self.scaler(observation_B)
            raw_B, action_B = self.policy.act(feature_BD, noise_TBA[at])
            observation_B, reward_B, terminated_B, truncated_B, true_B = self.envs.step(action_B, active_B)
            if whole:
                moved_B = active_B
                terminated_B, truncated_B, reward_B = (
                    terminated_B & active_B,
                    truncated_B & active_B,
                    reward_B * active_B,
                )
            else:
                moved_B = ~self._over_B
            self._over_B = terminated_B | truncated_B
            self.steps += int(moved_B.sum())
            self.episodes.add(reward_B, true_B, moved_B, self._over_B, self.steps)
            columns.append((feature_BD, raw_B, reward_B, moved_B, terminated_B, truncated_B))
            if whole:
                active_B = active_B & ~self._over_B
        self._observation_B = observation_B
        return self._pack(columns, self.scaler(observation_B))

    def _reset(self) -> NDArray[Any]:
        observation_B = self.envs.reset(self._first_seed)
        self._first_seed = None
        self.episodes.restart()
        return observation_B

    def _pack(self, columns: list[tuple[NDArray[Any], ...]], last_BD: NDArray[np.float32]) -> Stretch:
        feature, raw, reward, mask, terminated, truncated = (np.stack(part, 1) for part in zip(*columns, strict=True))
        return Stretch(
            feature_BT=torch.from_numpy(np.concatenate([feature, last_BD[:, None]], 1)),
            action_BT=torch.from_numpy(raw),
            reward_BT=torch.from_numpy(reward.astype(np.float32)),
            mask_BT=torch.from_numpy(mask),
            terminated_BT=torch.from_numpy(terminated),
            truncated_BT=torch.from_numpy(truncated & ~terminated),
            group_B=torch.arange(self.envs.num_envs) // self.group_size,
        )
