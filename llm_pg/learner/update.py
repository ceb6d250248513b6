"""The update of the policy, and of its critic: gradients summed over micro-batches, then over ranks, then one step.

The reduction is already inside the batch's scales, so that every sum here is plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithms.algorithm import Algorithm, Batch
from ..device import to_device
from ..distributed.strategy import Strategy
from ..estimators.noise import GradientNoise, gradient_noise, half_square_norms
from ..metrics import METRICS
from ..model.layout import halves
from ..model.output import OutputFlags, PolicyOutput
from ..model.policy import Policy
from ..rollouts import TextRollouts


@dataclass
class UpdateStats:
    """Of one optimiser step.

    Attributes:
        values: sums over this rank's rows.
        grad_norm: of the gradient before clipping.
        stepped: not where loss or gradient were not finite on any rank.
        splits: how often a micro-batch was halved for want of memory.
        noise: signal and noise of the gradient, where they were measured.
        critic_grad_norm: None where there is no critic.
        tokens: of all ranks, that a pass came by. batch_tokens: of all ranks, in the whole batch.
    """

    values: dict[str, float]
    grad_norm: float
    stepped: bool
    splits: int = 0
    noise: GradientNoise | None = None
    critic_grad_norm: float | None = None
    tokens: float = 0.0
    batch_tokens: float = 0.0


class SeenTokens:
    """What the passes of an update saw of each token, for people to read; NaN where no pass came by (rows of weight 0).

    entropy_BT: of the first pass, before the first step. logp_BT: of the last pass.
    """

    def __init__(self, like_BT: Tensor) -> None:
        self.entropy_BT = torch.full_like(like_BT, float("nan"), dtype=torch.float32)
        self.logp_BT = self.entropy_BT.clone()

    def note(self, rows: Tensor, scores: PolicyOutput) -> None:
        rows = to_device(rows, self.entropy_BT.device)
        entropy_BT = self.entropy_BT[rows]
        self.entropy_BT[rows] = torch.where(entropy_BT.isnan(), scores.entropy_BT.detach().float(), entropy_BT)
        self.logp_BT[rows] = scores.logp_BT.detach().float()

    def numbers(self, behavior_logp_BT: Tensor) -> dict[str, Tensor]:
        """entropy, and the ratio of the last pass to the log-probabilities that were sampled with."""
        return {"entropy": self.entropy_BT, "ratio": (self.logp_BT - behavior_logp_BT).exp()}


class Updater:
    """Turns a weighted batch into optimiser steps.

    Args:
        policy: what is trained. algorithm: whose `loss` is summed.
        optimizer, scheduler: stepped once per minibatch; the scheduler once per batch of rollouts.
        strategy: how an update is spread over processes; None = the policy's.
        micro_rows: completions in one forward pass; any value gives the same gradient.
        num_iterations, num_minibatches: μ and the cuts of a pass; with both 1 the data are on-policy.
        max_grad_norm: 0 = no clipping.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        optimizer: Any,
        scheduler: Any,
        strategy: Strategy | None = None,
        *,
        micro_rows: int,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.policy, self.algorithm, self.scheduler = policy, algorithm, scheduler
        self.strategy = strategy or policy.strategy
        self.strategy.prepare(policy, optimizer, max_grad_norm)
        self.micro_rows = micro_rows
        self.num_iterations, self.num_minibatches = num_iterations, num_minibatches
        self.progress: Callable[[int], None] | None = None  # is given the rows of each pass that is done
        self.critic_only = False

    @property
    def reuses(self) -> bool:
        """Whether a batch makes more than one step, so that it needs the log-probabilities from before the first."""
        return self.num_iterations * self.num_minibatches > 1

    def update(
        self, batch: Batch, order: Tensor, *, measure_noise: bool = False, critic_only: bool = False
    ) -> list[UpdateStats]:
        """All optimiser steps on one batch of rollouts.

        Args:
            batch: this rank's rows, weighted.
            order: int64 (num_iterations, B), on the host: the order of the rows in each pass (it only matters with
                minibatches).
            measure_noise: tell signal from noise in the first step's gradient, from its two halves. Needs whole groups
                in a step (one minibatch), at least two of them, one rank and no loss scaler; else nothing is measured.
            critic_only: no step of the policy, nor of its schedule: the critic's warm-up.
        """
        self.critic_only, order = critic_only, order.cpu()
        if self.reuses and batch.proximal_logp_BT is None:
            rollouts = batch.rollouts
            assert isinstance(rollouts, TextRollouts)
            batch.proximal_logp_BT = self.policy.logp(rollouts, self.micro_rows)
        alone = self.strategy.num_ranks == 1 and self.strategy.scaler is None
        measure_noise = measure_noise and alone and self.num_minibatches == 1 and not critic_only
        self.seen = SeenTokens(batch.rollouts.logp_BT)
        steps: list[UpdateStats] = []
        with self.policy.layout.copies.held():
            self._passes(batch, order, steps, measure_noise)
        if not critic_only:
            self.scheduler.step()
        self._over_seen_tokens(batch, steps)
        return steps

    def _passes(self, batch: Batch, order: Tensor, steps: list[UpdateStats], measure_noise: bool) -> None:
        for iteration in range(self.num_iterations):
            for rows in order[iteration].chunk(self.num_minibatches):
                self.rows = rows
                steps.append(self._step(batch.rows(rows), measure_noise and iteration == 0))
                self.policy.layout.copies.forget()  # some optimisers write where torch does not see it

    def _over_seen_tokens(self, batch: Batch, steps: list[UpdateStats]) -> None:
        """Means over tokens, of sums divided by the number of all: rows of weight 0 are dropped and have no entropy."""
        seen = sum(stats.tokens for stats in steps[: len(steps) // self.num_iterations])
        every = torch.tensor([seen, steps[0].batch_tokens], dtype=batch.num_tokens.dtype)
        share = float(every[0] / every[1])
        for stats in steps if share else ():
            for name in stats.values:
                if METRICS[name].minibatches == "sum of seen tokens":
                    stats.values[name] /= share

    def _step(self, batch: Batch, measure_noise: bool) -> UpdateStats:
        policy = self.policy
        policy.model.train()
        if policy.critic is not None:
            policy.critic.train()
        alive_B = self.algorithm.contributes_B(batch)
        alive = alive_B.cpu().nonzero().squeeze(1)  # the device is waited for
        sums, splits, noise = self._gradient(batch, alive, measure_noise)
        # Of all ranks: rows, tokens that a pass came by, and the loss, whose NaN can have a gradient that is finite.
        counts = torch.stack([alive_B.sum(), (batch.mask_BT & alive_B.unsqueeze(1)).sum()])
        loss = sum((x for name, x in sums.items() if name.endswith("_loss")), start=counts.new_zeros(()))
        shared = self.strategy.all_sum(torch.stack([*counts.double().unbind(), loss.double()]))
        numbers = torch.stack([*sums.values(), *shared.unbind(), batch.num_tokens.double()])
        *own, rows, tokens, total, batch_tokens = numbers.tolist()  # the device is waited for
        values = dict(zip(sums, own, strict=True))
        done = self.strategy.step(
            [] if self.critic_only else policy.parameters(),
            None if policy.critic is None else policy.critic.trainable(),
            has_rows=rows > 0,
            is_finite=math.isfinite(total),
            spoil=lambda: self._keep_pace(batch, 1, math.nan),
        )
        kept = noise if done.stepped else None
        return UpdateStats(
            values, done.grad_norm, done.stepped, splits, kept, done.critic_grad_norm, tokens, batch_tokens
        )

    def _gradient(
        self, batch: Batch, alive: Tensor, measure_noise: bool
    ) -> tuple[dict[str, Tensor], int, GradientNoise | None]:
        """Sums over this rank's rows `alive` (float64, on the device), their gradient in `.grad`, the halvings of a
        micro-batch it took, and its noise.

        A backward pass that runs out of memory leaves a part of its gradient behind, so all of it is made again with
        smaller pieces. The longest rows come first, so little is lost; the gradient is the same however it is cut.
        """
        most, splits = len(batch.mask_BT), 0  # rows in one piece; lowered where memory ends
        parts = self._halves(batch, alive) if measure_noise else [alive]
        while True:
            self.strategy.zero_grad()
            sums: dict[str, Tensor] = {}
            first: list[Tensor] | None = None
            piece = alive
            try:
                self._count_choices(batch, alive, most, len(parts))
                for number, part in enumerate(parts):
                    first = self._gradients() if number else None
                    pieces = self._pieces(batch, part, most)
                    idle = self.strategy.idle_passes(len(pieces))
                    for piece in pieces:
                        for name, x in self._backward(batch.rows(piece), self.rows[piece]).items():
                            sums[name] = sums[name] + x.double() if name in sums else x.double()
                        if self.progress is not None:
                            self.progress(len(piece))
                    self._keep_pace(batch, idle)
                return sums, splits, self._noise(batch, first) if first is not None else None
            except torch.OutOfMemoryError as error:
                if self.strategy.sharded:  # the other ranks are waiting for this one in the same pass
                    raise
                most = len(halves(piece, error)[0])
                splits += 1

    def _count_choices(self, batch: Batch, alive: Tensor, most: int, parts: int) -> None:
        """Of the experts, by all tokens of this step on all ranks, before the passes that weigh them; one pass that is
        the whole step counts them itself."""
        routers = self.policy.routers
        if routers is None or self.critic_only:
            return
        if self.strategy.num_ranks == 1 and parts == 1 and len(self._pieces(batch, alive, most)) <= 1:
            routers.forget()
            return
        with routers.counting(self.policy.model):
            if len(alive):
                self.policy.compute(batch.rollouts.rows(alive), self.micro_rows, OutputFlags(logp=False))
            else:
                with self.policy.gathered():  # the others need this rank's parts of the weights
                    pass
        routers.sum_over(self.strategy.all_sum)

    def _pieces(self, batch: Batch, rows: Tensor, most: int) -> list[Tensor]:
        """The rows of each forward pass, at most `most` together."""
        if not len(rows):
            return []
        cuts = self.policy.layout.cuts(batch.rollouts.rows(rows), self.micro_rows)
        return [rows[index] for cut in cuts for index in cut.split(most)]

    def _keep_pace(self, batch: Batch, passes: int, weight: float = 0.0) -> None:
        """Passes without weight, which bring the other ranks the parts of the layers that are here."""
        if not passes:
            return
        rollouts = batch.rollouts
        assert isinstance(rollouts, TextRollouts)
        shortest = rollouts.on_host("mask_BT").sum(1).argmin().unsqueeze(0)
        for _ in range(passes):
            scores = self.policy.forward(rollouts.rows(shortest), with_entropy=False, frozen=self.critic_only)
            reached = scores.logp_BT.sum() if scores.value_BT is None else scores.logp_BT.sum() + scores.value_BT.sum()
            self.strategy.backward(reached * weight)

    def _halves(self, batch: Batch, alive: Tensor) -> list[Tensor]:
        """The rows `alive` of every other group, and those of the rest; one piece where there is one group."""
        groups, place_B = torch.unique(batch.rollouts.on_host("group_B"), return_inverse=True)
        if len(groups) == 1:
            return [alive]
        odd = place_B[alive] % 2 == 1
        return [alive[~odd], alive[odd]]

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.parameters()]

    def _noise(self, batch: Batch, first: list[Tensor]) -> GradientNoise:
        num_groups = len(torch.unique(batch.rollouts.on_host("group_B")))
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.policy.parameters()]
        one, other, both = torch.stack(list(half_square_norms(first, whole))).tolist()
        return gradient_noise([one, other], both, [num_groups - num_groups // 2, num_groups // 2])

    def _backward(self, part: Batch, rows: Tensor) -> dict[str, Tensor]:
        rollouts = part.rollouts
        assert isinstance(rollouts, TextRollouts)
        scores = self.policy.forward(
            rollouts, entropy_grad=bool(part.entropy_coef), balance=True, frozen=self.critic_only
        )
        self.seen.note(rows, scores)
        loss, stats = self.algorithm.loss(scores.logp_BT, part, entropy_BT=scores.entropy_BT, value_BT=scores.value_BT)
        stats["loss"] = loss.detach()
        # Each minibatch is an optimiser step of its own, of the size the whole batch would have had.
        loss = loss * self.num_minibatches
        if scores.balance is not None:  # a mean over the step's tokens already
            assert self.policy.routers is not None
            loss = loss + self.policy.routers.coef * scores.balance
            stats["aux_loss"] = scores.balance.detach()
        self.strategy.backward(loss)
        return stats


def update_metrics(updates: Sequence[UpdateStats], per_pass: int) -> dict[str, Any]:
    """Of the optimiser steps of one batch: means over them, where sums over a pass stay sums; NaN stays NaN.

    per_pass: minibatches of a pass.
    """
    out: dict[str, Any] = {"skipped_updates": sum(not update.stepped for update in updates)}
    for name in dict.fromkeys(name for update in updates for name in update.values):
        share = 1 if METRICS[name].minibatches == "mean" else per_pass
        out[name] = sum(update.values.get(name, 0.0) for update in updates) / len(updates) * share
    out["grad_norm"] = sum(update.grad_norm for update in updates) / len(updates)
    critic = [update.critic_grad_norm for update in updates if update.critic_grad_norm is not None]
    if critic:
        out["critic_grad_norm"] = sum(critic) / len(critic)
    for noise in (update.noise for update in updates if update.noise is not None):
        out.update({"gradient_signal": noise.signal, "gradient_noise": noise.noise})
    splits = sum(update.splits for update in updates)
    return {**out, "oom_splits": splits} if splits else out
