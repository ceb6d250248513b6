"""An episode in a reward worker: the turns so far go in, the reward and the reply to the last one come out.

In this form an environment has all that a reward function has: a deadline for each step, a worker that is killed when
it is late, failures counted by name, None in the place of a made-up number. It imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..rewards.loading import Target, load
from ..rewards.specs import RewardFunction, resolve
from ..words import choices
from .protocol import Environment, Reply

SHIPPED = {
    "number_guessing": "reward_fns.number_guessing:NumberGuessing",
    "tools": "llm_pg.environments.tools:ToolEnvironment",
    "verifiers": "llm_pg.environments.from_verifiers:make_verifiers",
}
KEPT_EPISODES = 1024

_kept: OrderedDict[str, Environment] = OrderedDict()  # of this worker and batch, by their texts
_batch: int | None = None


def play(
    completion: str,
    log_extra: Callable[[str, Any], None],
    environment: str,
    environment_options: Mapping[str, Any] | None = None,
    environment_turns: Sequence[str] | None = None,
    environment_seed: int = 0,
    environment_batch: int = 0,
    **row: Any,
) -> float | None:
    """The reward of the turn `completion`; logs its reply, whether the episode is over, and the reply's role.

    environment, environment_options: see `make`. environment_turns: the turns before this one; None = only make the
    environment, to see that it can be made. environment_batch: number of the episodes played together; those of an
    earlier batch that a limit cut short are let go, with what they hold open. row: the columns that `reset` gets.
    """
    global _batch
    if environment_turns is None:
        make(environment, environment_options)
        return 0.0
    if environment_batch != _batch:
        _kept.clear()
        _batch = environment_batch
    place = hashlib.blake2b(repr((environment, environment_seed, sorted(row.items()))).encode()).hexdigest()
    partner = _kept.pop(_key(place, environment_turns), None)
    if partner is None:
        partner = make(environment, environment_options)
        partner.reset(row, environment_seed)
        for text in environment_turns:
            partner.step(text)
    reply = partner.step(completion)
    if not isinstance(reply, Reply):
        raise TypeError(f"{type(partner).__name__}.step must return a Reply; it returned a {type(reply).__name__}.")
    if not reply.done and reply.reward is not None:
        _kept[_key(place, [*environment_turns, completion])] = partner
        if len(_kept) > KEPT_EPISODES:
            _kept.popitem(last=False)
    log_extra("reply", reply.text)
    log_extra("role", reply.role)
    log_extra("done", bool(reply.done))
    return reply.reward


def _key(place: str, turns: Sequence[str]) -> str:
    return hashlib.blake2b(repr((place, list(turns))).encode()).hexdigest()


def make(spec: str, options: Mapping[str, Any] | None = None) -> Environment:
    """A new environment: the name of a shipped one, module:Class or file.py:Class, made with `options` as keywords."""
    place, _, name = address(spec).rpartition(":")
    is_file = place.endswith(".py") or "/" in place
    target = Target(None, str(Path(place).expanduser().resolve()), name) if is_file else Target(place, None, name)
    made: Environment = load(target)(**(options or {}))
    for method in ("reset", "step"):
        if not callable(getattr(made, method, None)):
            raise TypeError(f"Environment {spec!r} has no method {method!r}; it needs reset(row, seed) and step(text).")
    return made


def address(spec: str) -> str:
    """module:Class or file.py:Class of an environment. Raises ValueError for a name that is not shipped."""
    if ":" in spec:
        return spec
    if spec not in SHIPPED:
        raise ValueError(
            f"rollout.environment cannot be {spec!r}; of the shipped ones {choices(spec, sorted(SHIPPED))} Your own is "
            "written module:Class or file.py:Class."
        )
    return SHIPPED[spec]


def as_reward_function(spec: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The environment in the form that a `Scorer` runs, under its own name."""
    name = spec if ":" not in spec else spec.rpartition(":")[2]
    address(spec)
    function = resolve({"function": play, "environment": spec, "environment_options": dict(options or {})})
    return replace(function, name=name)
