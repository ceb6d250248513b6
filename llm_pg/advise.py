"""`llm-pg advise`: from what is known of a task to settings that suit it, with the reason of each. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .config import ConfigError
from .control.adviser import DISCRETE_HEADS, LONG_HORIZON, Advice
from .control.adviser import advise as for_environment
from .words import check_fields

NO_SETTINGS = {"on-policy contract", "policy head"}
STANDARD_ERROR = 0.1  # wanted for the mean return of an update, as a share of the reward's range
ROWS_OF_A_CRITIC, STEPS_OF_A_CRITIC = 8, 128


@dataclass(frozen=True)
class Task:
    """What is known of a task.

    Attributes:
        actions: tokens (a language model), discrete or continuous (control).
        horizon: steps or tokens of an episode at most; None = no limit.
        low, high: range of an episode's return; None = unknown.
        num_actions: actions of a list, or coordinates of a vector.
        num_inputs: features of an observation, for control; None = unknown.
    """

    actions: Literal["tokens", "discrete", "continuous"]
    horizon: int | None
    low: float | None = None
    high: float | None = None
    num_actions: int = 2
    num_inputs: int | None = None
    name = ""  # of an environment: none is known

    def __post_init__(self) -> None:
        check_fields(self, "Task")

    @property
    def discrete(self) -> bool:
        return self.actions != "continuous"

    @property
    def num_outputs(self) -> int:
        return self.num_actions


def parse_range(text: str) -> tuple[float, float]:
    """`-200:0` -> (-200.0, 0.0). Raises ConfigError."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--reward-range is written LOW:HIGH, as -200:0; got {text!r}.") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--reward-range needs two finite numbers, the lower first; got {text!r}.")
    return low, high


def refuse(task: Task, *, algorithm: str | None, baseline: str | None, head: str | None) -> None:
    """Raise ConfigError for a wish that cannot work on this task."""
    if task.horizon is not None and task.horizon < 1:
        raise ConfigError(f"--horizon counts the steps of an episode, at least 1; got {task.horizon}.")
    for option, number in (("--num-actions", task.num_actions), ("--num-inputs", task.num_inputs)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} must be at least 1; got {number}.")
    if head in DISCRETE_HEADS and not task.discrete:
        raise ConfigError(
            f"A {head} head chooses from a list, and continuous actions are vectors: take head gaussian, or "
            "tanh_gaussian where the bounds matter."
        )
    long = task.horizon is None or task.horizon > LONG_HORIZON
    if long and algorithm == "reinforce" and baseline in (None, "none"):
        raise ConfigError(
            f"REINFORCE without a baseline on {task.horizon or 'endless'} steps is refused: over {LONG_HORIZON} the "
            "variance of the return drowns the gradient. Take --baseline running_mean for tokens, or value for control."
        )


def advise(task: Task) -> list[Advice]:
    """The settings that suit a task, each with its reason, in the names of the track that runs it."""
    return _for_tokens(task) if task.actions == "tokens" else _for_control(task)


def episodes_for(error: float = STANDARD_ERROR) -> int:
    """Episodes whose mean return has this standard error at worst, as a share of the range; a power of two.

    A return in [low, high] deviates by half of the range at most, and the mean of N by 1/√N of that.
    """
    return int(2 ** math.ceil(math.log2((0.5 / error) ** 2)))


def _for_control(task: Task) -> list[Advice]:
    out = for_environment(task)
    values = {advice.setting: advice.value for advice in out}
    known = task.low is not None and task.high is not None
    scale = max(abs(task.low or 0.0), abs(task.high or 0.0))
    if known and scale > 0:
        what = f"returns of {task.low:g} to {task.high:g} become of order 1, which a critic and one entropy_coef suit"
        out.append(Advice("reward_scale", f"{1 / scale:.3g}", what))
    if not task.discrete:
        out.append(Advice("entropy_coef", "0", "σ of the Gaussian explores; a differential entropy has no zero"))
    if values["baseline"] == "value":
        steps = min(STEPS_OF_A_CRITIC, task.horizon or STEPS_OF_A_CRITIC)
        why = f"{ROWS_OF_A_CRITIC} × {steps} steps an update; V replaces what follows the cut"
        out += [Advice("num_envs", str(ROWS_OF_A_CRITIC), why), Advice("num_steps", str(steps), why)]
        out.append(Advice("gamma", _gamma(task.horizon), "looks about as far as an episode lasts"))
    else:
        number = episodes_for()
        why = f"standard error of the mean return under {STANDARD_ERROR:.0%} of its range: 0.5/√{number}"
        out += [
            Advice("num_envs", str(number), why),
            Advice("num_steps", "0", "whole episodes: a return needs its end"),
        ]
    return out


def _gamma(horizon: int | None) -> str:
    """1 - 1/horizon, between 0.9 and 0.99."""
    return f"{min(max(1 - 1 / (horizon or 100), 0.9), 0.99):.3g}"


def _for_tokens(task: Task) -> list[Advice]:
    horizon = task.horizon or 1024
    binary = task.low is not None and task.high is not None and (task.low, task.high) == (0.0, 1.0)
    plain = binary or task.low is None
    group = 8 if plain else 4
    grouped = "few wins among 0/1 rewards need larger groups" if plain else "graded rewards differ in small groups"
    scaled = "0/1 rewards have a scale" if plain else f"one learning rate for returns of {task.low:g} to {task.high:g}"
    prompts = max(episodes_for() * 4 // group, 8)
    reuse = "each batch once: data of an older policy are biased without a ratio"
    own_layer = "the model's own output layer, hidden size × vocabulary: training adds no parameters"
    return [
        Advice("policy head", "softmax over the vocabulary", own_layer),
        Advice("algorithm.name", "rloo" if horizon <= 64 else "dr_grpo", "no critic: the group is the baseline"),
        Advice("rollout.max_completion_length", str(horizon), "the horizon: one action a token"),
        Advice("rollout.num_generations", str(group), grouped),
        Advice("train.prompts_per_step", str(prompts), f"{prompts * group} completions: prompts, not copies, tighten"),
        Advice("algorithm.scale_rewards", "none" if plain else "batch", scaled),
        Advice("algorithm.entropy_coef", "0.001", "against early collapse"),
        Advice("algorithm.entropy_coef_final", "0.0", "gone by the end of the run"),
        Advice("algorithm.num_iterations", "1", reuse),
        Advice("rollout.temperature", "1.0", "what is sampled is what is trained"),
        Advice("train.max_grad_norm", "1.0", "one rare completion must not throw the policy"),
    ]


def as_yaml(task: Task, advice: Sequence[Advice]) -> str:
    """A YAML to start from, each line with its reason; for control also the command that runs it."""
    head = [f"# actions: {task.actions}, horizon: {task.horizon or 'no limit'}"]
    head += [f"# {a.setting}: {a.value} ({a.why})" for a in advice if a.setting in NO_SETTINGS]
    advice = [a for a in advice if a.setting not in NO_SETTINGS]
    if task.actions == "tokens":
        return "\n".join([*head, "# llm-pg train this.yaml model_name_or_path=... task=...", *_sections(advice)]) + "\n"
    lines, flags = [], []
    for a in advice:
        first, _, last = a.value.partition(" to ")
        for name, value in ((a.setting, first), *([(f"{a.setting}_final", last)] if last else [])):
            lines.append(f"{name}: {value}  # {a.why}")
            flags.append(f"--{name.replace('_', '-')} {value}")
    return "\n".join([*head, f"# llm-pg control ENV {' '.join(flags)}", *lines]) + "\n"


def _sections(advice: Sequence[Advice]) -> list[str]:
    out: list[str] = []
    sections = dict.fromkeys(a.setting.split(".")[0] for a in advice)
    for section in sections:
        out.append(f"{section}:")
        mine = [a for a in advice if a.setting.startswith(section + ".")]
        out += [f"  {a.setting.split('.')[1]}: {a.value}  # {a.why}" for a in mine]
    return out


def main(values: dict[str, Any]) -> int:
    """Print the YAML for the command line's answers; ConfigError where a wish is refused."""
    low, high = parse_range(values["reward_range"]) if values["reward_range"] else (None, None)
    try:
        task = Task(values["actions"], values["horizon"], low, high, values["num_actions"], values["num_inputs"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    refuse(task, algorithm=values["algorithm"], baseline=values["baseline"], head=values["head"])
    print(as_yaml(task, advise(task)), end="")
    return 0
