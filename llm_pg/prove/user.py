"""Your own advantage or loss function, proven in the same worlds.

    def advantage(rollouts):          # llm_pg.rollouts.Rollouts of one step -> (B,) or (B, T)
    def loss(logp_BT, batch):         # llm_pg.algorithms.algorithm.Batch   -> a scalar to minimise

An advantage is summed over tokens and averaged over completions (the exact reduction), so that only the advantage
can be at fault. A loss gets the advantages of `advantage`, or leave-one-out ones, in `batch.advantage_BT`, and is run
on fresh and on reused data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithms.algorithm import Algorithm, Batch
from ..algorithms.spec import AlgorithmSpec
from ..estimators.expectation import Groups, compare, sample_groups, updates
from ..rewards.loading import LoadError, Target, load
from ..rollouts import Rollouts
from .cases import BOTH, ONE
from .measure import (
    BIASED,
    DIRECTION,
    EXACT,
    NOTHING,
    Line,
    ProofCase,
    describe,
    expect_in,
    kind_of,
    measure,
    plain,
    target,
)
from .reasons import Departure
from .world import loss_of_groups
from .worlds import WorldSpec, build

_ADVANTAGE_SPEC = AlgorithmSpec("yours", "", returns="total", surrogate="reinforce")
_LOSS_SPEC = AlgorithmSpec("yours", "", baseline="leave_one_out")
_CHECKED = 24  # groups on which a function is tried before it is proven
_CHOICES = (ONE, BOTH, ONE.replace(rewards="graded"), ONE.replace(rewards="dense"))


class ProofError(ValueError):
    """What was given cannot be proven."""


def load_function(address: str, option: str) -> Callable[..., Any]:
    """The function at `my.py:fn`."""
    path, _, name = address.rpartition(":")
    if not path or not name:
        raise ProofError(f"{option} {address!r} is not of the form my.py:fn, a Python file and a function in it.")
    if not Path(path).is_file():
        raise ProofError(f"{option} {address!r}: there is no file {path!r} here ({Path.cwd()}).")
    try:
        return load(Target(module=None, file=str(Path(path).resolve()), qualname=name))
    except LoadError as error:
        near = f" It has {', '.join(error.near[:8])}." if error.near else ""
        raise ProofError(f"{option} {address!r}: {error}.{near}") from error
    except Exception as error:
        raise ProofError(f"{option} {address!r}: importing {path} raised {type(error).__name__}: {error}.") from error


class OwnAlgorithm(Algorithm):
    """The exact reduction around an advantage function, a loss function, or both."""

    def __init__(self, advantage: Callable[..., Any] | None = None, own_loss: Callable[..., Any] | None = None) -> None:
        super().__init__(_ADVANTAGE_SPEC if advantage is not None else _LOSS_SPEC)
        self.advantage = advantage
        self.own_loss = own_loss

    def compute_advantages(self, rollouts: Rollouts, **others: Any) -> Batch:
        batch = super().compute_advantages(rollouts, **others)
        if self.advantage is None:
            return batch
        weight = self.advantage(rollouts)
        advantage_BT = weight.detach().to(batch.loss_scale_BT.dtype)
        advantage_BT = (advantage_BT.unsqueeze(1) if advantage_BT.dim() == 1 else advantage_BT).expand_as(
            batch.loss_scale_BT
        )
        return dataclasses.replace(
            batch, advantage_BT=torch.where(batch.mask_BT, advantage_BT, torch.zeros_like(advantage_BT))
        )

    def loss(self, logp_BT: Tensor, batch: Batch, **others: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.own_loss is None:
            return super().loss(logp_BT, batch, **others)
        if batch.proximal_logp_BT is None:
            batch = dataclasses.replace(batch, proximal_logp_BT=logp_BT.detach())
        return self.own_loss(logp_BT, batch), {}


def prove_own(advantage: str | None, loss: str | None) -> list[Line]:
    """The lines of a user's functions.

    Raises:
        ProofError: a function that cannot be loaded, raises, returns the wrong shape or NaN, is random, or reads the
            future; one paragraph.
    """
    own_advantage = None if advantage is None else load_function(advantage, "--advantage")
    own_loss = None if loss is None else load_function(loss, "--loss")
    if own_advantage is not None:
        check_advantage(own_advantage, str(advantage))
    algorithm = OwnAlgorithm(own_advantage, own_loss)
    if own_loss is not None:
        check_loss(algorithm, str(loss))
    name = " + ".join(Path(address).name for address in (advantage, loss) if address)
    return [_line(algorithm, name, world_spec) for world_spec in _specs(own_loss is not None)]


def _specs(with_reused: bool) -> Iterator[WorldSpec]:
    for world_spec in _CHOICES:
        yield world_spec.replace(reference="near", critic="exact")
    if with_reused:
        yield ONE.replace(reference="near", critic="exact", reused=True)


def _line(algorithm: OwnAlgorithm, name: str, world_spec: WorldSpec) -> Line:
    section = f"{world_spec.prompts_per_step} of 2 prompts a step, {world_spec.rewards} rewards"
    if world_spec.reused:
        section += ", data of an older policy"
    together = runs_side_by_side(algorithm, world_spec)
    if reads_the_order(algorithm, world_spec):
        world_spec = world_spec.replace(
            ordered=True, num_generations=2 if not together or world_spec.prompts_per_step == 2 else 3
        )
        section += ", rows in any order"
    elif not together:
        world_spec = world_spec.replace(num_generations=2 if world_spec.prompts_per_step == 2 else 3)
    world = build(world_spec)
    spec = algorithm.spec
    try:
        update = expect_in(world, algorithm, side_by_side=together)
    except Exception as error:
        raise ProofError(f"{name} raised {type(error).__name__} on a group of the {section} world: {error}") from error
    comparison = compare(update, target(spec, world))
    kind = kind_of(comparison)
    why = [] if kind == EXACT else [Departure("your function", _ADVICE[kind], _never, _same)]
    case = ProofCase(section, name, spec, world_spec, expect=kind)
    noise = measure(*plain(spec, world_spec))[0].noise
    ratio = comparison.noise / noise if comparison.scale > 0 else None
    line = describe(case, comparison, update.num_groups, kind, why, ratio)
    return dataclasses.replace(
        line,
        baseline=line.baseline if algorithm.advantage is None else "yours",
        reduction=line.reduction if algorithm.own_loss is None else "yours",
    )


def _never(spec: AlgorithmSpec, world_spec: WorldSpec) -> bool:
    return False


def _same(spec: AlgorithmSpec, world_spec: WorldSpec) -> tuple[AlgorithmSpec, WorldSpec]:
    return spec, world_spec


_ADVICE = {
    DIRECTION: "Only the length of the update differs from the gradient's, by the factor `scale`.",
    BIASED: "The expected update is not along the gradient; bias and cosine say by how much.",
    NOTHING: "The expected update is 0: nothing is learned.",
}


def _sample(world_spec: WorldSpec) -> Iterator[Groups]:
    """A few groups as a step would draw them."""
    world = build(world_spec)
    yield from sample_groups(
        world.sampled.prob_PS(), world.num_generations, _CHECKED, all_prompts=world.all_prompts, seed=1
    )


def _rollouts(world_spec: WorldSpec) -> Iterator[Rollouts]:
    world = build(world_spec)
    for groups in _sample(world_spec):
        fields = world.fields(groups)
        for m in range(len(groups.weight_M)):
            yield Rollouts(group_B=world.group_B, **{name: value[m] for name, value in fields.items()})


def _call(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        raise ProofError(
            f"{name} raised {type(error).__name__}: {error}. An advantage function takes one argument, the Rollouts of "
            f"a step, and returns (B,) or (B, T); a loss function takes (logp_BT, batch) and returns a scalar."
        ) from error


def check_advantage(function: Callable[..., Any], name: str) -> None:
    """Shape, numbers, determinism, and that the weights know nothing of later tokens but their rewards."""
    for world_spec in _specs(False):
        for rollouts in _rollouts(world_spec):
            weight, again = _call(function, name, rollouts), _call(function, name, rollouts)
            rows, steps = rollouts.mask_BT.shape
            if not isinstance(weight, Tensor) or tuple(weight.shape) not in ((rows,), (rows, steps)):
                got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
                raise ProofError(
                    f"{name} returned {got} for {rows} rollouts of {steps} steps; an advantage function returns a "
                    f"tensor of shape ({rows},), one weight a rollout, or ({rows}, {steps}), one a step."
                )
            _check_numbers(weight, rollouts.mask_BT, name)
            if not torch.equal(weight, again):
                raise ProofError(
                    f"{name} returned different numbers for the same rollouts, so its expectation cannot be "
                    f"enumerated. Take the randomness out, or fix its seed inside the function."
                )
    check_future(function, name)


def _check_numbers(weight: Tensor, mask_BT: Tensor, name: str) -> None:
    inside = weight if weight.dim() == 1 else torch.where(mask_BT, weight, torch.zeros_like(weight))
    bad = ~torch.isfinite(inside)
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise ProofError(
            f"{name} returned {float(inside[place])} at {place} ({int(bad.sum())} of {bad.numel()} numbers are not "
            f"finite). A usual cause is a deviation of 0, when all rewards of a group are equal: add a small constant "
            f"before dividing, or give such groups weight 0."
        )


def check_future(function: Callable[..., Any], name: str) -> None:
    """With all rewards 0 the weight of a step must be the same whatever the row's tokens from that step on are.

    The only lawful way for later tokens to reach a step's weight is through their rewards (or a critic's values and a
    KL, which are 0 here too): anything else is a baseline that depends on the action.
    """
    world = build(WorldSpec(rewards="none", critic="zero"))
    world = world.replace(reference=world.policy)
    c = world.completions
    others = torch.tensor([0, 5, c.num_completions - 1]).expand(c.num_completions, -1)
    index_MB = torch.cat([torch.arange(c.num_completions).unsqueeze(1), others], 1)
    fields = world.fields(Groups(index_MB, torch.zeros_like(index_MB), torch.ones(len(index_MB))))
    seen: dict[tuple[int, int], tuple[float, int]] = {}
    for s in range(c.num_completions):
        rollouts = Rollouts(group_B=world.group_B, **{key: value[s] for key, value in fields.items()})
        weight = _call(function, name, rollouts)
        for t in range(int(c.mask_ST[s].sum())):
            value = float(weight[0] if weight.dim() == 1 else weight[0, t])
            first, other = seen.setdefault((int(c.prefix_ST[s, t]), t), (value, s))
            if abs(first - value) > 1e-9:
                raise ProofError(
                    f"{name} reads the future: with all rewards 0, the weight of step {t} is {first:.4g} when the row "
                    f"goes on as {_words(c.tokens_ST, c.mask_ST, other)} and {value:.4g} when it goes on as "
                    f"{_words(c.tokens_ST, c.mask_ST, s)}, the same up to that step. A baseline may read the tokens "
                    f"before the step and the other rows, but of the row's own later tokens only their rewards; "
                    f"otherwise the update is biased. Take lengths, masks and log-probabilities of the row out of it."
                )


def _words(tokens_ST: Tensor, mask_ST: Tensor, s: int) -> str:
    return " ".join(("a", "b", "<eos>")[int(token)] for token in tokens_ST[s][mask_ST[s]])


def check_loss(algorithm: OwnAlgorithm, name: str) -> None:
    """A scalar, finite, with a gradient, the same twice."""
    for world_spec in _specs(True):
        world = build(world_spec)
        for rollouts in _rollouts(world_spec):
            batch = algorithm.compute_advantages(rollouts)
            if world.behaviour is not None:
                batch = dataclasses.replace(batch, proximal_logp_BT=rollouts.logp_BT)
            logp_BT = rollouts.logp_BT.clone().requires_grad_()
            loss, again = (_call(lambda b=batch, p=logp_BT: algorithm.loss(p, b)[0], name) for _ in range(2))
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise ProofError(
                    f"{name} returned {got}; a loss function returns a scalar to minimise, such as "
                    f"(-batch.advantage_BT * logp_BT * batch.loss_scale_BT)[batch.mask_BT].sum()."
                )
            if not torch.isfinite(loss):
                raise ProofError(
                    f"{name} returned {float(loss.detach())}; steps outside batch.mask_BT hold arbitrary numbers and "
                    f"must be left out of the sum."
                )
            if not torch.equal(loss, again):
                raise ProofError(f"{name} returned different losses for the same batch: take the randomness out.")
            if not loss.requires_grad:
                raise ProofError(
                    f"{name} returned a loss that has no gradient: it does not depend on logp_BT, or was detached."
                )


def runs_side_by_side(algorithm: OwnAlgorithm, world_spec: WorldSpec) -> bool:
    """Whether the function runs under `torch.vmap` and gives the same losses there as group by group."""
    world = build(world_spec)
    theta = world.policy.logits_PNV
    for groups in _sample(world_spec):
        theta_MPNV = theta.expand(len(groups.weight_M), -1, -1, -1)
        one_by_one = loss_of_groups(world, algorithm, side_by_side=False)(theta_MPNV, groups)
        try:
            together = loss_of_groups(world, algorithm)(theta_MPNV, groups)
        except Exception as error:  # noqa: BLE001  vmap names what it cannot trace in many ways; the loop needs none
            _ = error
            return False
        if together.shape != one_by_one.shape or not torch.allclose(together, one_by_one, rtol=1e-9, atol=1e-12):
            return False
    return True


def reads_the_order(algorithm: OwnAlgorithm, world_spec: WorldSpec) -> bool:
    """Whether the update changes when the completions of a group change places.

    A change of the first two and a turn of all by one make every order.
    """
    world = build(world_spec)
    loss_of = loss_of_groups(world, algorithm, side_by_side=False)
    size = world.num_generations
    orders = ([1, 0, *range(2, size)], [*range(1, size), 0])
    for groups in _sample(world_spec):
        theta_MPNV = world.policy.logits_PNV.expand(len(groups.weight_M), -1, -1, -1)
        there = updates(loss_of, theta_MPNV, groups)
        for order in orders:
            moved = torch.cat([chunk[:, order] for chunk in groups.index_MB.split(size, 1)], 1)
            here = updates(loss_of, theta_MPNV, Groups(moved, groups.prompt_MB, groups.weight_M))
            if not torch.allclose(there, here, rtol=1e-9, atol=1e-12):
                return True
    return False
