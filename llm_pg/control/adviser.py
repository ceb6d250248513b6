"""What suits an environment, and what is refused before a run starts. Imports no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .settings import ControlSettings, resolve

if TYPE_CHECKING:
    from .spaces import Interface

LONG_HORIZON = 500
COLLAPSED_ENTROPY = 0.1
DISCRETE_HEADS = ("softmax", "sigmoid")
ON_POLICY = ("reinforce",)


@dataclass(frozen=True)
class Advice:
    """A recommendation: the setting, its value, and why."""

    setting: str
    value: str
    why: str


def check(settings: ControlSettings, interface: Interface) -> None:
    """Raise ValueError for a run that cannot work; `force` goes on where it is only unwise."""
    _check_head(settings, interface)
    _check_groups(settings)
    _check_horizon(settings, interface)
    row = settings.spec
    if settings.num_epochs * settings.num_minibatches > 1 and row.surrogate in ON_POLICY:
        raise ValueError(
            f"{row.name} has no importance ratio: after one update its data are stale, but num_epochs "
            f"{settings.num_epochs} × num_minibatches {settings.num_minibatches} would use them again. Set both to 1, "
            "or take ppo."
        )
    if settings.asynchronous and row.surrogate not in ON_POLICY:
        raise ValueError("Asynchronous workers send one gradient a stretch: take a3c, not an algorithm with epochs.")


def _check_head(settings: ControlSettings, interface: Interface) -> None:
    head = settings.head
    if head in DISCRETE_HEADS and not interface.discrete:
        raise ValueError(
            f"A {head} head chooses between actions of a list, but {interface.name} wants {interface.num_outputs} "
            f"number{'s' if interface.num_outputs > 1 else ''} between {interface.low} and {interface.high}. Use "
            "--head gaussian or tanh_gaussian."
        )
    if head in ("gaussian", "tanh_gaussian") and interface.discrete:
        raise ValueError(
            f"A {head} head gives vectors, but {interface.name} has {interface.num_outputs} discrete actions. Use "
            "--head softmax."
        )


def _check_groups(settings: ControlSettings) -> None:
    row = settings.spec
    if row.needs_group and settings.group_size < 2:
        raise ValueError(
            f"{row.name} compares rows that start from the same state; with group_size {settings.group_size} there is "
            "nothing to compare. Set group_size to 4 or more."
        )
    if settings.num_envs % settings.group_size:
        raise ValueError(
            f"num_envs {settings.num_envs} does not divide into groups of {settings.group_size}; take a multiple."
        )
    if row.baseline_per_step and not (row.needs_group and row.returns == "reward_to_go"):
        raise ValueError(
            "baseline_per_step compares the rewards-to-go of a group's rows step by step: it needs baseline "
            "leave_one_out or group_mean, and returns reward_to_go."
        )


def _check_horizon(settings: ControlSettings, interface: Interface) -> None:
    row, horizon = settings.spec, interface.horizon
    if settings.num_steps and not row.needs_critic:
        raise ValueError(
            f"Baseline {row.baseline!r} needs the return of whole episodes, but num_steps {settings.num_steps} cuts "
            "them. Set num_steps to 0, or take baseline value."
        )
    if not settings.num_steps and horizon is None:
        raise ValueError(
            f"{interface.name} has no time limit, so that an episode may never end. Give num_steps and an algorithm "
            "with a critic (a2c, ppo), or wrap the environment in gymnasium.wrappers.TimeLimit."
        )
    long = horizon is None or horizon > LONG_HORIZON
    if long and row.surrogate == "reinforce" and row.baseline == "none" and not settings.force:
        raise ValueError(
            f"REINFORCE without a baseline on {interface.name}, whose episodes last up to "
            f"{'any number of' if horizon is None else horizon} steps: over {LONG_HORIZON} the variance of the return "
            "drowns the gradient. Use --baseline value (a learned V) or a2c or ppo; --force goes on all the same."
        )


class Spaces(Protocol):
    """What the adviser reads of an `Interface`, or of a task that is only described; `num_inputs` None = unknown."""

    @property
    def name(self) -> str: ...
    @property
    def discrete(self) -> bool: ...
    @property
    def num_inputs(self) -> int | None: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def horizon(self) -> int | None: ...


def count_parameters(
    policy: str, head: str, num_inputs: int, num_outputs: int, hidden: tuple[int, ...]
) -> tuple[int, int, int]:
    """Returns the numbers of parameters of the head, of the whole policy, and of a critic of the same form.

    Args:
        policy: linear or mlp.
        head: softmax, sigmoid, gaussian or tanh_gaussian; the last two have a log σ for each coordinate.
        num_inputs: features of an observation.
        num_outputs: actions of a list, or coordinates of a vector.
        hidden: widths of the hidden layers of an mlp.
    """
    num_scores = 1 if head == "sigmoid" else num_outputs
    num_sigmas = 0 if head in DISCRETE_HEADS else num_outputs
    if policy == "linear":  # without a bias
        return num_inputs * num_scores + num_sigmas, num_inputs * num_scores + num_sigmas, num_inputs
    below = sum((num_in + 1) * num_out for num_in, num_out in itertools.pairwise((num_inputs, *hidden)))
    width = hidden[-1] if hidden else num_inputs
    of_head = (width + 1) * num_scores + num_sigmas
    return of_head, below + of_head, below + width + 1


def _head_and_size(spaces: Spaces, algorithm: str) -> tuple[Advice, str]:
    """The head, with the parameters that it and its policy have at the settings of this environment; the critic's."""
    settings = resolve(spaces.name, algorithm)
    head = "softmax" if spaces.discrete else "gaussian"
    what = f"{spaces.num_outputs} discrete actions"
    if not spaces.discrete:
        what = f"{spaces.num_outputs}-vector action; tanh_gaussian, as large, where the bounds matter"
    linear = settings.policy == "linear"
    form = "a linear policy" if linear else f"with hidden layers {','.join(map(str, settings.hidden))}"
    num_inputs = spaces.num_inputs
    if num_inputs is None:
        of_head, *_ = count_parameters(settings.policy, head, 0, spaces.num_outputs, settings.hidden)
        return Advice("head", head, f"{what}; {of_head:,} parameters ({form})"), ""
    of_head, whole, critic = count_parameters(settings.policy, head, num_inputs, spaces.num_outputs, settings.hidden)
    size = f"{of_head:,} parameters ({form})" if linear else f"{of_head:,} parameters, {whole:,} {form}"
    return Advice("head", head, f"{what}; {size}"), f"; V(s) has {critic:,} parameters"


def advise(interface: Spaces) -> list[Advice]:
    """From an environment's spaces and horizon to an algorithm, a head and variance controls."""
    horizon = interface.horizon
    short = horizon is not None and horizon <= 100
    head, of_critic = _head_and_size(interface, "reinforce" if short else "ppo")
    out = [
        head,
        Advice(
            "algorithm",
            "reinforce" if short else "ppo",
            f"{'no limit' if horizon is None else horizon} steps an episode: "
            + ("short enough for Monte Carlo returns" if short else "a critic keeps the variance down"),
        ),
        Advice(
            "baseline",
            "running_mean" if short else "value",
            "one start and short episodes: a mean is enough"
            if short
            else f"credit differs from state to state{of_critic}",
        ),
        Advice("returns", "reward_to_go", "an action cannot change what came before it"),
    ]
    if not short:
        out += [
            Advice("lam", "0.95", "GAE between TD (0) and Monte Carlo (1)"),
            Advice("normalize_advantages", "steps", "one learning rate for any scale of rewards"),
            Advice("max_grad_norm", "0.5", "one rare episode must not throw the policy"),
        ]
    if interface.discrete:
        out.append(Advice("entropy_coef", "0.01 to 0", "against early collapse, gone by the end of the run"))
    updates = "one update, then new episodes" if short else "a few epochs within the clip, then new data"
    out.append(Advice("on-policy contract", updates, "data of an older policy are biased without a ratio"))
    return out


def collapsed(settings: ControlSettings, interface: Interface, entropy: float) -> bool:
    """Policy entropy under 0.1 nats with no bonus to hold it up. A differential entropy has no such zero."""
    return interface.discrete and settings.spec.entropy_coef == 0 and entropy < COLLAPSED_ENTROPY
