"""What a run needs: policy, scaler, collector and learner, checked and seeded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gymnasium
import torch

from .adviser import check
from .collect import Collector, Scaler
from .environments import inspect, make_rows, reward_threshold
from .learner import Learner
from .policies import Policy
from .record import Run
from .settings import Settings
from .spaces import Interface


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small networks lose time to a second thread; the caller's setting comes back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(settings: Settings) -> tuple[Run, Collector, Learner]:
    """Everything a run needs, checked; the same seed makes the same run."""
    interface = inspect(settings.env, settings.env_options)
    check(settings, interface)
    policy = make_policy(settings, interface)
    scaler = make_scaler(settings, interface)
    envs = make_rows(settings.env, settings.num_envs, settings.group_size, settings.env_options)
    collector = Collector(
        envs,
        policy,
        scaler,
        num_steps=settings.num_steps,
        group_size=settings.group_size,
        seed=settings.seed,
        window=settings.window,
    )
    threshold = reward_threshold(settings.env) if settings.threshold is None else settings.threshold
    run = Run(settings, interface, policy, scaler, threshold)
    return run, collector, Learner(settings, policy, interface.horizon)


def make_policy(settings: Settings, interface: Interface) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Policy(
            interface,
            kind=settings.policy,
            head=settings.head,
            hidden=settings.hidden,
            critic=settings.row.needs_critic,
            log_std=settings.log_std,
        )


def make_scaler(settings: Settings, interface: Interface) -> Scaler:
    if interface.one_hot or not settings.scale_observations:
        return Scaler(interface, None, None)
    env = gymnasium.make(settings.env, disable_env_checker=True, **settings.env_options)
    space = env.observation_space
    env.close()
    assert isinstance(space, gymnasium.spaces.Box)
    return Scaler(interface, space.low, space.high)
