"""Settings of a control run: what an algorithm starts from, and what suits each environment. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from ..algorithms.spec import AlgorithmSpec, Count, NotNegative
from ..algorithms.table import ALGORITHMS
from ..words import check_fields, choices, words_of

Head = Literal["auto", "softmax", "sigmoid", "gaussian", "tanh_gaussian"]
HEADS = words_of(Head)
AtLeastOne = Annotated[int, Ge(1)]
Rate = Annotated[float, Gt(0), Lt(float("inf"))]

SHORT_NAMES = {
    "sigmoid-bandit": "llm_pg/SigmoidBandit-v0",
    "bandit": "llm_pg/KArmedBandit-v0",
    "gridworld": "llm_pg/GridWorld-v0",
    "hackable-gridworld": "llm_pg/HackableGridWorld-v0",
    "cartpole": "CartPole-v1",
    "acrobot": "Acrobot-v1",
    "pendulum": "Pendulum-v1",
    "mountaincar": "MountainCarContinuous-v0",
    "lunarlander": "LunarLander-v3",
}

# Relatives of rows of the table that only differ by a number, under the names control people know.
# Two rows stay with text: an environment has no greedy completion (remax), and its returns are no verdicts (maxrl).
SPECS: dict[str, AlgorithmSpec] = {
    **{
        name: spec
        for name, spec in ALGORITHMS.items()
        if spec.baseline != "greedy" and spec.scale_rewards != "group_mean" and not spec.teacher_coef
    },
    "actor_critic": dataclasses.replace(
        ALGORITHMS["a2c"], name="actor_critic", source="TD actor-critic, Barto et al. 1983; Sutton et al. 2000", lam=0.0
    ),
    "a3c": dataclasses.replace(ALGORITHMS["a2c"], name="a3c"),
    "trpo_penalty": dataclasses.replace(
        ALGORITHMS["ppo"],
        name="trpo_penalty",
        source="Schulman et al. 2015, arXiv 1502.05477, as a penalty: arXiv 1707.06347, section 4",
        epsilon=float("inf"),
        kl_target=0.01,
    ),
}


@dataclass(frozen=True)
class ControlSettings:
    """Everything a run depends on beside the environment's own code.

    Attributes:
        env: registered name. env_options: keywords of its constructor.
        spec: the algorithm, see `algorithms.spec.AlgorithmSpec`.
        policy: mlp, linear, `module:Class` or `file.py:Class`.
        head: auto, softmax, sigmoid, gaussian, tanh_gaussian.
        hidden: widths of hidden layers. log_std: logarithm of the first σ of a Gaussian head.
        num_envs: rows that move together; with num_steps 0 the episodes of an update.
        num_steps: steps of a row before an update; 0 = whole episodes.
        group_size: rows that start from the same state (RLOO, GRPO and their relatives).
        num_epochs, num_minibatches: passes over a batch, and its parts in each.
        learning_rate, learning_rate_final: linear from one to the other over the run (None = constant).
        optimizer: adam, rmsprop, sgd. max_grad_norm: clipping of the whole gradient's norm; 0 = off.
        reward_scale: rewards are multiplied by it for training, never in what is shown.
        scale_observations: coordinates with finite bounds are shown in [-1, 1].
        total_steps, total_episodes: the run ends at the first reached (0 episodes = no such limit).
        threshold: mean return of the last `window` episodes that counts as solved; None = the environment's own.
        stop_when_solved: end there.
        num_workers: asynchronous processes (a3c).
        force: go on where the adviser refuses.
    """

    env: str
    spec: AlgorithmSpec
    env_options: dict[str, Any] = field(default_factory=dict)
    policy: str = "mlp"
    head: Head = "auto"
    hidden: tuple[int, ...] = (64, 64)
    log_std: float = 0.0
    num_envs: AtLeastOne = 8
    num_steps: Count = 0
    group_size: AtLeastOne = 1
    num_epochs: AtLeastOne = 1
    num_minibatches: AtLeastOne = 1
    learning_rate: Rate = 1e-3
    learning_rate_final: NotNegative | None = None
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    max_grad_norm: NotNegative = 0.5
    reward_scale: float = 1.0
    scale_observations: bool = True
    total_steps: AtLeastOne = 200_000
    total_episodes: Count = 0
    threshold: float | None = None
    window: AtLeastOne = 100
    stop_when_solved: bool = False
    num_workers: Count = 0
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        check_fields(self, f"Settings of {self.env}")

    @property
    def asynchronous(self) -> bool:
        return self.num_workers > 0


# What each algorithm starts from, keys of `AlgorithmSpec` and of `ControlSettings` mixed; `resolve` sorts them.
ALGORITHM_DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": {"num_envs": 16, "learning_rate": 5e-3},
    "actor_critic": {"num_envs": 16, "num_steps": 8, "gamma": 0.99, "learning_rate": 2e-3},
    "a2c": {"num_envs": 16, "num_steps": 8, "gamma": 0.99, "lam": 0.95, "learning_rate": 2e-3},
    "a3c": {"num_envs": 4, "num_steps": 16, "gamma": 0.99, "lam": 0.95, "learning_rate": 1e-3, "num_workers": 2},
    "ppo": {
        "num_envs": 16,
        "num_steps": 64,
        "gamma": 0.99,
        "num_epochs": 10,
        "num_minibatches": 4,
        "learning_rate": 1e-3,
    },
    "trpo_penalty": {
        "num_envs": 16,
        "num_steps": 64,
        "gamma": 0.99,
        "num_epochs": 10,
        "num_minibatches": 4,
        "learning_rate": 1e-3,
    },
}
_GROUPS = {"num_envs": 16, "group_size": 8, "learning_rate": 5e-3}

_BANDIT = {"policy": "linear", "num_envs": 8, "optimizer": "sgd", "max_grad_norm": 0.0}
_GRID = {
    "policy": "linear",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "total_steps": 100_000,
    "total_episodes": 1_000,
}
_GRID_REINFORCE = {"num_envs": 1, "optimizer": "sgd", "learning_rate": 0.2}
_GRID_GROUPS = {name: {"num_envs": 8, "group_size": 8} for name, spec in ALGORITHMS.items() if spec.needs_group}

# What suits an environment, for every algorithm ("*") and for one. A critic learns fastest when values are of order 1,
# hence the scales of the rewards.
ENVIRONMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "llm_pg/SigmoidBandit-v0": {
        "*": {**_BANDIT, "learning_rate": 0.5, "total_steps": 4_000},
        "reinforce": {"head": "sigmoid"},
    },
    "llm_pg/KArmedBandit-v0": {"*": {**_BANDIT, "learning_rate": 0.2, "total_steps": 20_000}},
    "llm_pg/GridWorld-v0": {"*": _GRID, "reinforce": _GRID_REINFORCE, **_GRID_GROUPS},
    "llm_pg/HackableGridWorld-v0": {"*": _GRID, "reinforce": _GRID_REINFORCE, **_GRID_GROUPS},
    "CartPole-v1": {
        "*": {"reward_scale": 0.05, "total_steps": 200_000},
        "reinforce": {"learning_rate": 1e-2},
        "a2c": {"num_envs": 8, "num_steps": 16, "learning_rate": 3e-3},
        "ppo": {
            "num_envs": 8,
            "num_steps": 128,
            "learning_rate": 2e-3,
            "scale_observations": False,
            "total_steps": 100_000,
        },
    },
    "Acrobot-v1": {"*": {"reward_scale": 0.05, "total_steps": 200_000}},
    "Pendulum-v1": {
        "*": {"reward_scale": 0.1, "gamma": 0.9, "scale_observations": False, "total_steps": 200_000},
        "ppo": {
            "num_envs": 8,
            "num_steps": 200,
            "num_minibatches": 20,
            "learning_rate": 2e-3,
            "learning_rate_final": 0.0,
            "total_steps": 80_000,
        },
    },
    # The flag is far off and every push costs: without wide noise the best that is found is to stand still.
    "MountainCarContinuous-v0": {
        "*": {"reward_scale": 0.1, "gamma": 0.999, "log_std": 1.0, "total_steps": 100_000},
        "ppo": {"num_envs": 8, "num_steps": 250, "num_minibatches": 8},
    },
    "LunarLander-v3": {
        "*": {"reward_scale": 0.05, "gamma": 0.995, "total_steps": 600_000},
        "ppo": {"num_envs": 16, "num_steps": 128, "num_minibatches": 16, "learning_rate": 1e-3},
    },
}


def resolve(env: str, algorithm: str, **changes: Any) -> ControlSettings:
    """Settings for an environment and an algorithm: defaults of both, then the changes (None = not given).

    Args:
        env: registered or short name.
        algorithm: a key of `SPECS`.
        changes: fields of `ControlSettings` and of `AlgorithmSpec`.

    Raises:
        ValueError: unknown algorithm or field, with the nearest name.
    """
    if algorithm not in SPECS:
        raise ValueError(f"There is no algorithm {algorithm!r}; {choices(algorithm, list(SPECS))}")
    env = SHORT_NAMES.get(env.lower(), env)
    suited = ENVIRONMENTS.get(env, {})
    merged = {
        **ALGORITHM_DEFAULTS.get(algorithm, _GROUPS if SPECS[algorithm].needs_group else {}),
        **suited.get("*", {}),
        **suited.get(algorithm, {}),
        **{key: value for key, value in changes.items() if value is not None},
    }
    spec_fields = {f.name for f in dataclasses.fields(AlgorithmSpec)} - {"name", "source"}
    own_fields = {f.name for f in dataclasses.fields(ControlSettings)} - {"env", "spec"}
    for key in merged:
        if key not in spec_fields | own_fields:
            raise ValueError(f"There is no setting {key!r}; {choices(key, sorted(spec_fields | own_fields))}")
    spec = dataclasses.replace(SPECS[algorithm], **{k: v for k, v in merged.items() if k in spec_fields})
    if spec.baseline == "greedy" or spec.scale_rewards == "group_mean":
        raise ValueError(
            f"{algorithm} with baseline {spec.baseline} and scale_rewards {spec.scale_rewards} is made for verdicts on "
            "completions: an environment gives no greedy completion, and its returns may be negative. Use baseline "
            "running_mean or value, or an algorithm with groups (rloo)."
        )
    return ControlSettings(env=env, spec=spec, **{k: v for k, v in merged.items() if k in own_fields})
