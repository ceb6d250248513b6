"""Finite decision processes: bandits and grid worlds as tables, so that ∇J is known exactly.

Axes: S states, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ARROWS = "↑→↓←"
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


@dataclass(frozen=True)
class FiniteMDP:
    """A decision process in tables.

    Attributes:
        transition_SAS: p(s'|s, a); terminal states lead to themselves.
        reward_SA: mean reward of the step; 0 in terminal states.
        start_S: distribution of the first state.
        terminal_S: bool; reaching one ends the episode.
        horizon: steps after which an episode is cut, >= 1.
        true_reward_SA: what the designer wanted, where the reward is only a proxy of it.
        noise: standard deviation of Gaussian noise on each reward.
        shape: rows and columns where the states form a grid.
        marks: letters drawn on cells of the grid.
    """

    transition_SAS: Floats
    reward_SA: Floats
    start_S: Floats
    terminal_S: NDArray[np.bool_]
    horizon: int
    true_reward_SA: Floats | None = None
    noise: float = 0.0
    shape: tuple[int, int] | None = None
    marks: dict[int, str] = field(default_factory=dict)

    @property
    def num_states(self) -> int:
        return self.reward_SA.shape[0]

    @property
    def num_actions(self) -> int:
        return self.reward_SA.shape[1]


def bandit(means: list[float], noise: float = 0.0) -> FiniteMDP:
    """One decision, then the end. State 0 decides, state 1 is over."""
    num_arms = len(means)
    transition_SAS = np.zeros((2, num_arms, 2))
    transition_SAS[:, :, 1] = 1.0
    return FiniteMDP(
        transition_SAS=transition_SAS,
        reward_SA=np.array([means, [0.0] * num_arms]),
        start_S=np.array([1.0, 0.0]),
        terminal_S=np.array([False, True]),
        horizon=1,
        noise=noise,
    )


def gridworld(
    size: int = 4,
    horizon: int = 50,
    step_reward: float = -0.1,
    goal_reward: float = 1.0,
    slip: float = 0.0,
    coin_reward: float = 0.0,
) -> FiniteMDP:
    """From the top left to the bottom right of a square grid; walls hold the walker where it is.

    With `coin_reward` the cell two to the right of the start pays each time it is entered, which the designer meant
    as a hint towards the goal: a proxy that a walker can milk for ever. The true reward leaves the coin out.

    Args:
        size: cells a side, >= 3. horizon: steps before the cut.
        slip: probability in [0, 1) that a random move replaces the chosen one.
    """
    num_states, goal, coin = size * size, size * size - 1, 2
    to_SA = np.zeros((num_states, 4), dtype=int)
    for state in range(num_states):
        for action, (down, right) in enumerate(MOVES):
            row = min(max(state // size + down, 0), size - 1)
            column = min(max(state % size + right, 0), size - 1)
            to_SA[state, action] = state if state == goal else row * size + column
    transition_SAS = (1 - slip) * np.eye(num_states)[to_SA]
    transition_SAS += slip * transition_SAS.mean(1, keepdims=True) / (1 - slip)
    alive_S1 = (np.arange(num_states) != goal)[:, None]
    true_reward_SA = alive_S1 * (step_reward + goal_reward * transition_SAS[:, :, goal])
    entered_SA = transition_SAS[:, :, coin] * (np.arange(num_states) != coin)[:, None]
    return FiniteMDP(
        transition_SAS=transition_SAS,
        reward_SA=true_reward_SA + alive_S1 * coin_reward * entered_SA,
        start_S=np.eye(num_states)[0],
        terminal_S=np.arange(num_states) == goal,
        horizon=horizon,
        true_reward_SA=true_reward_SA if coin_reward else None,
        shape=(size, size),
        marks={0: "S", goal: "G", **({coin: "$"} if coin_reward else {})},
    )


def draw_grid(mdp: FiniteMDP, state: int | None = None, action_S: NDArray[np.int64] | None = None) -> str:
    """The grid as text: an arrow for each cell's action where given, marks, and the walker as @."""
    assert mdp.shape is not None
    rows, columns = mdp.shape
    cells = []
    for s in range(rows * columns):
        mark = mdp.marks.get(s, "·")
        if action_S is not None and not mdp.terminal_S[s]:
            mark = ARROWS[int(action_S[s])]
        cells.append("@" if s == state else mark)
    return "\n".join(" ".join(cells[r * columns : (r + 1) * columns]) for r in range(rows))
