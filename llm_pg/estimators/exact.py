"""A policy so small that every completion can be listed: J(θ), ∇J(θ), KL(π‖ref) and ∇KL(π‖ref) without sampling.

The policy is a table of logits, one row of V for each prompt and each prefix; the last token is EOS. `expectation`
compares an estimator's expected update with what is here. Everything is float64.

Axes beside the package's: S completions a prompt has, N prefixes (states), D parameters (P·N·V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .distributions import entropy, token_logp, warp_logits

MAX_COMPLETIONS = 5_000


@dataclass(frozen=True)
class EnumeratedCompletions:
    """Every completion of at most `horizon` tokens out of `vocab_size`, where the last token is EOS.

    Attributes:
        vocab_size: V, tokens with the end token, >= 2.
        horizon: T, tokens of a completion at most, >= 1.
        tokens_ST: int64, EOS after the end.
        mask_ST: True at each token really produced, the EOS included.
        prefix_ST: int64, number of the prefix that each token continues; 0 is the empty one (and outside the mask).
        child_NV: int64, the prefix after token v; -1 where the completion ends.
        truncated_S: True where the horizon came before an EOS.
    """

    vocab_size: int
    horizon: int
    tokens_ST: Tensor
    mask_ST: Tensor
    prefix_ST: Tensor
    child_NV: Tensor
    truncated_S: Tensor

    @property
    def eos(self) -> int:
        return self.vocab_size - 1

    @property
    def num_completions(self) -> int:
        return self.tokens_ST.shape[0]

    @property
    def num_prefixes(self) -> int:
        return self.child_NV.shape[0]


def num_completions(vocab_size: int, horizon: int) -> int:
    """Σ_{t<T} (V-1)^t that end in EOS, and (V-1)^T that are cut.

    Args:
        vocab_size: V, tokens with the end token, >= 2.
        horizon: T, tokens of a completion at most, >= 1.
    """
    words = vocab_size - 1
    return sum(words**t for t in range(horizon)) + words**horizon


@lru_cache(maxsize=32)
def enumerate_completions(vocab_size: int, horizon: int) -> EnumeratedCompletions:
    """Lists them, by length and then in the order of the tokens.

    Args:
        vocab_size: V, tokens with the end token, >= 2.
        horizon: T, tokens of a completion at most, >= 1.

    Raises:
        ValueError: for V < 2, T < 1, or more than MAX_COMPLETIONS completions.
    """
    if vocab_size < 2 or horizon < 1:
        raise ValueError(
            f"An enumerable policy needs a token beside EOS and one step: vocab_size >= 2 and horizon >= 1; got "
            f"{vocab_size} and {horizon}."
        )
    total = num_completions(vocab_size, horizon)
    if total > MAX_COMPLETIONS:
        raise ValueError(
            f"vocab_size {vocab_size} and horizon {horizon} make {total:,} completions of each prompt; at most "
            f"{MAX_COMPLETIONS:,} are enumerated (their table of scores alone would take "
            f"{total * horizon * total * 8 / 2**30:,.1f} GiB). Use a smaller vocabulary or horizon: 5 tokens and 4 "
            f"steps make 341."
        )
    words, eos = vocab_size - 1, vocab_size - 1
    prefixes: list[tuple[int, ...]] = [()]
    for prefix in prefixes:
        if len(prefix) + 1 < horizon:
            prefixes.extend((*prefix, token) for token in range(words))
    number = {prefix: n for n, prefix in enumerate(prefixes)}
    full = [(*prefix, token) for prefix in prefixes if len(prefix) == horizon - 1 for token in range(words)]
    rows = [(*prefix, eos) for prefix in prefixes] + full
    tokens = [list(row) + [eos] * (horizon - len(row)) for row in rows]
    state = [[number[row[:t]] if t < len(row) else 0 for t in range(horizon)] for row in rows]
    child = [[number.get((*prefix, v), -1) if v != eos else -1 for v in range(vocab_size)] for prefix in prefixes]
    return EnumeratedCompletions(
        vocab_size=vocab_size,
        horizon=horizon,
        tokens_ST=torch.tensor(tokens),
        mask_ST=torch.tensor([[t < len(row) for t in range(horizon)] for row in rows]),
        prefix_ST=torch.tensor(state),
        child_NV=torch.tensor(child),
        truncated_S=torch.tensor([row[-1] != eos for row in rows]),
    )


@dataclass(frozen=True)
class TabularPolicy:
    """π(v | prompt p, prefix n) = softmax(warp_logits(logits_PNV[p, n]))[v].

    Args:
        logits_PNV: the parameters θ, float64, (P, N, V), N prefixes of fewer than `horizon` tokens.
        horizon: the most tokens of a completion.
        warp: arguments of `warp_logits` (temperature, top_k, top_p, min_p).
    """

    logits_PNV: Tensor
    horizon: int
    warp: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.logits_PNV.shape)
        if len(shape) != 3 or self.logits_PNV.dtype != torch.float64:
            raise ValueError(
                f"TabularPolicy.logits_PNV must be float64 of shape (prompts, prefixes, vocabulary); got "
                f"{self.logits_PNV.dtype} of shape {shape}."
            )
        expected = self.completions.num_prefixes
        if shape[1] != expected:
            raise ValueError(
                f"TabularPolicy.logits_PNV has {shape[1]} prefixes; with {shape[2]} tokens and horizon {self.horizon} "
                f"there are {expected}."
            )

    @classmethod
    def random(
        cls, vocab_size: int, horizon: int, num_prompts: int = 1, spread: float = 1.0, seed: int = 0
    ) -> TabularPolicy:
        """Logits drawn from N(0, spread²).

        Args:
            vocab_size: V, tokens with the end token, >= 2.
            horizon: T, tokens of a completion at most, >= 1.
            num_prompts: P, >= 1.
            spread: standard deviation of the logits, >= 0.
            seed: of the draw.
        """
        num_prefixes = enumerate_completions(vocab_size, horizon).num_prefixes
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, num_prefixes, vocab_size)
        return cls(spread * torch.randn(shape, dtype=torch.float64, generator=generator), horizon)

    @property
    def completions(self) -> EnumeratedCompletions:
        return enumerate_completions(self.logits_PNV.shape[2], self.horizon)

    @property
    def num_prompts(self) -> int:
        return self.logits_PNV.shape[0]

    def with_logits(self, logits_PNV: Tensor) -> TabularPolicy:
        return dataclasses.replace(self, logits_PNV=logits_PNV)

    def warped(self, logits: Tensor, keep: Tensor | None = None) -> Tensor:
        """`warp_logits` with this policy's settings, over the last axis.

        Args:
            logits: real numbers, shape (..., V).
            keep: ids that stay in the support, shape (...,); None = none.
        """
        return warp_logits(logits, keep=keep, **self.warp)  # type: ignore[arg-type]

    def logp_PST(self) -> Tensor:
        """log π of each token of each completion, differentiable in the logits; 0 outside the mask."""
        c = self.completions
        logits_PSTV = self.warped(self.logits_PNV)[:, c.prefix_ST]
        logp_PST = token_logp(logits_PSTV, c.tokens_ST.expand(self.num_prompts, -1, -1))
        return torch.where(c.mask_ST, logp_PST, torch.zeros_like(logp_PST))

    def prob_PS(self) -> Tensor:
        """π(completion | prompt); each row adds up to 1."""
        return self.logp_PST().sum(2).exp()

    def entropy_PST(self) -> Tensor:
        """Entropy of the distribution each token was drawn from, nats; 0 outside the mask."""
        c = self.completions
        entropy_PST = entropy(self.warped(self.logits_PNV))[:, c.prefix_ST]
        return torch.where(c.mask_ST, entropy_PST, torch.zeros_like(entropy_PST))


@dataclass(frozen=True)
class Exact:
    """A quantity and its gradient with respect to the logits, by differentiating the sum over all completions.

    Attributes:
        value: the quantity.
        gradient_PNV: its gradient, float64.
    """

    value: float
    gradient_PNV: Tensor


def _differentiated(policy: TabularPolicy, value_PS: Callable[[TabularPolicy], Tensor]) -> Exact:
    leaf = policy.with_logits(policy.logits_PNV.detach().clone().requires_grad_())
    value = (leaf.prob_PS() * value_PS(leaf)).sum(1).mean()
    (gradient_PNV,) = torch.autograd.grad(value, leaf.logits_PNV)
    return Exact(value.item(), gradient_PNV)


def objective(policy: TabularPolicy, reward_PNV: Tensor, gamma: float = 1.0) -> Exact:
    """J(θ) = E[Σ_t γ^t r_t], the mean over prompts, and ∇J(θ).

    Args:
        policy: what is sampled.
        reward_PNV: reward of producing token v after prefix n; see `terminal_reward` for a verdict on the whole.
        gamma: discount in (0, 1].
    """
    c = policy.completions
    return_PS = (step_values(c, reward_PNV) * gamma ** torch.arange(c.horizon, dtype=torch.float64)).sum(2)
    return _differentiated(policy, lambda _: return_PS)


def kl(policy: TabularPolicy, reference: TabularPolicy) -> Exact:
    """KL(π‖ref) of whole completions, nats, the mean over prompts, and its gradient in θ of π.

    Args:
        policy: π.
        reference: ref, of the same vocabulary, horizon and prompts.
    """
    ref_PS = reference.logp_PST().sum(2).detach()

    def log_ratio_PS(leaf: TabularPolicy) -> Tensor:
        log_PS = leaf.logp_PST().sum(2)
        return torch.where(log_PS > -torch.inf, log_PS - ref_PS, torch.zeros_like(log_PS))

    return _differentiated(policy, log_ratio_PS)


def completion_entropy(policy: TabularPolicy) -> Exact:
    """Entropy of whole completions, nats, the mean over prompts, and its gradient.

    By the chain rule it is the expected sum of the token entropies; its gradient also credits a token with the
    entropies that it leads to.

    Args:
        policy: what is sampled.
    """

    def minus_log_PS(leaf: TabularPolicy) -> Tensor:
        log_PS = leaf.logp_PST().sum(2)
        return torch.where(log_PS > -torch.inf, -log_PS, torch.zeros_like(log_PS))

    return _differentiated(policy, minus_log_PS)


def terminal_reward(completions: EnumeratedCompletions, reward_PS: Tensor) -> Tensor:
    """A verdict on each whole completion as a reward_PNV that is at its last token.

    Args:
        completions: of the policy.
        reward_PS: reward of each completion of each prompt, float64.
    """
    num_prompts = reward_PS.shape[0]
    out_PNV = reward_PS.new_zeros(num_prompts, completions.num_prefixes, completions.vocab_size)
    last_S = completions.mask_ST.sum(1) - 1
    row_S = torch.arange(completions.num_completions)
    out_PNV[:, completions.prefix_ST[row_S, last_S], completions.tokens_ST[row_S, last_S]] = reward_PS
    return out_PNV


def step_values(completions: EnumeratedCompletions, table_PNV: Tensor) -> Tensor:
    """A table over (prefix, token) read along each completion, (P, S, T); 0 outside the mask.

    Args:
        completions: of the policy.
        table_PNV: a number for each prompt, prefix and token.
    """
    read_PST = table_PNV[:, completions.prefix_ST, completions.tokens_ST]
    return torch.where(completions.mask_ST, read_PST, torch.zeros_like(read_PST))


def state_values(policy: TabularPolicy, reward_PNV: Tensor, gamma: float = 1.0) -> Tensor:
    """V(n) = E[Σ_{k>=t} γ^(k-t) r_k | prefix n], (P, N), by recursion from the longest prefixes back.

    It is what an exact critic would say; `logp_PST` plays no part in it.

    Args:
        policy: what is sampled.
        reward_PNV: reward of producing token v after prefix n.
        gamma: discount in (0, 1].
    """
    c = policy.completions
    prob_PNV = policy.warped(policy.logits_PNV).softmax(-1)
    value_PN = reward_PNV.new_zeros(reward_PNV.shape[:2])
    for n in range(c.num_prefixes - 1, -1, -1):
        child_V = c.child_NV[n]
        follow_PV = torch.where(child_V >= 0, value_PN[:, child_V.clamp(min=0)], torch.zeros(()).to(value_PN))
        value_PN[:, n] = (prob_PNV[:, n] * (reward_PNV[:, n] + gamma * follow_PV)).sum(1)
    return value_PN
