"""The policy in training: log-probabilities of what was sampled, the frozen reference, and the critic's values."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..device import to_device
from ..distributed.strategy import Strategy
from ..distributed.tensors import like
from ..estimators.distributions import entropy, token_logp
from ..rollouts import TextRollouts
from .adapters import StartingAdapter, has_adapter, starts_switched_off, switched_off
from .attention import eval_mode
from .critic import Critic
from .distribution import Contexts, SamplingParams
from .head import token_scores
from .layout import BatchLayout, halves
from .loading import default_device, load_model, load_tokenizer
from .output import OutputFlags, PolicyOutput
from .routers import make_router_loss
from .wide import wide_logits


class Policy:
    """A causal LM as π_θ.

    Args:
        model: the model in training, a transformers model or a PEFT model.
        params: the distribution that is sampled; its temperature and support enter the trained log-probability.
        pad_id: filler of unused positions, never attended; None = the tokenizer's.
        tokenizer: saved with the model, where it is given.
        with_reference: keep a frozen reference (needed where beta > 0); see `freeze_reference`.
        autocast: context in which forwards run (mixed precision).
        packing: shared_prefix (no padding, each prompt once for all its completions), padded (a row a completion), or
            auto: shared_prefix where a trial shows that it computes the same; else grouped (each prompt once, its
            completions from the model's cache) where a trial shows that; else padded.
        critic: whose values `forward` and `observe` give; None = the algorithm has none.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts; None = the model's own,
            0 = none.
        exact_on_policy: log-probabilities are those of `sampling.exact.ExactSampler`, bit for bit.

    Attributes:
        routers: that loss; None = the model has none, or it cannot be trained (a warning says why).
        layout: of the passes; its `name` is packed, grouped or padded.

    Raises:
        ValueError: packing is shared_prefix and the model's attention is not covered; the model is not causal; the
            model cannot be computed as exact_on_policy asks.
    """

    def __init__(
        self,
        model: Any,
        *,
        params: SamplingParams,
        pad_id: int | None = None,
        tokenizer: Any = None,
        with_reference: bool = False,
        autocast: Any = contextlib.nullcontext,
        packing: str = "auto",
        critic: Critic | None = None,
        router_aux_loss_coef: float | None = None,
        exact_on_policy: bool = False,
    ) -> None:
        pad_id = int(tokenizer.pad_token_id) if pad_id is None else pad_id
        self.layout = BatchLayout(model, pad_id, packing, autocast, exact_on_policy=exact_on_policy)
        self.routers = make_router_loss(model, router_aux_loss_coef, autocast, self.layout.grouped)
        self.critic = critic
        self.strategy = Strategy(next(model.parameters()).device)
        self.model, self.params, self.tokenizer, self.autocast = model, params, tokenizer, autocast
        self.sampling_dtype: torch.dtype | None = None  # of matrix products while sampling; None = that of the weights
        self.has_adapter = has_adapter(model)
        self.reference = None
        self.start: StartingAdapter | None = None
        self.has_reference = False
        if with_reference:
            self.freeze_reference()

    def use(self, strategy: Strategy) -> None:
        """Reads weights and makes passes by a strategy from now on.

        Args:
            strategy: how weights and passes are spread over processes.
        """
        self.strategy = strategy
        self.layout.same_passes = strategy.shards_weights

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        max_completion_length: int = 256,
        stop: Sequence[str] = (),
        peft_config: Any = None,
        bf16: bool = False,
        device: str | torch.device | None = None,
        packing: str = "auto",
    ) -> Policy:
        """Loads a policy and its tokenizer, weights in float32, dropout off.

        Args:
            model: hub id, or a folder written by `save_pretrained`.
            temperature: of the distribution that is sampled and trained, > 0.
            top_k: keep the k most probable tokens; 0 = all.
            top_p: keep the smallest set of tokens of this mass, in (0, 1].
            min_p: keep tokens of at least this share of the largest probability, in [0, 1).
            repetition_penalty: positive logits of tokens that were there before are divided by it, others multiplied;
                > 0, 1 = none.
            max_completion_length: tokens, >= 1.
            stop: texts that end a completion.
            peft_config: of a new adapter, which is then what is trained.
            bf16: compute in bfloat16 by autocast; weights stay float32.
            device: None = the accelerator where there is one.
            packing: see `Policy`.

        Raises:
            ConfigError: no such model.
        """
        config = ModelConfig.model_validate({"model_name_or_path": str(model)})
        tokenizer = load_tokenizer(config)
        loaded = load_model(config, tokenizer, seed=0, peft_config=peft_config).to(device or default_device())
        kind = next(loaded.parameters()).device.type
        autocast = functools.partial(torch.autocast, kind, torch.bfloat16) if bf16 else contextlib.nullcontext
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_completion_length=max_completion_length,
            stop=tuple(stop),
        )
        policy = cls(loaded, params=params, tokenizer=tokenizer, autocast=autocast, packing=packing)
        policy.sampling_dtype = torch.bfloat16 if bf16 else None
        return policy

    def freeze_reference(self) -> None:
        """Make the reference: the policy as it is now. Of a PEFT model that is the adapter switched off where this is
        the same, else a copy of what is trained; of another model a copy of it."""
        self.has_reference = True
        if not self.has_adapter:
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        elif not starts_switched_off(self.model, self.autocast):
            self.start = StartingAdapter(self.model)

    def add_critic(self, kind: str = "head", *, trunk_gradient: bool = False, path: str | None = None) -> Critic:
        """Make the critic from the policy as it is now; before an optimiser is made of `parameters`.

        Args:
            kind: head (a small network on the policy's hidden states) or model (one of its own).
            trunk_gradient: whether its loss reaches the policy's body. See `Critic`.
            path: folder in which a run left a critic to begin with; None = a new one, whose values are 0.

        Raises:
            ValueError: the folder holds no such critic, or the model shows no hidden states.
        """
        self.critic = Critic(self.model, kind=kind, trunk_gradient=trunk_gradient)
        if path is not None:
            self.critic.load(path)
        return self.critic

    def save_pretrained(
        self, folder: str | Path, *, weights: dict[str, Tensor] | None = None, writes: bool = True
    ) -> None:
        """Writes model (of a PEFT model the adapter), tokenizer and critic, as `from_pretrained` reads them.

        Args:
            folder: made where it does not exist.
            weights: those of the model, whole; None = as it holds them itself.
            writes: False on ranks that only bring their parts.
        """
        # All exchanges between ranks come before the first write: a write can fail, and on one rank alone.
        values = None if self.critic is None else self.critic.collected(writes)
        if not writes:
            return
        self.model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.critic is not None:
            self.critic.save(folder, values)

    def gathered(self, model: Any = None) -> contextlib.AbstractContextManager[None]:
        """A context in which every rank has whole weights; on several ranks all must enter it.

        Args:
            model: of the policy, its reference or its critic; None = the model in training.
        """
        return self.strategy.gathered(model or self.model)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the model that are trained; the critic's are `critic.trainable()`."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(
        self,
        rollouts: TextRollouts,
        *,
        with_entropy: bool = True,
        entropy_grad: bool = False,
        balance: bool = False,
        frozen: bool = False,
    ) -> PolicyOutput:
        """Computes log-probabilities and entropies of the sampled tokens under the present weights, with a gradient,
        and the critic's values where there is a critic.

        Args:
            rollouts: scored or unscored rows of text.
            with_entropy: compute the entropies.
            entropy_grad: with a gradient of their own.
            balance: also the rows' part of the load-balancing loss of the batch that `routers` counted last.
            frozen: only values carry a gradient, and none that reaches the policy.
        """
        flags = OutputFlags(
            entropy=with_entropy,
            entropy_grad=entropy_grad and not frozen,
            value=self.critic is not None,
            balance=balance and self.routers is not None and not frozen,
            frozen=frozen,
        )

        def forward() -> dict[str, Tensor]:
            return {name: x for name, x in vars(self._forward(self.model, rollouts, flags)).items() if x is not None}

        return PolicyOutput(**self.strategy.forward(self.model, forward))

    def observe(self, rollouts: TextRollouts, micro_rows: int, *, with_logp: bool, after: bool) -> PolicyOutput:
        """Computes the critic's values at the time of sampling, in one pass with the log-probabilities.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
            with_logp: compute the log-probabilities too.
            after: also the value of the state in which each truncated row was cut.
        """
        return self.compute(rollouts, micro_rows, OutputFlags(logp=with_logp, value=True, after=after))

    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probabilities under the present weights, without a gradient.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        return self.compute(rollouts, micro_rows, OutputFlags()).logp_BT

    def entropies(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Entropy of the distribution that each token was drawn from, nats, without a gradient.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        return self.compute(rollouts, micro_rows, OutputFlags(logp=False, entropy=True)).entropy_BT

    @torch.no_grad()
    def refresh_reference(self, share: float) -> None:
        """Moves the reference: reference ← share·policy + (1 - share)·reference.

        Args:
            share: in (0, 1].

        Source: TR-DPO, arXiv 2404.09656.
        """
        if self.reference is None:
            raise ValueError("This policy has no reference of its own weights to refresh (beta is 0, or an adapter).")
        for own, present in zip(self.reference.parameters(), self.model.parameters(), strict=True):
            own.lerp_(like(present, own).to(own.dtype), share)

    @torch.no_grad()
    def ref_logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Computes log-probabilities under the frozen reference, nats, shape (B, T).

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        if not self.has_reference:
            raise ValueError("This policy has no reference (beta is 0): call freeze_reference() before training.")
        if self.reference is not None:
            return self.compute(rollouts, micro_rows, OutputFlags(), self.reference).logp_BT
        with switched_off(self.model) if self.start is None else self.start.in_place():
            return self.compute(rollouts, micro_rows, OutputFlags()).logp_BT

    @torch.no_grad()
    def compute(self, rollouts: TextRollouts, micro_rows: int, flags: OutputFlags, model: Any = None) -> PolicyOutput:
        """Computes what the flags ask for, without a gradient and with dropout off.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it, and passes that do not fit
                into memory are cut.
            flags: what to compute; the rest is 0 or None.
            model: one of the policy's architecture; None = the model in training.
        """
        model = model or self.model
        zeros_BT = torch.zeros_like(rollouts.logp_BT)
        out = PolicyOutput(zeros_BT, torch.zeros_like(zeros_BT))
        if flags.value:
            out.value_BT = torch.zeros_like(zeros_BT)
            out.after_B = torch.zeros_like(zeros_BT[:, 0]) if flags.after else None
        critic_mode = contextlib.nullcontext() if self.critic is None else eval_mode(self.critic)
        critic_whole = self.gathered(self.critic) if flags.value else contextlib.nullcontext()
        with self.gathered(model), critic_whole, eval_mode(model), critic_mode, self.layout.copies.held():
            pieces = self.layout.cuts(rollouts, micro_rows)
            while pieces:
                index = pieces.pop(0)
                there = to_device(index, zeros_BT.device)
                try:
                    piece = self._forward(model, rollouts.rows(index), flags)
                except torch.OutOfMemoryError as error:
                    pieces[:0] = halves(index, error)
                    continue
                out.put(piece, there)
        return out

    def _forward(self, model: Any, rollouts: TextRollouts, flags: OutputFlags) -> PolicyOutput:
        assert rollouts.tokens_BT is not None
        mask_BT, device = rollouts.on_host("mask_BT"), rollouts.mask_BT.device
        place_M = to_device(mask_BT.flatten().nonzero().squeeze(1), device)
        token_M = rollouts.tokens_BT.flatten()[place_M]
        after_B = rollouts.on_host("truncated_B") if flags.after else None
        heard: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        if flags.balance and self.routers is not None:
            heard = self.routers.weighed(model)
        with self.autocast(), wide_logits(model):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not flags.frozen):
                with heard as parts:
                    states, logits_M = self.layout.hidden_states(model, rollouts, after_B)
                contexts = Contexts.of_sampled(rollouts) if self.params.reads_context else None
                logp_M, entropy_M = self._tokens(model, states[: len(token_M)], logits_M, token_M, flags, contexts)
            value = self._values(rollouts, states, after_B) if flags.value else None
        scores = PolicyOutput(*(_placed(x_M, place_M, mask_BT.shape) for x_M in (logp_M, entropy_M)))
        if parts:
            scores.balance = torch.stack(parts).sum()
        if value is not None:
            scores.value_BT = _placed(value[: len(token_M)], place_M, mask_BT.shape)
            if after_B is not None:
                end_N = to_device(after_B.nonzero().squeeze(1), device)
                scores.after_B = _placed(value[len(token_M) :], end_N, after_B.shape)
        return scores

    def _tokens(
        self,
        model: Any,
        hidden_M: Tensor,
        logits_M: Tensor | None,
        token_M: Tensor,
        flags: OutputFlags,
        contexts: Contexts | None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each token."""
        if not (flags.logp or flags.entropy):
            none_M = torch.zeros(len(token_M), device=token_M.device)
            return none_M, none_M
        if logits_M is None:
            head = self.layout.head_of(model)
            grad = {"with_entropy": flags.entropy, "entropy_grad": flags.entropy_grad}
            return token_scores(hidden_M, head, token_M, self.params, contexts=contexts, **grad)
        seen = None if contexts is None else contexts.seen(logits_M.shape[-1])
        warped = self.params.warp(logits_M, keep=token_M, seen=seen)
        logp_M = token_logp(warped, token_M)
        with torch.set_grad_enabled(torch.is_grad_enabled() and flags.entropy_grad):
            return logp_M, entropy(warped) if flags.entropy else torch.zeros_like(logp_M)

    def _values(self, rollouts: TextRollouts, states: Tensor, after_B: Tensor | None) -> Tensor:
        critic = self.critic
        assert critic is not None

        def forward() -> Tensor:
            own = states
            if critic.body is not None:
                own, _ = self.layout.hidden_states(critic.body, rollouts, after_B, with_logits=False)
            return critic.values(own)

        return self.strategy.forward(critic, forward)


def _placed(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """`values` at `places`, which count along a flat tensor of that shape; 0 elsewhere."""
    return values.new_zeros(shape.numel()).index_put((places,), values).view(shape)
