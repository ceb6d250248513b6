"""One update from one batch of scored rollouts: what the algorithm needs beside them, its advantages, the gradient and
the optimiser's steps, and what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..algorithms.algorithm import Algorithm, Batch
from ..device import to_device
from ..distributed.strategy import Strategy
from ..estimators.baselines import RunningMeans
from ..estimators.kl import k1, k3
from ..estimators.masked import masked_mean
from ..metrics import Clock
from ..model.critic import with_values
from ..model.policy import Policy
from ..model.teacher import ScoresTokens
from ..rollouts import TextRollouts
from ..sampling.random import stream_key, uniform
from .update import SeenTokens, Updater, UpdateStats, update_metrics

ORDER_STREAM = 3


# Of sampler and trainer, nats a token in the mean. In float32 one attention in some thousand tokens is rounded to the
# other neighbour, because two sums in float64 lie on both sides of the middle: about 1e-9.
EXACT = 1e-8


class Scored(Protocol):
    """Scored completions, as `Scorer.score` and the collectors return them."""

    @property
    def rollouts(self) -> TextRollouts: ...


@dataclass
class Update:
    """What one update did.

    Attributes:
        batch: the rollouts with their advantages, as the loss read them.
        steps: one entry for each step of the optimiser.
        seen: entropy and ratio of each token, as the passes met them.
        metrics: by the names of `metrics.METRICS`.
    """

    batch: Batch
    steps: list[UpdateStats]
    seen: SeenTokens
    metrics: dict[str, float]


def require_exact(gap: float) -> None:
    """Raises ValueError where the sampler's log-probabilities are not the trainer's: sampler_gap, nats a token."""
    if gap > EXACT:
        raise ValueError(
            f"exact_on_policy is true, and the sampler's log-probabilities are {gap:.2g} nats a token from the "
            "trainer's. Sample with sampling.exact.ExactSampler at the policy's type and temperature and at the "
            "weights of the update; layers with hooks and dropout take another way. Else leave exact_on_policy out."
        )


class Learner:
    """Turns scored rollouts into updates of a policy.

    Args:
        policy: what is trained. Where the algorithm has a KL penalty and the policy no reference yet, the reference is
            the policy as it is now.
        algorithm: gives advantages and loss.
        optimizer: a torch optimizer over `policy.parameters()`.
        scheduler: of the learning rate, stepped once an update; None = constant.
        teacher: scores the sampled tokens, where the algorithm has a teacher_coef; None = there is none.
        strategy: how an update is spread over processes; None = the policy's, which is this process alone.
        micro_rows: completions in one forward pass; None = all. Any value gives the same gradient.
        num_iterations: passes over a batch (μ), >= 1.
        num_minibatches: optimiser steps in a pass, of equal shares, >= 1.
        max_grad_norm: norm that gradients are clipped to; 0 = no clipping.
        num_steps: updates of the whole run, over which scheduled coefficients change; None = they stay as they begin.
        critic_only_steps: first updates in which only the critic learns.
        noise_steps: gradient noise is measured at every so many updates; 0 = never.
        reference_steps: the reference moves towards the policy every so many updates; 0 = never.
        reference_share: by this share of the distance, in (0, 1].
        seed: of the orders in which minibatches are drawn.
        clock: takes the seconds of each phase.

    Raises:
        ValueError: the algorithm needs a critic and the policy has none, or a teacher and none is given.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        optimizer: Any,
        scheduler: Any = None,
        *,
        teacher: ScoresTokens | None = None,
        strategy: Strategy | None = None,
        micro_rows: int | None = None,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        max_grad_norm: float = 1.0,
        num_steps: int | None = None,
        critic_only_steps: int = 0,
        noise_steps: int = 0,
        reference_steps: int = 0,
        reference_share: float = 1.0,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        if algorithm.spec.needs_critic and policy.critic is None:
            raise ValueError(
                f"Algorithm {algorithm.spec.name} learns from a critic and the policy has none: call "
                "policy.add_critic() before its optimizer is made."
            )
        if algorithm.spec.teacher_coef and teacher is None:
            raise ValueError(
                f"Algorithm {algorithm.spec.name} learns from a teacher and none is given: pass "
                "teacher=Teacher.from_pretrained(name, policy)."
            )
        if algorithm.spec.beta and not policy.has_reference:
            policy.freeze_reference()
        self.policy, self.algorithm, self.optimizer, self.teacher = policy, algorithm, optimizer, teacher
        self.strategy = strategy or policy.strategy
        self.scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.num_steps, self.seed, self.clock = num_steps, seed, clock or Clock()
        self.critic_only_steps, self.noise_steps = critic_only_steps, noise_steps
        self.reference_steps, self.reference_share = reference_steps, reference_share
        self.micro_rows = micro_rows or 10**9
        self.updater = Updater(
            policy,
            algorithm,
            optimizer,
            self.scheduler,
            self.strategy,
            micro_rows=self.micro_rows,
            num_iterations=num_iterations,
            num_minibatches=num_minibatches,
            max_grad_norm=max_grad_norm,
        )
        self.step = 0  # updates that were begun
        self.experience: Any = None  # of the newest update; with its batch it is saved when an update fails
        self.batch: Batch | None = None

    def update(self, experience: Scored) -> Update:
        """One update; on several ranks all must call it, each with its own rows.

        Args:
            experience: scored completions, of `Scorer.score` or with an attribute `rollouts`.

        Raises:
            torch.OutOfMemoryError: a single row does not fit into memory.
            ValueError: rewards that mean nothing to the algorithm.
        """
        self.step, self.experience, self.batch = self.step + 1, experience, None
        if self.algorithm.spec.baseline_column is not None:
            experience.rollouts.role_B = _roles(experience, self.algorithm.spec.baseline_column)
        rollouts, proximal_logp_BT = self._observe_before_update(experience.rollouts)
        critic_only = self.step <= self.critic_only_steps
        rate = 0.0 if critic_only else float(self.scheduler.get_last_lr()[0])
        metrics: dict[str, float] = {"learning_rate": rate}
        with self.clock("update"):
            progress = (self.step - 1) / self.num_steps if self.num_steps else 0.0
            all_sum = self.strategy.all_sum
            batch = self.batch = self.algorithm.compute_advantages(rollouts, progress=progress, all_sum=all_sum)
            if proximal_logp_BT is not None:
                batch.proximal_logp_BT = proximal_logp_BT
            noise = bool(self.noise_steps) and self.step % self.noise_steps == 0
            order = self._order(len(rollouts.mask_BT))
            steps = self.updater.update(batch, order, measure_noise=noise, critic_only=critic_only)
        metrics.update(self._metrics(batch, steps))
        if self.policy.layout.exact_on_policy:
            require_exact(metrics.get("sampler_gap", 0.0))
        metrics.update(self._adapt_after_update(steps))
        # Gradients are dead weight while keys and values of the next batch are held.
        self.strategy.zero_grad()
        return Update(batch, steps, self.updater.seen, metrics)

    def _observe_before_update(self, rollouts: TextRollouts) -> tuple[TextRollouts, Tensor | None]:
        """The passes before the update, each only where the algorithm needs it: reference, teacher, entropies,
        values.

        With them the log-probabilities of before the update, where the critic's pass gave them.
        """
        spec, policy = self.algorithm.spec, self.policy
        if spec.beta:
            with self.clock("reference"):
                rollouts.ref_logp_BT = policy.ref_logp(rollouts, self.micro_rows)
        if spec.teacher_coef:
            assert self.teacher is not None
            with self.clock("teacher"):
                rollouts.teacher_logp_BT = self.teacher.logp(rollouts, self.micro_rows)
        if spec.top_entropy_quantile < 1:
            with self.clock("update"):
                rollouts.entropy_BT = policy.entropies(rollouts, self.micro_rows)
        if not spec.needs_critic:
            return rollouts, None
        with self.clock("value"):
            after, reuses = spec.truncated == "bootstrap", self.updater.reuses
            seen = policy.observe(rollouts, self.micro_rows, with_logp=reuses, after=after)
            assert seen.value_BT is not None
            valued = with_values(rollouts, seen.value_BT, seen.after_B, gamma=spec.gamma)
            return valued, seen.logp_BT if reuses else None

    def _order(self, num_rows: int) -> Tensor:
        """The order of the rows in each pass over the batch, a function of (seed, step, pass)."""
        passes = torch.arange(self.updater.num_iterations)
        keys = stream_key(self.seed, ORDER_STREAM, self.step, passes)
        noise = uniform(keys.unsqueeze(1), torch.arange(num_rows).unsqueeze(0))
        return noise.argsort(1)

    def _metrics(self, batch: Batch, steps: list[UpdateStats]) -> dict[str, float]:
        rollouts = batch.rollouts
        values: dict[str, float] = {
            "entropy_coef": batch.entropy_coef,
            **update_metrics(steps, self.updater.num_minibatches),
        }
        if "aux_loss" in values:  # added pass by pass, beside the sum over the rows
            assert self.policy.routers is not None
            values["loss"] += self.policy.routers.coef * values["aux_loss"]
        if self.algorithm.spec.needs_critic:
            explained = self.algorithm.explained_variance(rollouts, batch.mask_BT, self.strategy.all_sum)
            values.update({} if explained is None else {"explained_variance": explained})
        if rollouts.ref_logp_BT is not None:
            values["kl"] = float(masked_mean(k3(rollouts.logp_BT, rollouts.ref_logp_BT), rollouts.mask_BT))
        if rollouts.teacher_logp_BT is not None:
            values["teacher_kl"] = float(masked_mean(k1(rollouts.logp_BT, rollouts.teacher_logp_BT), rollouts.mask_BT))
        return values

    def _adapt_after_update(self, steps: list[UpdateStats]) -> dict[str, float]:
        """What follows the steps: the reference may move, adaptive weights see the KL or the entropy that the last pass
        met."""
        if self.reference_steps and self.step % self.reference_steps == 0:
            self.policy.refresh_reference(self.reference_share)
        algorithm = self.algorithm
        if algorithm.entropy_bonus is not None:
            algorithm.observe_entropy(self._last_pass_mean(steps, "entropy"))
        if algorithm.kl_penalty is None:
            return {}
        algorithm.observe_kl(self._last_pass_mean(steps, "approx_kl"))
        return {"kl_penalty": algorithm.kl_penalty.weight}

    def _last_pass_mean(self, steps: list[UpdateStats], name: str) -> float:
        """A mean over the tokens of all ranks, in the last pass."""
        own = torch.tensor(sum(step.values.get(name, 0.0) for step in steps[-self.updater.num_minibatches :]))
        return float(self.strategy.all_sum(to_device(own, self.strategy.device)))


def _roles(experience: Any, column: str) -> Tensor | None:
    """The role of each row, read from a column of its prompt's row; what the rollouts hold where there are no prompts.

    Raises:
        ValueError: a prompt's row has no such column.
    """
    prompts = getattr(experience, "prompts", None)
    rollouts: TextRollouts = experience.rollouts
    if prompts is None:
        return rollouts.role_B
    for prompt in prompts:
        if column not in prompt.row:
            raise ValueError(
                f"baseline_column is {column!r}, and the row of prompt {prompt.index} has no such column. Present: "
                f"{', '.join(sorted(prompt.row)) or 'none'}."
            )
    role_P = torch.tensor([RunningMeans.role_of(prompt.row[column]) for prompt in prompts])
    return to_device(role_P.repeat_interleave(experience.num_generations), rollouts.mask_BT.device)
