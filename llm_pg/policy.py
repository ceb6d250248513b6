"""The policy in training: log-probabilities of what was sampled, the frozen reference, and the update.

The reduction is already inside the batch's scales, so the update sums over micro-batches, then over ranks, and steps.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .algorithms.algorithm import Algorithm, Batch
from .attention import core_of, eval_mode, recomputes
from .estimators.distributions import entropy, token_logp
from .estimators.noise import GradientNoise, gradient_noise, half_square_norms
from .head import head_is_separate, token_scores
from .packing import bins, packed_hidden, packs_exactly
from .rollouts import TextRollouts
from .sampling.protocol import SamplingParams

# Tokens of one packed forward pass at most, by the kind of device: beyond them a pass grows in memory, not in speed.
TOKENS_PER_PASS = {"cpu": 1024}
TOKENS_PER_PASS_OTHERWISE = 32_768


@dataclass
class Scores:
    """Of the sampled tokens under some weights: logp_BT and entropy_BT (nats, float32; 0 outside the mask)."""

    logp_BT: Tensor
    entropy_BT: Tensor


class Policy:
    """A causal LM as π_θ.

    Args:
        model: the model in training (a PEFT model keeps its reference inside: the adapter switched off).
        params: the distribution that is sampled; its temperature and support enter the trained log-probability.
        pad_id: filler of unused positions, never attended.
        with_reference: keep a frozen reference (needed where beta > 0).
        autocast: context in which forwards run (mixed precision).
        packing: shared_prefix (no padding, each prompt once for all its completions), padded (a row a completion), or
            auto: shared_prefix where a trial shows that it computes the same.

    Raises:
        ValueError: packing is shared_prefix and the model's attention is not covered.
    """

    def __init__(
        self,
        model: Any,
        *,
        params: SamplingParams,
        pad_id: int,
        with_reference: bool = False,
        autocast: Any = contextlib.nullcontext,
        packing: str = "auto",
    ) -> None:
        self.model, self.params, self.pad_id, self.autocast = model, params, pad_id, autocast
        self.has_adapter = hasattr(model, "disable_adapter")
        self.reference = None
        if with_reference and not self.has_adapter:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.with_reference = with_reference
        self._splits = head_is_separate(model)
        self.packs = packing != "padded" and self._splits and packs_exactly(model)
        if packing == "shared_prefix" and not self.packs:
            raise ValueError(
                f"train.packing is shared_prefix, and packed completions of {type(core_of(model)).__name__} do not get "
                "the hidden states they have alone (sliding windows, soft caps, gradient checkpointing, layers with a "
                "state). Use train.packing: auto, which takes the padded layout for such a model."
            )

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def score(self, rollouts: TextRollouts, *, with_entropy: bool = True, entropy_grad: bool = False) -> Scores:
        """Log-probabilities (with gradient) and entropies of the sampled tokens under the present weights."""
        return self._score(self.model, rollouts, with_entropy, entropy_grad)

    @torch.no_grad()
    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probabilities under the present weights, without a gradient."""
        return self._in_pieces(self.model, rollouts, micro_rows)

    @torch.no_grad()
    def ref_logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probabilities under the frozen reference."""
        if not self.with_reference:
            raise ValueError("This policy was made without a reference (beta is 0).")
        if self.reference is not None:
            return self._in_pieces(self.reference, rollouts, micro_rows)
        with self.model.disable_adapter():
            return self._in_pieces(self.model, rollouts, micro_rows)

    def _in_pieces(self, model: Any, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        with eval_mode(model):
            out_BT = torch.zeros_like(rollouts.logp_BT)
            pieces = self.cuts(rollouts, micro_rows)
            while pieces:
                index = pieces.pop(0)
                try:
                    logp_BT = self._score(model, rollouts.rows(index), False, False).logp_BT
                except torch.OutOfMemoryError as error:
                    pieces[:0] = halves(index, error)
                    continue
                out_BT[index] = logp_BT.to(out_BT.dtype)
        return out_BT

    def cuts(self, rollouts: TextRollouts, micro_rows: int) -> list[Tensor]:
        """Rows of each forward pass: at most as many tokens as `micro_rows` of the longest rows have.

        Padded, that is `micro_rows` rows, longest first; packed, whole groups by their real number of tokens.
        """
        if not self._packs_now():
            return list(micro_batches(rollouts.length_B, micro_rows))
        lengths = rollouts.length_B.tolist()
        longest = max(len(p) + n for p, n in zip(rollouts.prompt_ids_B, lengths, strict=True))
        device = rollouts.mask_BT.device
        most = TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS_OTHERWISE)
        passes = bins(rollouts.prompt_ids_B, lengths, min(micro_rows * longest, most))
        return [torch.tensor(rows, device=device) for rows in passes]

    def _packs_now(self) -> bool:
        # Gradient checkpointing may be switched on after the policy is made.
        return self.packs and not recomputes(self.model)

    def _score(self, model: Any, rollouts: TextRollouts, with_entropy: bool, entropy_grad: bool) -> Scores:
        assert rollouts.tokens_BT is not None
        row_M, step_M = rollouts.mask_BT.nonzero(as_tuple=True)
        token_M = rollouts.tokens_BT[row_M, step_M]
        with self.autocast():
            if self._splits:
                hidden_M = packed_hidden(model, rollouts) if self._packs_now() else self._padded(model, rollouts)
                head = core_of(model).get_output_embeddings()
                logp_M, entropy_M = token_scores(
                    hidden_M, head, token_M, self.params, with_entropy=with_entropy, entropy_grad=entropy_grad
                )
            else:
                warped = self.params.warp(self._padded(model, rollouts), keep=token_M)
                logp_M = token_logp(warped, token_M)
                with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
                    entropy_M = entropy(warped) if with_entropy else torch.zeros_like(logp_M)
        zeros_BT = torch.zeros(rollouts.mask_BT.shape, dtype=logp_M.dtype, device=logp_M.device)
        entropy_BT = zeros_BT.index_put((row_M, step_M), entropy_M) if with_entropy else zeros_BT
        return Scores(zeros_BT.index_put((row_M, step_M), logp_M), entropy_BT)

    def _layout(self, rollouts: TextRollouts) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of prompt then completion, right-padded: ids, attention mask, and where each completion begins."""
        assert rollouts.tokens_BT is not None
        device = rollouts.tokens_BT.device
        start_B = torch.tensor([len(p) for p in rollouts.prompt_ids_B], device=device)
        end_B = start_B + rollouts.length_B
        width = int(end_B.max())
        ids = torch.full((len(start_B), width), self.pad_id, dtype=torch.int64, device=device)
        column = torch.arange(width, device=device)
        flat_prompts = torch.tensor([i for p in rollouts.prompt_ids_B for i in p], device=device, dtype=torch.int64)
        ids[column < start_B.unsqueeze(1)] = flat_prompts
        inside = (column >= start_B.unsqueeze(1)) & (column < end_B.unsqueeze(1))
        ids[inside] = rollouts.tokens_BT[rollouts.mask_BT]
        return ids, (column < end_B.unsqueeze(1)).long(), start_B

    def _padded(self, model: Any, rollouts: TextRollouts) -> Tensor:
        """What predicts each completion token, a row a completion: hidden states, or logits where the head is not
        separate."""
        ids, attention, start_B = self._layout(rollouts)
        row_M, step_M = rollouts.mask_BT.nonzero(as_tuple=True)
        place_M = start_B[row_M] - 1 + step_M
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "use_cache": False}
        if not self._splits:
            logits: Tensor = model(**inputs).logits[row_M, place_M]
            return logits
        hidden: Tensor = core_of(model).base_model(**inputs).last_hidden_state
        return hidden[row_M, place_M]


def micro_batches(length_B: Tensor, micro_rows: int) -> Iterator[Tensor]:
    """Row indices in pieces of `micro_rows`, longest completions first: the largest piece shows at once if it fits."""
    order = torch.argsort(length_B, descending=True, stable=True)
    yield from order.split(micro_rows)


def halves(index: Tensor, error: torch.OutOfMemoryError) -> list[Tensor]:
    """A micro-batch that ran out of memory, in two; the error again where it is a single row."""
    if len(index) == 1:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(index.chunk(2))


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


class Updater:
    """Turns a weighted batch into optimiser steps.

    Args:
        policy: what is trained. algorithm: whose `loss` is summed.
        optimizer, scheduler: stepped once per minibatch; the scheduler once per batch of rollouts.
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
        self.micro_rows, self.max_grad_norm = micro_rows, max_grad_norm
        self.num_iterations, self.num_minibatches = num_iterations, num_minibatches

    def update(self, batch: Batch, order: Tensor, *, measure_noise: bool = False) -> list[UpdateStats]:
        """All optimiser steps on one batch of rollouts.

        Args:
            batch: this rank's rows, weighted.
            order: int64 (num_iterations, B): the order of the rows in each pass (it only matters with minibatches).
            measure_noise: tell signal from noise in the first step's gradient, from its two halves. Needs whole groups
                in a step (one minibatch), at least two of them, one rank and no loss scaler; else nothing is measured.
        """
        reuses = self.num_iterations * self.num_minibatches > 1
        if reuses:
            rollouts = batch.rollouts
            assert isinstance(rollouts, TextRollouts)
            batch.old_logp_BT = self.policy.logp(rollouts, self.micro_rows)
        alone = self.accelerator.num_processes == 1 and self.accelerator.scaler is None
        measure_noise = measure_noise and alone and self.num_minibatches == 1
        steps = [
            self._step(batch.rows(index), measure_noise and iteration == 0)
            for iteration in range(self.num_iterations)
            for index in order[iteration].chunk(self.num_minibatches)
        ]
        self.scheduler.step()
        return steps

    def _step(self, batch: Batch, measure_noise: bool) -> UpdateStats:
        self.policy.model.train()
        values, splits, noise = self._gradient(batch, measure_noise)
        self._sum_gradients()
        grad_norm = self._clip()
        if not self._finite_everywhere(values):
            grad_norm = float("nan")
        stepped = math.isfinite(grad_norm)
        # A loss scaler finds the overflow itself, and lowers its scale only where it is asked to step.
        if stepped or self.accelerator.scaler is not None:
            self.optimizer.step()
        return UpdateStats(values, grad_norm, stepped, splits, noise if stepped else None)

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
            values: dict[str, float] = {}
            first: list[Tensor] | None = None
            piece = alive
            try:
                for number, part in enumerate(parts):
                    first = self._gradients() if number else None
                    for piece in self._pieces(batch, part, most):
                        for key, value in self._backward(batch.rows(piece)).items():
                            values[key] = values.get(key, 0.0) + value
                return values, splits, self._noise(batch, first) if first is not None else None
            except torch.OutOfMemoryError as error:
                most = len(halves(piece, error)[0])
                splits += 1

    def _pieces(self, batch: Batch, rows: Tensor, most: int) -> list[Tensor]:
        """The rows of each forward pass, at most `most` together."""
        if not len(rows):
            return []
        cuts = self.policy.cuts(batch.rollouts.rows(rows), self.micro_rows)
        return [rows[index] for cut in cuts for index in cut.split(most)]

    def _halves(self, batch: Batch, alive: Tensor) -> list[Tensor]:
        """The rows `alive` of every other group, and those of the rest; one piece where there is one group."""
        groups, place_B = torch.unique(batch.rollouts.group_B, return_inverse=True)
        if len(groups) == 1:
            return [alive]
        odd = place_B[alive] % 2 == 1
        return [alive[~odd], alive[odd]]

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.trainable()]

    def _noise(self, batch: Batch, first: list[Tensor]) -> GradientNoise:
        num_groups = len(torch.unique(batch.rollouts.group_B))
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.policy.trainable()]
        one, other, both = (float(x) for x in half_square_norms(first, whole))
        return gradient_noise([one, other], both, [num_groups - num_groups // 2, num_groups // 2])

    def _finite_everywhere(self, values: dict[str, float]) -> bool:
        """Whether the loss is a number on every rank; a NaN in it can have a gradient that is finite."""
        losses = [value for key, value in values.items() if key.endswith("_loss")]
        total = torch.tensor(sum(losses), dtype=torch.float32, device=self.accelerator.device)
        total = self.accelerator.reduce(total, reduction="sum")
        return math.isfinite(float(total))

    def _backward(self, part: Batch) -> dict[str, float]:
        rollouts = part.rollouts
        assert isinstance(rollouts, TextRollouts)
        scores = self.policy.score(rollouts, entropy_grad=bool(part.entropy_coef))
        loss, stats = self.algorithm.loss(scores.logp_BT, part, entropy_BT=scores.entropy_BT)
        # Each minibatch is an optimiser step of its own, of the size the whole batch would have had.
        self.accelerator.backward(loss * self.num_minibatches)
        return {key: float(value) for key, value in stats.items()}

    def _sum_gradients(self) -> None:
        """Add the ranks' gradients: with global denominators the sum is the gradient of the whole batch."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.policy.trainable():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")

    def _clip(self) -> float:
        parameters = [p for p in self.policy.trainable() if p.grad is not None]
        if not parameters:
            return 0.0
        limit = self.max_grad_norm or float("inf")
        return float(self.accelerator.clip_grad_norm_(parameters, limit))
