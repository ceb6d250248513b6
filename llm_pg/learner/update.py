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
from ..distributed.shards import whole
from ..distributed.zero import Zero
from ..estimators.noise import GradientNoise, gradient_noise, half_square_norms
from ..metrics import METRICS
from ..model.policy import Policy, PolicyOutput, halves
from ..rollouts import TextRollouts


@dataclass
class UpdateStats:
    """Of one optimiser step: sums over the batch, the gradient's norm before clipping, whether it stepped (not where
    loss or gradient were not finite on any rank), how often a micro-batch was halved for want of memory, and signal and
    noise of the gradient where they were measured."""

    values: dict[str, float]
    grad_norm: float
    stepped: bool
    splits: int = 0
    noise: GradientNoise | None = None
    critic_grad_norm: float | None = None


class SeenTokens:
    """What the passes of an update saw of each token, for people to read; NaN where no pass came by (rows of weight 0).

    entropy_BT: of the first pass, before the first step. logp_BT: of the last pass.
    """

    def __init__(self, like_BT: Tensor) -> None:
        self.entropy_BT = torch.full_like(like_BT, float("nan"), dtype=torch.float32)
        self.logp_BT = self.entropy_BT.clone()

    def note(self, rows: Tensor, scores: PolicyOutput) -> None:
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
        optimizer, scheduler: stepped once per minibatch; the scheduler once per batch of rollouts. A `Zero` sums and
            clips gradients itself.
        accelerator: accelerate's, for mixed precision and for sums over ranks.
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
        accelerator: Any,
        *,
        micro_rows: int,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.policy, self.algorithm, self.accelerator = policy, algorithm, accelerator
        self.optimizer, self.scheduler = optimizer, scheduler
        self.zero = optimizer if isinstance(optimizer, Zero) else None
        self.micro_rows, self.max_grad_norm = micro_rows, max_grad_norm
        self.num_iterations, self.num_minibatches = num_iterations, num_minibatches
        self.progress: Callable[[int], None] | None = None  # told the rows of each pass that is done
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
            order: int64 (num_iterations, B): the order of the rows in each pass (it only matters with minibatches).
            measure_noise: tell signal from noise in the first step's gradient, from its two halves. Needs whole groups
                in a step (one minibatch), at least two of them, one rank and no loss scaler; else nothing is measured.
            critic_only: no step of the policy, nor of its schedule: the critic's warm-up.
        """
        self.critic_only = critic_only
        if self.reuses and batch.proximal_logp_BT is None:
            rollouts = batch.rollouts
            assert isinstance(rollouts, TextRollouts)
            batch.proximal_logp_BT = self.policy.logp(rollouts, self.micro_rows)
        alone = self.accelerator.num_processes == 1 and self.accelerator.scaler is None
        measure_noise = measure_noise and alone and self.num_minibatches == 1 and not critic_only
        self.seen, steps = SeenTokens(batch.rollouts.logp_BT), []
        for iteration in range(self.num_iterations):
            for rows in order[iteration].chunk(self.num_minibatches):
                self.rows = rows
                steps.append(self._step(batch.rows(rows), measure_noise and iteration == 0))
        if not critic_only:
            self.scheduler.step()
        self._over_seen_tokens(batch, steps)
        return steps

    def _over_seen_tokens(self, batch: Batch, steps: list[UpdateStats]) -> None:
        """Means over tokens, of sums divided by the number of all: rows of weight 0 are dropped and have no entropy."""
        seen = (batch.mask_BT & self.algorithm.contributes_B(batch).unsqueeze(1)).sum().to(batch.num_tokens.dtype)
        share = float(self.accelerator.reduce(seen, reduction="sum") / batch.num_tokens)
        for stats in steps if share else ():
            for name in stats.values:
                if METRICS[name].minibatches == "sum of seen tokens":
                    stats.values[name] /= share

    def _step(self, batch: Batch, measure_noise: bool) -> UpdateStats:
        self.policy.model.train()
        if self.policy.critic is not None:
            self.policy.critic.train()
        values, splits, noise = self._gradient(batch, measure_noise)
        if self.zero is not None:
            return self._step_of(self.zero, batch, values)
        self._sum_gradients(batch)
        grad_norm, critic_norm = self._clip()
        if not self._finite_everywhere(values):
            grad_norm = float("nan")
        stepped = math.isfinite(grad_norm + (critic_norm or 0.0))
        # A loss scaler looks at gradients alone, so a NaN of the loss is not left to it. It lowers its scale where they
        # overflowed; where no row had a weight there are none that it could have looked at.
        scaler = self.accelerator.scaler
        if stepped and (scaler is None or self._has_gradient()):
            self.optimizer.step()
        elif scaler is not None and self._has_gradient():
            scaler.update()
        return UpdateStats(values, grad_norm, stepped, splits, noise if stepped else None, critic_norm)

    def _step_of(self, zero: Zero, batch: Batch, values: dict[str, float]) -> UpdateStats:
        """The sum over ranks is there, and what of it is not finite is dropped; the loss itself is looked at here."""
        if not self.passes:  # no row of any rank counts
            return UpdateStats(values, 0.0, True)
        if not self._finite_everywhere(values):
            self._keep_pace(batch, 1, math.nan)
        return UpdateStats(values, *zero.step())

    def _gradient(self, batch: Batch, measure_noise: bool) -> tuple[dict[str, float], int, GradientNoise | None]:
        """Sums over this rank's rows, their gradient in `.grad`, the halvings of a micro-batch it took, and its noise.

        A backward pass that runs out of memory leaves a part of its gradient behind, so all of it is made again with
        smaller pieces. The longest rows come first, so little is lost; the gradient is the same however it is cut.
        """
        most, splits = len(batch.mask_BT), 0  # rows in one piece; lowered where memory ends
        alive = self.algorithm.contributes_B(batch).nonzero().squeeze(1)
        parts = self._halves(batch, alive) if measure_noise else [alive]
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            self.passes = 0  # idle ones too
            values: dict[str, float] = {}
            first: list[Tensor] | None = None
            piece = alive
            try:
                self._count_choices(batch, alive, most, len(parts))
                for number, part in enumerate(parts):
                    first = self._gradients() if number else None
                    pieces = self._pieces(batch, part, most)
                    idle = self._idle_passes(len(pieces))
                    self.passes += len(pieces) + idle
                    for piece in pieces:
                        for key, value in self._backward(batch.rows(piece), self.rows[piece]).items():
                            values[key] = values.get(key, 0.0) + value
                        if self.progress is not None:
                            self.progress(len(piece))
                    self._keep_pace(batch, idle)
                return values, splits, self._noise(batch, first) if first is not None else None
            except torch.OutOfMemoryError as error:
                if self._in_step:  # the other ranks are waiting for this one in the same pass
                    raise
                most = len(halves(piece, error)[0])
                splits += 1

    def _count_choices(self, batch: Batch, alive: Tensor, most: int, parts: int) -> None:
        """Of the experts, by all tokens of this step on all ranks, before the passes that weigh them; one pass that is
        the whole step counts them itself."""
        routers, alone = self.policy.routers, self.accelerator.num_processes == 1
        if routers is None or self.critic_only:
            return
        if alone and parts == 1 and len(self._pieces(batch, alive, most)) <= 1:
            routers.forget()
            return
        self.policy.count_choices(
            batch.rollouts.rows(alive) if len(alive) else None,
            self.micro_rows,
            lambda x: x if alone else self.accelerator.reduce(x, reduction="sum"),
        )

    def _pieces(self, batch: Batch, rows: Tensor, most: int) -> list[Tensor]:
        """The rows of each forward pass, at most `most` together."""
        if not len(rows):
            return []
        cuts = self.policy.cuts(batch.rollouts.rows(rows), self.micro_rows)
        return [rows[index] for cut in cuts for index in cut.split(most)]

    @property
    def _in_step(self) -> bool:
        """Whether a pass is an exchange between all ranks, so that all must make the same number."""
        return self.policy.shards is not None or self.zero is not None

    def _idle_passes(self, passes: int) -> int:
        """How many more the busiest rank makes."""
        if not self._in_step:
            return 0
        own = torch.tensor([passes], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max()) - passes

    def _keep_pace(self, batch: Batch, passes: int, weight: float = 0.0) -> None:
        """Passes without weight, which bring the other ranks the parts of the layers that stand here."""
        if not passes:
            return
        rollouts = batch.rollouts
        assert isinstance(rollouts, TextRollouts)
        shortest = rollouts.length_B.argmin().unsqueeze(0)
        for _ in range(passes):
            scores = self.policy.forward(rollouts.rows(shortest), with_entropy=False, frozen=self.critic_only)
            reached = scores.logp_BT.sum() if scores.value_BT is None else scores.logp_BT.sum() + scores.value_BT.sum()
            self._back(reached * weight)

    def _halves(self, batch: Batch, alive: Tensor) -> list[Tensor]:
        """The rows `alive` of every other group, and those of the rest; one piece where there is one group."""
        groups, place_B = torch.unique(batch.rollouts.group_B, return_inverse=True)
        if len(groups) == 1:
            return [alive]
        odd = place_B[alive] % 2 == 1
        return [alive[~odd], alive[odd]]

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.parameters()]

    def _noise(self, batch: Batch, first: list[Tensor]) -> GradientNoise:
        num_groups = len(torch.unique(batch.rollouts.group_B))
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.policy.parameters()]
        one, other, both = (float(x) for x in half_square_norms(first, whole))
        return gradient_noise([one, other], both, [num_groups - num_groups // 2, num_groups // 2])

    def _finite_everywhere(self, values: dict[str, float]) -> bool:
        """Whether the loss is a number on every rank; a NaN in it can have a gradient that is finite."""
        losses = [value for key, value in values.items() if key.endswith("_loss")]
        total = torch.tensor(sum(losses), dtype=torch.float32, device=self.accelerator.device)
        total = self.accelerator.reduce(total, reduction="sum")
        return math.isfinite(float(total))

    def _backward(self, part: Batch, rows: Tensor) -> dict[str, float]:
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
        self._back(loss)
        return {key: float(value) for key, value in stats.items()}

    def _back(self, loss: Tensor) -> None:
        (self.accelerator if self.zero is None else self.zero).backward(loss)

    def _sum_gradients(self, batch: Batch) -> None:
        """Add the ranks' gradients: with global denominators the sum is the gradient of the whole batch.

        Where no row of any rank counts there is none, as with one rank: zeros would let the moments move the weights.
        """
        if self.accelerator.num_processes == 1 or self.policy.shards is not None:  # shards are summed as they are made
            return
        alive = self.algorithm.contributes_B(batch).sum().to(self.accelerator.device)
        if not int(self.accelerator.reduce(alive, reduction="sum")):
            return
        for parameter in [*([] if self.critic_only else self.policy.parameters()), *self._critic_parameters()]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")

    def _critic_parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.policy.critic is None else self.policy.critic.trainable()

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in [*self.policy.parameters(), *self._critic_parameters()])

    def _clip(self) -> tuple[float, float | None]:
        """Gradient norms before clipping, of policy and critic; each is held to the limit on its own, so that a large
        error of the critic does not shorten the policy's step."""
        limit = self.max_grad_norm or float("inf")
        own = [p for p in self.policy.parameters() if p.grad is not None]
        critic = [p for p in self._critic_parameters() if p.grad is not None]
        norm, critic_norm = 0.0, None if self.policy.critic is None else 0.0
        if own:  # this also takes the loss scale out of every gradient, the critic's too
            norm = float(whole(self.accelerator.clip_grad_norm_(own, limit)))
        elif critic:
            self.accelerator.unscale_gradients()
        if critic:
            critic_norm = float(whole(torch.nn.utils.clip_grad_norm_(critic, limit)))
        return norm, critic_norm


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
