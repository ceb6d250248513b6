"""The exact expected update of an estimator, over every group of completions that could be sampled.

`expected_update` takes any function from a group to a loss, lists all groups of G completions of an enumerable policy,
differentiates each loss and adds the gradients up with the groups' probabilities. `compare` sets the result against
the gradient it should be. Where there are too many groups, `num_samples` of them give an unbiased estimate instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GROUPS = 500_000
CHUNK_NUMBERS = 400_000  # float64 numbers in a chunk's gradients: 3 MB, which stays in the cache


@dataclass(frozen=True)
class Groups:
    """M batches that a step could see: B completions each.

    Attributes:
        index_MB: int64, the completion (0..S-1) of each rollout.
        prompt_MB: int64, the prompt of each rollout.
        weight_M: probability of the batch (all that are listed add up to 1), or 1/num_samples.
    """

    index_MB: Tensor
    prompt_MB: Tensor
    weight_M: Tensor


LossOfGroups = Callable[[Tensor, Groups], Tensor]
"""From parameters (M, P, N, V), one set for each batch, and M batches to M losses, differentiable in the parameters."""


@dataclass(frozen=True)
class ExpectedUpdate:
    """Moments of the update -∂loss/∂θ.

    Attributes:
        mean_D: its expectation.
        trace: trace of its covariance.
        num_groups: batches that were listed or sampled.
        standard_error: of `mean_D`, as the root of the expected squared distance; 0 where all batches were listed.
    """

    mean_D: Tensor
    trace: float
    num_groups: int
    standard_error: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """An expected update beside the gradient.

    Attributes:
        bias: |E[g] - ∇J| / |∇J|.
        bias_absolute: the same, not divided.
        cosine: between the two; 0 where the expected update is 0.
        scale: length of E[g] along ∇J in units of |∇J|.
        off_direction: |E[g] - scale ∇J| / |E[g]|, 0 where only the length differs.
        noise: trace of the covariance / scale², the variance of the update brought to the gradient's length.
        standard_error: of `bias`; 0 where all batches were listed.
    """

    bias: float
    bias_absolute: float
    cosine: float
    scale: float
    off_direction: float
    noise: float
    standard_error: float


def _support(prob_S: Tensor) -> Tensor:
    return (prob_S > 0).nonzero().squeeze(1)


def count_groups(prob_PS: Tensor, num_generations: int, *, all_prompts: bool = False, ordered: bool = False) -> int:
    """How many batches there are: multisets of G completions a prompt (or ordered lists), and their product.

    Args:
        prob_PS: probability of each completion of each prompt.
        num_generations: G, completions of one prompt.
        all_prompts: a step has a group of every prompt, not of one.
        ordered: count each order of a group separately.
    """
    sizes = [int((prob_S > 0).sum()) for prob_S in prob_PS]
    each = [n**num_generations if ordered else math.comb(n + num_generations - 1, num_generations) for n in sizes]
    return math.prod(each) if all_prompts else sum(each)


def _one_prompt(prob_S: Tensor, num_generations: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """All groups of one prompt, (M, G), and their probabilities."""
    support = _support(prob_S)
    if ordered:
        pick_MG = torch.cartesian_prod(*[torch.arange(len(support))] * num_generations).reshape(-1, num_generations)
        orders_M = torch.ones(len(pick_MG), dtype=prob_S.dtype)
    else:
        pick_MG = torch.tensor(list(itertools.combinations_with_replacement(range(len(support)), num_generations)))
        count_MS = torch.zeros(len(pick_MG), len(support), dtype=prob_S.dtype)
        count_MS.scatter_add_(1, pick_MG, torch.ones_like(pick_MG, dtype=prob_S.dtype))
        orders_M = (math.lgamma(num_generations + 1) - (count_MS + 1).lgamma().sum(1)).exp().round()
    index_MG = support[pick_MG]
    return index_MG, orders_M * prob_S[index_MG].prod(1)


def enumerate_groups(
    prob_PS: Tensor, num_generations: int, *, all_prompts: bool = False, ordered: bool = False
) -> Iterator[Groups]:
    """Every batch a step could sample, with its probability.

    Args:
        prob_PS: probability of each completion of each prompt.
        num_generations: G, completions of one prompt.
        all_prompts: False: a step samples one prompt, each with probability 1/P; True: a group of every prompt.
        ordered: list each order of a group separately, for estimators that read the order of the rows.

    Raises:
        ValueError: for more than MAX_GROUPS batches.
    """
    total = count_groups(prob_PS, num_generations, all_prompts=all_prompts, ordered=ordered)
    if total > MAX_GROUPS:
        raise ValueError(
            f"{prob_PS.shape[0]} prompts of {int((prob_PS[0] > 0).sum())} completions in groups of {num_generations} "
            f"make {total:,} {'ordered ' if ordered else ''}batches; at most {MAX_GROUPS:,} are enumerated (about "
            f"{total * 2e-6:,.0f} s for a built-in algorithm, {total * 1.5e-3:,.0f} s for a function that must run "
            f"batch by batch). Use fewer generations, a smaller vocabulary or horizon, or num_samples=... for an "
            f"unbiased estimate with its standard error."
        )
    num_prompts = prob_PS.shape[0]
    each = [_one_prompt(prob_S, num_generations, ordered) for prob_S in prob_PS]
    if not all_prompts:
        for p, (index_MG, prob_M) in enumerate(each):
            yield Groups(index_MG, torch.full_like(index_MG, p), prob_M / num_prompts)
        return
    at_PM = torch.cartesian_prod(*[torch.arange(len(prob_M)) for _, prob_M in each]).reshape(-1, num_prompts)
    index_MB = torch.cat([each[p][0][at_PM[:, p]] for p in range(num_prompts)], 1)
    weight_M = torch.stack([each[p][1][at_PM[:, p]] for p in range(num_prompts)]).prod(0)
    prompt_B = torch.arange(num_prompts).repeat_interleave(num_generations)
    yield Groups(index_MB, prompt_B.expand_as(index_MB), weight_M)


def sample_groups(
    prob_PS: Tensor, num_generations: int, num_samples: int, *, all_prompts: bool = False, seed: int = 0
) -> Iterator[Groups]:
    """`num_samples` batches drawn as a step would draw them, each of weight 1/num_samples.

    Args:
        prob_PS: probability of each completion of each prompt.
        num_generations: G, completions of one prompt.
        num_samples: batches to draw, >= 1.
        all_prompts: a step has a group of every prompt, not of one.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    num_prompts = prob_PS.shape[0]
    if all_prompts:
        prompt_B = torch.arange(num_prompts).repeat_interleave(num_generations)
        prompt_MB = prompt_B.expand(num_samples, -1)
    else:
        prompt_M1 = torch.randint(num_prompts, (num_samples, 1), generator=generator)
        prompt_MB = prompt_M1.expand(-1, num_generations)
    index = torch.multinomial(prob_PS[prompt_MB.reshape(-1)], 1, replacement=True, generator=generator)
    weight_M = torch.full((num_samples,), 1 / num_samples, dtype=prob_PS.dtype)
    yield Groups(index.reshape(prompt_MB.shape), prompt_MB, weight_M)


def _chunks(groups: Iterator[Groups], size: int) -> Iterator[Groups]:
    for g in groups:
        for i in range(0, len(g.weight_M), size):
            yield Groups(g.index_MB[i : i + size], g.prompt_MB[i : i + size], g.weight_M[i : i + size])


def updates(loss_of: LossOfGroups, theta_MPNV: Tensor, groups: Groups) -> Tensor:
    """-∂loss/∂θ of each batch, (M, D).

    Args:
        loss_of: the estimator, see `LossOfGroups`.
        theta_MPNV: parameters, one set for each batch.
        groups: M batches.
    """
    leaf = theta_MPNV.detach().clone().requires_grad_()
    loss_M = loss_of(leaf, groups)
    (gradient,) = torch.autograd.grad(loss_M.sum(), leaf)
    return -gradient.reshape(len(groups.weight_M), -1)


def expected_update(
    loss_of: LossOfGroups,
    theta_PNV: Tensor,
    prob_PS: Tensor,
    num_generations: int,
    *,
    all_prompts: bool = False,
    ordered: bool = False,
    num_samples: int | None = None,
    seed: int = 0,
    theta_of: Callable[[Groups], Tensor] | None = None,
) -> ExpectedUpdate:
    """Mean and variance of the update over all batches, or over `num_samples` drawn ones.

    Args:
        loss_of: the estimator, see `LossOfGroups`.
        theta_PNV: where to differentiate.
        prob_PS: probabilities of what the sampler draws (they need not be those of θ).
        num_generations: G, completions of one prompt.
        all_prompts: a step has a group of every prompt, not of one; see `enumerate_groups`.
        ordered: list each order of a group separately.
        num_samples: batches to draw instead of listing all; None = list.
        seed: of the draws.
        theta_of: parameters (M, P, N, V) that depend on the batch (a second pass over data that the first has used).
    """
    if num_samples is None:
        source = enumerate_groups(prob_PS, num_generations, all_prompts=all_prompts, ordered=ordered)
    else:
        source = sample_groups(prob_PS, num_generations, num_samples, all_prompts=all_prompts, seed=seed)
    mean_D = theta_PNV.new_zeros(theta_PNV.numel())
    square, count = 0.0, 0
    for chunk in _chunks(source, max(1, CHUNK_NUMBERS // theta_PNV.numel())):
        num = len(chunk.weight_M)
        theta_MPNV = theta_PNV.expand(num, *theta_PNV.shape) if theta_of is None else theta_of(chunk)
        update_MD = updates(loss_of, theta_MPNV, chunk)
        mean_D += chunk.weight_M @ update_MD
        square += float(chunk.weight_M @ update_MD.square().sum(1))
        count += num
    trace = max(square - float(mean_D.square().sum()), 0.0)
    return ExpectedUpdate(mean_D, trace, count, math.sqrt(trace / count) if num_samples is not None else 0.0)


def compare(update: ExpectedUpdate, gradient: Tensor) -> Comparison:
    """Set an expected update against the gradient (any shape of D numbers), which must not be 0.

    Args:
        update: of `expected_update`.
        gradient: what it should be: D numbers of any shape, not all 0.
    """
    mean_D, target_D = update.mean_D, gradient.reshape(-1)
    length, norm = float(mean_D.norm()), float(target_D.norm())
    if norm < 1e-12:
        raise ValueError(f"The gradient has length {norm:.1e}: there is nothing to compare an update with.")
    scale = float(mean_D @ target_D) / norm**2
    nothing = length < 1e-12 * norm
    distance = float((mean_D - target_D).norm())
    return Comparison(
        bias=distance / norm,
        bias_absolute=distance,
        cosine=0.0 if nothing else float(mean_D @ target_D) / (length * norm),
        scale=0.0 if nothing else scale,
        off_direction=0.0 if nothing else float((mean_D - scale * target_D).norm()) / length,
        noise=math.inf if nothing or scale == 0 else update.trace / scale**2,
        standard_error=update.standard_error / norm,
    )
