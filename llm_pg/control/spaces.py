"""What a policy sees of an environment's spaces: numbers in, an action index or a vector out.

Discrete observations are one-hot, boxes are flattened; anything else is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interface:
    """Sizes of both ends, as the adviser and the policies need them.

    Attributes:
        num_inputs: features of an observation. one_hot: they are the states of a Discrete space.
        num_outputs: actions of a Discrete space, or coordinates of a Box.
        discrete: True for a Discrete action space.
        low, high: bounds of a Box action, (A,); may be infinite.
        first: smallest action or observation number of a Discrete space (gymnasium lets it start anywhere).
        horizon: steps after which gymnasium cuts an episode; None = no limit.
    """

    name: str
    num_inputs: int
    one_hot: bool
    num_outputs: int
    discrete: bool
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    first_action: int
    first_state: int
    horizon: int | None

    def features(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """(B, ...) observations -> (B, num_inputs) float32."""
        if self.one_hot:
            return np.eye(self.num_inputs, dtype=np.float32)[observation - self.first_state]
        return observation.reshape(len(observation), -1).astype(np.float32, copy=False)


def describe(name: str, observation_space: spaces.Space, action_space: spaces.Space, horizon: int | None) -> Interface:
    """The interface of an environment, or ValueError that names the space it cannot serve."""
    one_hot = isinstance(observation_space, spaces.Discrete)
    if isinstance(observation_space, spaces.Discrete):
        num_inputs, first_state = int(observation_space.n), int(observation_space.start)
    elif isinstance(observation_space, spaces.Box) and len(observation_space.shape) in (1, 2):
        num_inputs, first_state = math.prod(observation_space.shape), 0
    else:
        raise ValueError(
            f"{name} has the observation space {observation_space}; the control track takes Discrete and Box spaces "
            "of one or two axes. Wrap the environment so that it gives a vector (gymnasium.wrappers."
            "FlattenObservation does it for Dict and Tuple spaces)."
        )
    low = high = np.zeros(0, dtype=np.float32)
    first_action = 0
    if isinstance(action_space, spaces.Discrete):
        num_outputs, first_action = int(action_space.n), int(action_space.start)
    elif isinstance(action_space, spaces.Box) and len(action_space.shape) == 1:
        num_outputs, low, high = action_space.shape[0], action_space.low, action_space.high
    else:
        raise ValueError(
            f"{name} has the action space {action_space}; the control track takes Discrete spaces (a softmax head) "
            "and Box spaces of one axis (a Gaussian head)."
        )
    return Interface(
        name=name,
        num_inputs=num_inputs,
        one_hot=one_hot,
        num_outputs=num_outputs,
        discrete=isinstance(action_space, spaces.Discrete),
        low=np.asarray(low, dtype=np.float32),
        high=np.asarray(high, dtype=np.float32),
        first_action=first_action,
        first_state=first_state,
        horizon=horizon,
    )
