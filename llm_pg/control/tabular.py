"""Tables as gymnasium environments, one at a time and vectorised, and their exact policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from ..estimators.tabular import expected_return, optimal_values
from .mdp import FiniteMDP, bandit, draw_grid, gridworld


class TabularEnv(gymnasium.Env[np.int64, np.int64]):
    """A `FiniteMDP` as an environment with Discrete spaces. `info["true_reward"]` is beside a proxy reward."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(self, mdp: FiniteMDP, render_mode: str | None = None) -> None:
        self.mdp = mdp
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Discrete(mdp.num_states)
        self.action_space = gymnasium.spaces.Discrete(mdp.num_actions)
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.int64, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(self.mdp.num_states, p=self.mdp.start_S))
        return np.int64(self.state), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        mdp, state = self.mdp, self.state
        reward = float(mdp.reward_SA[state, action])
        if mdp.noise:
            reward += mdp.noise * float(self.np_random.standard_normal())
        info = {} if mdp.true_reward_SA is None else {"true_reward": float(mdp.true_reward_SA[state, action])}
        self.state = int(self.np_random.choice(mdp.num_states, p=mdp.transition_SAS[state, action]))
        return np.int64(self.state), reward, bool(mdp.terminal_S[self.state]), False, info

    def render(self) -> str:  # type: ignore[override]
        return f"state {self.state}" if self.mdp.shape is None else draw_grid(self.mdp, self.state)


class TabularVectorEnv(gymnasium.vector.VectorEnv):
    """The same, all rows in one step. A row that ended starts anew at its next step, whose action is ignored.

    `reset(options={"group_size": G})` starts each G rows in a row from the same state.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, mdp: FiniteMDP, num_envs: int, max_episode_steps: int) -> None:
        self.mdp, self.num_envs, self.max_episode_steps = mdp, num_envs, max_episode_steps
        self.single_observation_space = gymnasium.spaces.Discrete(mdp.num_states)
        self.single_action_space = gymnasium.spaces.Discrete(mdp.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._cumulative_SAS = mdp.transition_SAS.cumsum(2)
        self._cumulative_S = mdp.start_S.cumsum()

    def _start(self, num_rows: int) -> NDArray[np.int64]:
        return self._draw(self._cumulative_S[None].repeat(num_rows, 0))

    def _draw(self, cumulative_BS: NDArray[np.float64]) -> NDArray[np.int64]:
        # Only S-1 bounds are compared, so a sum that rounds to just under 1 cannot lead outside the states.
        threshold_B1 = self.np_random.random((len(cumulative_BS), 1))
        return (cumulative_BS[:, :-1] <= threshold_B1).sum(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        super().reset(seed=seed)
        group_size = (options or {}).get("group_size", 1)
        self.state_B = self._start(self.num_envs // group_size).repeat(group_size)
        self.age_B = np.zeros(self.num_envs, dtype=np.int64)
        self.over_B = np.zeros(self.num_envs, dtype=bool)
        return self.state_B.copy(), {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        mdp, restart_B = self.mdp, self.over_B
        reward_B = mdp.reward_SA[self.state_B, actions]
        if mdp.noise:
            reward_B = reward_B + mdp.noise * self.np_random.standard_normal(self.num_envs)
        info = {}
        if mdp.true_reward_SA is not None:
            info["true_reward"] = np.where(restart_B, 0.0, mdp.true_reward_SA[self.state_B, actions])
        state_B = self._draw(self._cumulative_SAS[self.state_B, actions])
        self.age_B += 1
        terminated_B = mdp.terminal_S[state_B]
        truncated_B = (self.age_B >= self.max_episode_steps) & ~terminated_B
        if restart_B.any():
            state_B[restart_B] = self._start(int(restart_B.sum()))
            self.age_B[restart_B] = 0
            reward_B = np.where(restart_B, 0.0, reward_B)
            terminated_B, truncated_B = terminated_B & ~restart_B, truncated_B & ~restart_B
        self.state_B, self.over_B = state_B, terminated_B | truncated_B
        return state_B.copy(), reward_B, terminated_B, truncated_B, info


ENVIRONMENTS: dict[str, tuple[Callable[..., FiniteMDP], float | None]] = {
    "llm_pg/SigmoidBandit-v0": (lambda **kw: bandit([1.0, 0.0]), 0.98),
    "llm_pg/KArmedBandit-v0": (lambda k=10, noise=1.0: bandit(_arm_means(k), noise), 1.4),
    "llm_pg/GridWorld-v0": (gridworld, 0.3),
    "llm_pg/HackableGridWorld-v0": (lambda **kw: gridworld(coin_reward=0.5, **kw), None),
}


def _arm_means(k: int) -> list[float]:
    """Means of the k arms, drawn once from N(0, 1) with a fixed seed (the testbed of Sutton and Barto)."""
    return [float(mean) for mean in np.random.default_rng(0).standard_normal(k)]


def build(name: str, **options: Any) -> FiniteMDP:
    return ENVIRONMENTS[name][0](**options)


def _single(name: str) -> Any:
    def make(render_mode: str | None = None, **options: Any) -> TabularEnv:
        return TabularEnv(build(name, **options), render_mode)

    make.metadata = TabularEnv.metadata  # type: ignore[attr-defined]
    return make


def _vector(name: str) -> Any:
    def make(num_envs: int, max_episode_steps: int, **options: Any) -> TabularVectorEnv:
        return TabularVectorEnv(build(name, **options), num_envs, max_episode_steps)

    return make


def register() -> None:
    """Make the environments known to gymnasium; calling it twice does nothing."""
    for name, (_, threshold) in ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=_single(name),
                vector_entry_point=_vector(name),
                max_episode_steps=build(name).horizon,
                reward_threshold=threshold,
            )


def tensors(mdp: FiniteMDP, true_reward: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """transition_SAS, reward_SA and start_S in float64."""
    reward_SA = mdp.true_reward_SA if true_reward and mdp.true_reward_SA is not None else mdp.reward_SA
    return torch.from_numpy(mdp.transition_SAS), torch.from_numpy(reward_SA), torch.from_numpy(mdp.start_S)


def exact_gradient(mdp: FiniteMDP, logits_SA: Tensor, discount: float = 1.0) -> tuple[Tensor, Tensor]:
    """J(π) and ∇J with respect to the logits of a softmax policy, by dynamic programming.

    Args:
        logits_SA: scores of the actions in each state; any real dtype, computed in float64.
        discount: γ of the objective.

    Returns:
        J, a scalar, and ∇J, (S, A).
    """
    transition_SAS, reward_SA, start_S = tensors(mdp)
    logits_SA = logits_SA.detach().double().requires_grad_()
    value = expected_return(logits_SA.softmax(1), transition_SAS, reward_SA, start_S, mdp.horizon, discount)
    (gradient_SA,) = torch.autograd.grad(value, logits_SA)
    return value.detach(), gradient_SA


def optimal_return(mdp: FiniteMDP) -> float:
    """The largest expected return that any policy reaches within the horizon."""
    transition_SAS, reward_SA, start_S = tensors(mdp)
    return float(start_S @ optimal_values(transition_SAS, reward_SA, mdp.horizon)[0])
