"""A world small enough to prove in, and an algorithm's `compute_advantages` and `loss` as a function of its groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..algorithms.algorithm import Batch
from ..estimators.baselines import RunningMean, RunningMeans
from ..estimators.distributions import entropy, token_logp, warp_logits
from ..estimators.exact import EnumeratedCompletions, TabularPolicy, kl, objective, step_values
from ..estimators.expectation import Groups, LossOfGroups
from ..rollouts import Rollouts


class Estimator(Protocol):
    """What is proven: `Algorithm`, or anything with the same two methods."""

    def compute_advantages(self, rollouts: Rollouts) -> Batch: ...

    def loss(
        self, logp_BT: Tensor, batch: Batch, *, entropy_BT: Tensor | None = None, measure: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class FixedMean(RunningMean):
    """A running mean that stays: the expectation is over one step, whose baseline was fixed before it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.sum, self.weight = value, 1.0

    def update(self, mean: float | Tensor, num_rows: float | Tensor = 1) -> None:
        pass


class FixedMeans(RunningMeans):
    """A running mean for each role that stays, likewise.

    Args:
        values: of the roles 0, 1, ...
    """

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.sum_R[: len(values)] = torch.tensor(values, dtype=torch.float64)
        self.weight_R[:] = 1.0

    def update(self, *_: object, **__: object) -> None:
        pass


@dataclass(frozen=True)
class World:
    """Prompts, rewards, a sampler, and the ways in which training may differ from what was sampled.

    Attributes:
        policy: θ, and the sampler's settings (temperature, top-k...). Its expected reward is the objective.
        reward_PNV: reward of token v after prefix n.
        num_generations: G.
        all_prompts: False: a step samples one group, of a prompt drawn at random; True: a group of every prompt.
        reference: the frozen policy of the KL penalty.
        teacher: the policy that is distilled.
        behaviour: the policy that sampled, where the data are reused; None: `policy` did.
        mismatch: `behaviour` is a sampler that computes the present policy differently: the trainer has no other old
            log-probabilities than its own.
        trained_warp: settings of the trained log-probability; None: the sampler's.
        value_PN: what the critic says of each prefix.
        gamma: discount.
        train_eos: False leaves the EOS out of the loss.
        scored_PS: False where the reward function gives no verdict; the objective is then E[R | scored].
        ordered: list each order of a group separately.
        part_PSF: what each of several reward functions says of a completion; their sum is its return.
    """

    policy: TabularPolicy
    reward_PNV: Tensor
    num_generations: int = 4
    all_prompts: bool = False
    reference: TabularPolicy | None = None
    teacher: TabularPolicy | None = None
    behaviour: TabularPolicy | None = None
    mismatch: bool = False
    trained_warp: Mapping[str, float] | None = None
    value_PN: Tensor | None = None
    gamma: float = 1.0
    train_eos: bool = True
    scored_PS: Tensor | None = None
    ordered: bool = False
    part_PSF: Tensor | None = None

    @property
    def completions(self) -> EnumeratedCompletions:
        return self.policy.completions

    @property
    def _scored_PS(self) -> Tensor:
        everything = torch.ones(self.policy.num_prompts, self.completions.num_completions, dtype=torch.bool)
        return everything if self.scored_PS is None else self.scored_PS

    @property
    def sampled(self) -> TabularPolicy:
        return self.policy if self.behaviour is None else self.behaviour

    @property
    def return_PS(self) -> Tensor:
        """Discounted return of each completion of each prompt."""
        c = self.completions
        return (step_values(c, self.reward_PNV) * self.gamma ** torch.arange(c.horizon, dtype=torch.float64)).sum(2)

    def replace(self, **changes: Any) -> World:
        return dataclasses.replace(self, **changes)

    def gradient_of_best(self, k: int) -> Tensor:
        """∇E[largest return of k completions], (P, N, V)."""
        order_PS = self.return_PS.argsort(1)
        leaf_PNV = self.policy.logits_PNV.clone().requires_grad_()
        up_to_PS = self.policy.with_logits(leaf_PNV).prob_PS().gather(1, order_PS).cumsum(1) ** k
        chance_PS = torch.cat([up_to_PS[:, :1], up_to_PS.diff(dim=1)], 1)
        value = (chance_PS * self.return_PS.gather(1, order_PS)).sum(1).mean()
        return torch.autograd.grad(value, leaf_PNV)[0]

    def gradient_of_likelihood(self, terms: int) -> Tensor:
        """∇ of log p cut off after `terms` terms, -Σ (1-p)^k/k with p the expected return, (P, N, V)."""
        leaf_PNV = self.policy.logits_PNV.clone().requires_grad_()
        failed_P = 1 - (self.policy.with_logits(leaf_PNV).prob_PS() * self.return_PS).sum(1)
        value = torch.stack([-(failed_P**k) / k for k in range(1, terms + 1)]).sum(0).mean()
        return torch.autograd.grad(value, leaf_PNV)[0]

    def gradient(self, beta: float = 0.0, reward_coef: float = 1.0, teacher_coef: float = 0.0) -> Tensor:
        """∇(reward_coef·J - beta·KL(π‖reference) - teacher_coef·KL(π‖teacher)), (P, N, V)."""
        if self.scored_PS is None:
            gradient = objective(self.policy, self.reward_PNV, self.gamma).gradient_PNV
        else:
            gradient = self._gradient_where_scored()
        gradient = reward_coef * gradient
        if teacher_coef and self.teacher is not None:
            gradient = gradient - teacher_coef * kl(self.policy, self.teacher).gradient_PNV
        if beta and self.reference is not None:
            gradient = gradient - beta * kl(self.policy, self.reference).gradient_PNV
        return gradient

    def _gradient_where_scored(self) -> Tensor:
        assert self.scored_PS is not None
        leaf_PNV = self.policy.logits_PNV.clone().requires_grad_()
        scored_PS = self.policy.with_logits(leaf_PNV).prob_PS() * self.scored_PS
        value = ((scored_PS * self.return_PS).sum(1) / scored_PS.sum(1)).mean()
        return torch.autograd.grad(value, leaf_PNV)[0]

    @property
    def _greedy_return_P(self) -> Tensor:
        """Return of the completion that takes the likeliest token at every step."""
        c = self.completions
        best_PN = self.sampled.logits_PNV.argmax(2)
        taken_PS = ((best_PN[:, c.prefix_ST] == c.tokens_ST) | ~c.mask_ST).all(2)
        return self.return_PS[taken_PS]

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """What is in `Rollouts`, for each prompt and completion: (P, S, T) or (P, S)."""
        c, num_prompts = self.completions, self.policy.num_prompts
        reward_PST = step_values(c, self.reward_PNV)
        mask_PST = c.mask_ST.expand(num_prompts, -1, -1)
        next_ST = c.child_NV[c.prefix_ST, c.tokens_ST] >= 0
        loss_mask_PST = mask_PST if self.train_eos else mask_PST & (c.tokens_ST != c.eos)
        tables = {
            "mask_BT": loss_mask_PST,
            "logp_BT": self.sampled.logp_PST(),
            "reward_BT": reward_PST,
            "discount_BT": (mask_PST & next_ST) * torch.tensor(self.gamma, dtype=reward_PST.dtype),
            "cut_BT": torch.zeros_like(mask_PST),
            "valid_B": self._scored_PS,
            "truncated_B": c.truncated_S.expand(num_prompts, -1),
            "role_B": torch.arange(num_prompts).unsqueeze(1).expand(-1, c.num_completions),
            "greedy_B": self._greedy_return_P.unsqueeze(1).expand(-1, c.num_completions),
        }
        policy = self.policy
        entropy_PN = entropy(policy.warped(policy.logits_PNV))
        tables["entropy_BT"] = torch.where(c.mask_ST, entropy_PN[:, c.prefix_ST], 0.0)
        if self.teacher is not None:
            tables["teacher_logp_BT"] = self.teacher.logp_PST()
        if self.reference is not None:
            tables["ref_logp_BT"] = self.reference.logp_PST()
        if self.part_PSF is not None:
            tables |= {"part_reward_B": self.part_PSF, "part_weight_B": torch.ones_like(self.part_PSF)}
        if self.value_PN is not None:
            value_PST = self.value_PN[:, c.prefix_ST]
            tables["value_BT"] = torch.where(c.mask_ST, value_PST, torch.zeros_like(value_PST))
        return tables

    def fields(self, groups: Groups) -> dict[str, Tensor]:
        """The fields of `Rollouts` for each batch, (M, B, T) or (M, B)."""
        return {name: table[groups.prompt_MB, groups.index_MB] for name, table in self._tables.items()}

    @property
    def group_B(self) -> Tensor:
        groups = self.policy.num_prompts if self.all_prompts else 1
        return torch.arange(groups).repeat_interleave(self.num_generations)

    def trained_logits(self, theta_MPNV: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Logits of each step as a trainer computes them, (M, B, T, V), and the tokens, (M, B, T)."""
        c = self.completions
        state_MBT = groups.prompt_MB.unsqueeze(2) * c.num_prefixes + c.prefix_ST[groups.index_MB]
        rows_M11 = torch.arange(len(state_MBT)).reshape(-1, 1, 1)
        logits = theta_MPNV.reshape(len(state_MBT), -1, c.vocab_size)[rows_M11, state_MBT]
        tokens = c.tokens_ST[groups.index_MB]
        warp = self.policy.warp if self.trained_warp is None else self.trained_warp
        return warp_logits(logits, keep=tokens, **warp), tokens  # type: ignore[arg-type]


def _unchecked(fields: dict[str, Tensor], group_B: Tensor) -> Rollouts:
    """Rollouts whose border check, which reads numbers, cannot run inside vmap."""
    rollouts = object.__new__(Rollouts)
    for f in dataclasses.fields(Rollouts):
        setattr(rollouts, f.name, group_B if f.name == "group_B" else fields.get(f.name))
    return rollouts


def one_loss(world: World, estimator: Estimator, rollouts: Rollouts, logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """The loss of one batch as a trainer gets it: `compute_advantages`, log-probabilities of reused data, `loss`."""
    batch = estimator.compute_advantages(rollouts)
    if world.behaviour is not None and not world.mismatch:
        batch = dataclasses.replace(batch, proximal_logp_BT=rollouts.logp_BT)
    entropy_BT = entropy(logits_BTV) if batch.entropy_coef else None
    return estimator.loss(token_logp(logits_BTV, tokens_BT), batch, entropy_BT=entropy_BT, measure=False)[0]


def loss_of_groups(world: World, estimator: Estimator, *, side_by_side: bool = True) -> LossOfGroups:
    """`estimator` on the groups of `world`, for `expected_update`; all at once, or one after another."""

    def vectorised(theta_MPNV: Tensor, groups: Groups) -> Tensor:
        def one(fields: dict[str, Tensor], logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
            return one_loss(world, estimator, _unchecked(fields, world.group_B), logits_BTV, tokens_BT)

        return torch.vmap(one)(world.fields(groups), *world.trained_logits(theta_MPNV, groups))

    def looped(theta_MPNV: Tensor, groups: Groups) -> Tensor:
        logits_MBTV, tokens_MBT = world.trained_logits(theta_MPNV, groups)
        fields = world.fields(groups)
        losses = []
        for m in range(len(groups.weight_M)):
            rollouts = Rollouts(group_B=world.group_B, **{name: value[m] for name, value in fields.items()})
            losses.append(one_loss(world, estimator, rollouts, logits_MBTV[m], tokens_MBT[m]))
        return torch.stack(losses)

    return vectorised if side_by_side else looped
