"""What a run needs: policy, scaler, collector and learner, checked and seeded."""

from __future__ import annotations

import gymnasium
import torch

from .adviser import check
from .collect import ControlCollector, Scaler
from .environments import inspect, make_rows, reward_threshold
from .learner import ControlLearner
from .policies import ControlPolicy
from .record import ControlRun
from .settings import ControlSettings
from .spaces import Interface


def prepare(settings: ControlSettings) -> tuple[ControlRun, ControlCollector, ControlLearner]:
    """Everything a run needs, checked; the same seed makes the same run."""
    run = begin_run(settings)
    assert run.policy is not None
    return run, make_collector(run, settings.seed), ControlLearner(settings, run.policy, run.interface.horizon)


def begin_run(settings: ControlSettings) -> ControlRun:
    """A run that has not begun: settings checked, the policy made from their seed."""
    interface = inspect(settings.env, settings.env_options)
    check(settings, interface)
    threshold = reward_threshold(settings.env) if settings.threshold is None else settings.threshold
    return ControlRun(
        settings, interface, make_policy(settings, interface), make_scaler(settings, interface), threshold
    )


def make_policy(settings: ControlSettings, interface: Interface) -> ControlPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ControlPolicy(
            interface,
            kind=settings.policy,
            head=settings.head,
            hidden=settings.hidden,
            critic=settings.spec.needs_critic,
            log_std=settings.log_std,
        )


def make_scaler(settings: ControlSettings, interface: Interface) -> Scaler:
    if interface.one_hot or not settings.scale_observations:
        return Scaler(interface, None, None)
    env = gymnasium.make(settings.env, disable_env_checker=True, **settings.env_options)
    space = env.observation_space
    env.close()
    assert isinstance(space, gymnasium.spaces.Box)
    return Scaler(interface, space.low, space.high)


def make_collector(run: ControlRun, seed: int) -> ControlCollector:
    """Rows of the run's environment, moved by its policy."""
    settings = run.settings
    assert run.policy is not None
    assert run.scaler is not None
    return ControlCollector(
        make_rows(settings.env, settings.num_envs, settings.group_size, settings.env_options),
        run.policy,
        run.scaler,
        num_steps=settings.num_steps,
        group_size=settings.group_size,
        seed=seed,
        window=settings.window,
    )
