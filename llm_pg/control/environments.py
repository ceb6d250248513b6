"""Find an environment by a short or a full name, and step many copies of it at once.

Both ways of stepping follow one rule, gymnasium's NEXT_STEP: a row that ended shows its true last observation, and its
next step starts a new episode, ignores its action and is no step of the policy. So the value after a time limit is that
of the next column, and no observation has to be fetched from an info dictionary.
"""

from __future__ import annotations

import difflib
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, Error
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from . import tabular
from .settings import SHORT_NAMES
from .spaces import Interface, describe

INSTALL = {"box2d": 'pip install "gymnasium[box2d]"', "pygame": 'pip install "gymnasium[classic-control]"'}


class RowEnvs(Protocol):
    """`num_envs` copies of an environment, each a row.

    `reset` starts all rows, each `group_size` neighbours from the same state. `step` returns next observations
    (B, ...), rewards, terminated, truncated and, where the environment tells it, the true reward behind a proxy. Rows
    outside `active_B` need not move.
    """

    num_envs: int

    def reset(self, seed: int | None) -> NDArray[Any]: ...

    def step(
        self, action_B: NDArray[Any], active_B: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], NDArray[Any] | None]: ...

    def close(self) -> None: ...


class Vectorised:
    """An environment whose authors wrote all rows as one array operation."""

    def __init__(self, env_id: str, num_envs: int, group_size: int, options: dict[str, Any]) -> None:
        self.num_envs = num_envs
        self._options = {"group_size": group_size} if group_size > 1 else None
        self._envs = gymnasium.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **options)
        if self._envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise ValueError(f"{env_id} has a vectorised form that does not restart its rows at the next step.")

    def reset(self, seed: int | None) -> NDArray[Any]:
        return self._envs.reset(seed=seed, options=self._options)[0]

    def step(
        self, action_B: NDArray[Any], active_B: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], NDArray[Any] | None]:
        observation_B, reward_B, terminated_B, truncated_B, info = self._envs.step(action_B)
        return observation_B, reward_B, terminated_B, truncated_B, info.get("true_reward")

    def close(self) -> None:
        self._envs.close()


class Listed:
    """Copies stepped one after the other; unlike gymnasium's SyncVectorEnv only the rows that are wanted.

    A group starts from the same state by the same seed, which also gives its rows the same chance inside the
    environment for as long as they draw alike.
    """

    def __init__(self, env_id: str, num_envs: int, group_size: int, options: dict[str, Any]) -> None:
        self.num_envs, self.group_size = num_envs, group_size
        self._envs = [gymnasium.make(env_id, disable_env_checker=True, **options) for _ in range(num_envs)]
        self._rng = np.random.default_rng()

    def reset(self, seed: int | None) -> NDArray[Any]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        seeds = self._rng.integers(2**31, size=self.num_envs // self.group_size).repeat(self.group_size)
        first = [env.reset(seed=int(s))[0] for env, s in zip(self._envs, seeds, strict=True)]
        self._observation_B = np.stack(first)
        self._reward_B = np.zeros(self.num_envs)
        self._terminated_B, self._truncated_B = np.zeros((2, self.num_envs), dtype=bool)
        self._true_reward_B: NDArray[Any] | None = None
        return self._observation_B.copy()

    def step(
        self, action_B: NDArray[Any], active_B: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], NDArray[Any] | None]:
        reward_B = np.zeros(self.num_envs)
        true_B = None
        over = (self._terminated_B | self._truncated_B).tolist()
        self._terminated_B, self._truncated_B = np.zeros((2, self.num_envs), dtype=bool)
        for row in np.flatnonzero(active_B).tolist():
            if over[row]:
                self._observation_B[row] = self._envs[row].reset()[0]
                continue
            observation, reward_B[row], terminated, truncated, info = self._envs[row].step(action_B[row])
            self._observation_B[row] = observation
            if terminated or truncated:
                self._terminated_B[row], self._truncated_B[row] = terminated, truncated
            if "true_reward" in info:
                true_B = np.zeros(self.num_envs) if true_B is None else true_B
                true_B[row] = info["true_reward"]
        return self._observation_B.copy(), reward_B, self._terminated_B, self._truncated_B, true_B

    def close(self) -> None:
        for env in self._envs:
            env.close()


def known_names() -> list[str]:
    """Short names first, then every name registered with gymnasium."""
    tabular.register()
    return [*SHORT_NAMES, *sorted(gymnasium.registry)]


def full_name(name: str) -> str:
    """The registered id of a short or full name; ValueError with the nearest names where there is none."""
    tabular.register()
    env_id = SHORT_NAMES.get(name.lower(), name)
    try:
        gymnasium.spec(env_id)
    except (Error, ModuleNotFoundError) as error:
        lower = {known.lower(): known for known in known_names()}
        near = difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(lower[match] for match in near)}?" if near else ""
        raise ValueError(
            f"There is no environment {name!r} ({error}).{hint} Short names: {', '.join(SHORT_NAMES)}; every other "
            "name that gymnasium knows works as well, also `module:Name-v0`."
        ) from error
    return env_id


def inspect(env_id: str, options: dict[str, Any] | None = None) -> Interface:
    """Sizes and kinds of both spaces; ValueError where a package is missing or a space is unsupported."""
    tabular.register()
    try:
        env = gymnasium.make(env_id, disable_env_checker=True, **(options or {}))
    except (DependencyNotInstalled, ModuleNotFoundError) as error:
        need = next((line for word, line in INSTALL.items() if word in str(error).lower()), None)
        raise ValueError(
            f"{env_id} needs a package that is not installed ({error}). "
            + (f"Install it with: {need}" if need else "Install what it names.")
        ) from error
    except (Error, TypeError) as error:
        raise ValueError(f"{env_id} could not be made: {error}") from error
    spec = gymnasium.spec(env_id)
    horizon = env.spec.max_episode_steps if env.spec is not None else spec.max_episode_steps
    try:
        return describe(env_id, env.observation_space, env.action_space, horizon)
    finally:
        env.close()


def reward_threshold(env_id: str) -> float | None:
    """The mean return over 100 episodes at which the environment counts as solved, where gymnasium names one."""
    # Pendulum has none there; -200 is what its literature uses.
    return -200.0 if env_id == "Pendulum-v1" else gymnasium.spec(env_id).reward_threshold


def make_rows(env_id: str, num_envs: int, group_size: int = 1, options: dict[str, Any] | None = None) -> RowEnvs:
    """`num_envs` rows of an environment: its own vectorised form where it has one, a list of copies otherwise."""
    if num_envs % group_size:
        raise ValueError(f"{num_envs} environments cannot be cut into groups of {group_size}; take a multiple of it.")
    ours = env_id in tabular.ENVIRONMENTS
    if gymnasium.spec(env_id).vector_entry_point is not None and (ours or group_size == 1):
        return Vectorised(env_id, num_envs, group_size, options or {})
    return Listed(env_id, num_envs, group_size, options or {})
