"""The worlds of the table, by name. Their numbers come from formulas, not from a random generator, so the table is
the same on every machine and under every torch version."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..estimators.exact import (
    TabularPolicy,
    enumerate_completions,
    state_values,
    step_values,
    terminal_reward,
)
from ..words import check_fields
from .world import World

Warp = tuple[tuple[str, float], ...]

A, B = 0, 1  # the two words; the third token is EOS
_DISTANCES = {"near": 0.1, "far": 1.5}  # of logits, from the policy's
HARD = {(A, B), (B, B), (A, A)}  # what prompt 0 asks for, ended by EOS


@dataclass(frozen=True)
class WorldSpec:
    """Which world.

    Attributes:
        horizon: 2 or 3 tokens at most (7 or 15 completions of each prompt; the words a and b, and EOS).
        num_generations: G.
        prompts: two (the second is easier) or one.
        prompts_per_step: 1: a prompt drawn at random; 2: a group of each in one step.
        rewards: binary verdicts; graded ones; dense (each token pays); none; two functions, a verdict and a grade.
        reference: none, near, far. teacher: likewise.
        reused: the data come from an older policy.
        mismatch: the sampler computes the present policy differently from the trainer.
        sampler: settings of the sampler's `warp_logits`. trained: of the trained log-probability; None: the same.
        critic: none, exact, wrong (off by up to 0.5), zero.
        train_eos: False leaves the EOS out of the loss.
        unscored: completions that begin with b get no verdict.
        gamma: discount.
        ordered: each order of a group is listed separately.
    """

    horizon: int = 3
    num_generations: int = 4
    prompts: Literal["two", "one"] = "two"
    prompts_per_step: int = 1
    rewards: Literal["binary", "graded", "dense", "none", "two"] = "binary"
    reference: Literal["none", "near", "far"] = "none"
    teacher: Literal["none", "near", "far"] = "none"
    reused: bool = False
    mismatch: bool = False
    sampler: Warp = ()
    trained: Warp | None = None
    critic: Literal["none", "exact", "wrong", "zero"] = "none"
    train_eos: bool = True
    unscored: bool = False
    gamma: float = 1.0
    ordered: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "Spec")

    def replace(self, **changes: object) -> WorldSpec:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _wave(shape: tuple[int, ...], size: float, phase: float) -> Tensor:
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return size * torch.sin(2.3 * count**1.5 + phase).reshape(shape)


def _reward(world_spec: WorldSpec) -> Tensor:
    c = enumerate_completions(3, world_spec.horizon)
    if world_spec.rewards == "none":
        return torch.zeros(2, c.num_prefixes, 3, dtype=torch.float64)
    if world_spec.rewards == "dense":
        return _wave((2, c.num_prefixes, 3), 1.0, 0.5) + 0.5
    words = [tuple(spec[mask][spec[mask] != c.eos].tolist()) for spec, mask in zip(c.tokens_ST, c.mask_ST, strict=True)]
    ended = (~c.truncated_S).tolist()
    short = world_spec.horizon == 2
    hard = [float(w == (A,) and e) if short else float(w in HARD and e) for w, e in zip(words, ended, strict=True)]
    easy = [float(B not in w) if short else float(A in w) for w in words]
    reward_PS = torch.tensor([hard, easy], dtype=torch.float64)
    if world_spec.rewards in ("graded", "two"):
        reward_PS = reward_PS + _grade(c.num_completions)
    return terminal_reward(c, reward_PS)


def _grade(num_completions: int) -> Tensor:
    return _wave((2, num_completions), 0.4, 1.0)


@lru_cache(maxsize=256)
def build(world_spec: WorldSpec) -> World:
    """The world that `spec` names."""
    num_prefixes = enumerate_completions(3, world_spec.horizon).num_prefixes
    shape = (2, num_prefixes, 3)
    num_prompts = 1 if world_spec.prompts == "one" else 2
    logits = _wave(shape, 1.0, 3.0)
    policy = TabularPolicy(logits[:num_prompts], world_spec.horizon, dict(world_spec.sampler))
    reward = _reward(world_spec)[:num_prompts]
    reference, teacher = (
        None if which == "none" else policy.with_logits((logits + _wave(shape, _DISTANCES[which], phase))[:num_prompts])
        for which, phase in ((world_spec.reference, 2.0), (world_spec.teacher, 5.0))
    )
    behaviour = policy.with_logits((logits + _wave(shape, 0.3, 1.0))[:num_prompts])
    value = None
    if world_spec.critic != "none":
        value = state_values(policy, reward, world_spec.gamma)
        error = _wave((2, num_prefixes), 0.5, 4.0)[:num_prompts]
        value = {"exact": value, "wrong": value + error, "zero": torch.zeros_like(value)}[world_spec.critic]
    return World(
        policy=policy,
        reward_PNV=reward,
        num_generations=world_spec.num_generations,
        all_prompts=world_spec.prompts_per_step == 2,
        reference=reference,
        teacher=teacher,
        behaviour=behaviour if world_spec.reused or world_spec.mismatch else None,
        mismatch=world_spec.mismatch,
        trained_warp=None if world_spec.trained is None else dict(world_spec.trained),
        value_PN=value,
        gamma=world_spec.gamma,
        train_eos=world_spec.train_eos,
        scored_PS=(enumerate_completions(3, world_spec.horizon).tokens_ST[:, 0] != B).repeat(num_prompts, 1)
        if world_spec.unscored
        else None,
        ordered=world_spec.ordered,
        part_PSF=_parts(world_spec, num_prompts) if world_spec.rewards == "two" else None,
    )


def _parts(world_spec: WorldSpec, num_prompts: int) -> Tensor:
    """The verdict and the grade of each completion, whose sum is the reward."""
    c = enumerate_completions(3, world_spec.horizon)
    grade_PS = _grade(c.num_completions)
    whole_PS = step_values(c, _reward(world_spec)).sum(2)
    return torch.stack([whole_PS - grade_PS, grade_PS], 2)[:num_prompts]


def less_truncated(world: World, penalty: float) -> Tensor:
    """The rewards less `penalty` for each completion that met the horizon."""
    c = world.completions
    late_PS = c.truncated_S.to(torch.float64).expand(world.policy.num_prompts, -1)
    return world.reward_PNV - penalty * terminal_reward(c, late_PS)
