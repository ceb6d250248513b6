"""The policy in training: log-probabilities of what was sampled, the frozen reference, and the critic's values."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..distributed.strategy import Strategy
from ..distributed.tensors import like
from ..estimators.distributions import entropy, token_logp
from ..rollouts import TextRollouts, distinct
from ..words import one_of
from .adapters import StartingAdapter, has_adapter, starts_switched_off, switched_off
from .attention import core_of, eval_mode, mixes_types, recomputes
from .critic import Critic
from .distribution import SamplingParams
from .exact import exact_groups, exact_way, follows_its_past
from .grouped import Grouped, is_worth_it
from .head import head_is_separate, token_scores
from .loading import default_device, load_model, load_tokenizer
from .packing import bins, packed_hidden
from .padding import padded_states
from .routers import make_router_loss
from .wide import wide_logits

# Tokens of one packed forward pass at most, by the kind of device: beyond them a pass grows in memory, not in speed.
# On a CPU that was measured. Elsewhere it is a bound that none should need: there memory ends a pass first, which the
# trial of the longest batch finds out (`Policy.most_tokens`).
TOKENS_PER_PASS = {"cpu": 1024}
TOKENS_PER_PASS_OTHERWISE = 32_768


@dataclass
class PolicyOutput:
    """Of the sampled tokens under some weights: logp_BT and entropy_BT (nats, float32; 0 outside the mask).

    With a critic, value_BT: V(s_t), 0 outside the mask; after_B: the value after the last token of truncated rows,
    where it was asked for, and 0 for the others. With experts, balance: the pass's part of the batch's load-balancing
    loss, without its coefficient.
    """

    logp_BT: Tensor
    entropy_BT: Tensor
    value_BT: Tensor | None = None
    after_B: Tensor | None = None
    balance: Tensor | None = None


@dataclass(frozen=True)
class OutputFlags:
    """What a pass computes beside hidden states: log-probabilities, entropies (with a gradient), the critic's values,
    those after the last tokens of truncated rows, the part of the load-balancing loss; frozen: no gradient reaches the
    policy."""

    logp: bool = True
    entropy: bool = False
    entropy_grad: bool = False
    value: bool = False
    after: bool = False
    balance: bool = False
    frozen: bool = False


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

    Attributes:
        routers: that loss; None = the model has none, or it cannot be trained (a warning says why).
        way: how packed completions attend; None = they are not packed.
        grouped: passes of completions that go on from their prompt's cache; None = there are none.
        layout: packed, grouped or padded. why_padded: what speaks against the others.
        most_tokens: tokens of one pass that are known to fit into memory; None = nothing is known.

    Raises:
        ValueError: packing is shared_prefix and the model's attention is not covered; the model is not causal.
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
    ) -> None:
        one_of("packing", packing, ("auto", "padded", "shared_prefix"))
        self.critic = critic
        self.strategy = Strategy(next(model.parameters()).device)
        self.most_tokens: int | None = None
        self.model, self.params, self.tokenizer, self.autocast = model, params, tokenizer, autocast
        self.pad_id = int(tokenizer.pad_token_id) if pad_id is None else pad_id
        self.sampling_dtype: torch.dtype | None = None  # of matrix products while sampling; None = that of the weights
        self.has_adapter = has_adapter(model)
        self.reference = None
        self.start: StartingAdapter | None = None
        self.has_reference = False
        if with_reference:
            self.freeze_reference()
        self.routers = make_router_loss(model, router_aux_loss_coef, autocast)
        with autocast() if mixes_types(model) else contextlib.nullcontext():
            self._splits = head_is_separate(model)
            self.way = exact_way(model, autocast) if packing != "padded" and self._splits else None
            self._find_groups(packing)
        if packing == "shared_prefix" and self.layout != "packed":
            raise ValueError(
                f"train.packing is shared_prefix, and packed completions of {type(core_of(model)).__name__} do not get "
                "the hidden states they have alone (sliding windows, soft caps, gradient checkpointing, layers with a "
                "state). Use train.packing: auto, which takes the padded layout for such a model."
            )

    def _find_groups(self, packing: str) -> None:
        """Where completions are not packed: the next best layout, and a look whether padding is exact at least."""
        self.grouped: Grouped | None = None
        self.why_padded = "" if packing == "auto" else f"train.packing is {packing}"
        if self.way is not None:
            return
        core = type(core_of(self.model)).__name__
        if not follows_its_past(self.model, self.pad_id):
            raise ValueError(
                f"{core} gives a token a log-probability that depends on tokens behind it, on padding or on another "
                "row of the batch, so it is no policy over completions. Take a causal language model (an encoder's "
                "config needs is_decoder=True)."
            )
        if packing != "auto":
            return
        if not self._splits:
            self.why_padded = "its logits are more than the product of its output layer"
        else:
            found = exact_groups(self.model, self.autocast)
            if isinstance(found, Grouped):
                self.grouped = found
                if self.routers is not None:
                    self.routers.grouped = found
            else:
                self.why_padded = found

    @property
    def layout(self) -> str:
        """Of training passes: packed, grouped or padded."""
        if not self._shares_prompts():
            return "padded"
        return "packed" if self.way is not None else "grouped"

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
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
            balance: also the rows' part of the load-balancing loss of the batch that `count_choices` saw last.
            frozen: only values carry a gradient, and none that reaches the policy.
        """
        ask = OutputFlags(
            entropy=with_entropy,
            entropy_grad=entropy_grad and not frozen,
            value=self.critic is not None,
            balance=balance and self.routers is not None and not frozen,
            frozen=frozen,
        )

        def forward() -> dict[str, Tensor]:
            return {name: x for name, x in vars(self._forward(self.model, rollouts, ask)).items() if x is not None}

        return PolicyOutput(**self.strategy.forward(self.model, forward))

    @torch.no_grad()
    def count_choices(
        self, rollouts: TextRollouts | None, micro_rows: int, all_sum: Callable[[Tensor], Tensor]
    ) -> None:
        """Counts which experts the tokens of a batch choose, for the load-balancing loss of its passes.

        Args:
            rollouts: of this rank; None = it has none.
            micro_rows: completions in one forward pass; the result does not depend on it.
            all_sum: sums a tensor over the ranks, which must all call this.
        """
        if self.routers is None:
            return
        with self.routers.counting(self.model):
            if rollouts is None:
                with self.gathered(self.model):
                    pass
            else:
                self._in_pieces(self.model, rollouts, micro_rows, OutputFlags(logp=False))
        self.routers.sum_over(all_sum)

    @torch.no_grad()
    def observe(self, rollouts: TextRollouts, micro_rows: int, *, with_logp: bool, after: bool) -> PolicyOutput:
        """Computes the critic's values at the time of sampling, in one pass with the log-probabilities.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
            with_logp: compute the log-probabilities too.
            after: also the value of the state in which each truncated row was cut.
        """
        return self._in_pieces(self.model, rollouts, micro_rows, OutputFlags(logp=with_logp, value=True, after=after))

    @torch.no_grad()
    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probabilities under the present weights, without a gradient.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        return self._in_pieces(self.model, rollouts, micro_rows, OutputFlags()).logp_BT

    @torch.no_grad()
    def entropies(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Entropy of the distribution that each token was drawn from, nats, without a gradient.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        return self._in_pieces(self.model, rollouts, micro_rows, OutputFlags(logp=False, entropy=True)).entropy_BT

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
            return self._in_pieces(self.reference, rollouts, micro_rows, OutputFlags()).logp_BT
        with switched_off(self.model) if self.start is None else self.start.in_place():
            return self._in_pieces(self.model, rollouts, micro_rows, OutputFlags()).logp_BT

    def _in_pieces(self, model: Any, rollouts: TextRollouts, micro_rows: int, ask: OutputFlags) -> PolicyOutput:
        zeros_BT = torch.zeros_like(rollouts.logp_BT)
        out = PolicyOutput(zeros_BT, torch.zeros_like(zeros_BT))
        if ask.value:
            out.value_BT = torch.zeros_like(zeros_BT)
            out.after_B = torch.zeros_like(zeros_BT[:, 0]) if ask.after else None
        critic_mode = contextlib.nullcontext() if self.critic is None else eval_mode(self.critic)
        critic_whole = self.gathered(self.critic) if ask.value else contextlib.nullcontext()
        with self.gathered(model), critic_whole, eval_mode(model), critic_mode:
            pieces = self.cuts(rollouts, micro_rows)
            while pieces:
                index = pieces.pop(0)
                try:
                    piece = self._forward(model, rollouts.rows(index), ask)
                except torch.OutOfMemoryError as error:
                    pieces[:0] = halves(index, error)
                    continue
                for whole, part in (
                    (out.logp_BT, piece.logp_BT),
                    (out.entropy_BT, piece.entropy_BT),
                    (out.value_BT, piece.value_BT),
                    (out.after_B, piece.after_B),
                ):
                    if whole is not None and part is not None:
                        whole[index] = part.to(whole.dtype)
        return out

    def cuts(self, rollouts: TextRollouts, micro_rows: int) -> list[Tensor]:
        """Rows of each forward pass: at most as many tokens as `micro_rows` of the longest rows have.

        Padded, that is `micro_rows` rows, longest first; packed, whole groups by their real number of tokens.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass.
        """
        lengths, device = rollouts.context_length_B.tolist(), rollouts.mask_BT.device
        longest = max(len(p) + n for p, n in zip(rollouts.prompt_ids_B, lengths, strict=True))
        if not self._shares_prompts():
            fitting = micro_rows if self.most_tokens is None else max(self.most_tokens // longest, 1)
            return list(micro_batches(rollouts.context_length_B, min(micro_rows, fitting)))
        most = self.most_tokens or TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS_OTHERWISE)
        passes = bins(rollouts.prompt_ids_B, lengths, min(micro_rows * longest, most))
        return [torch.tensor(rows, device=device) for rows in passes]

    def num_tokens(self, rollouts: TextRollouts) -> int:
        """Tokens that one pass over these rows computes: padding too, or, packed, each prompt once.

        Args:
            rollouts: scored or unscored rows of text.
        """
        prompts, lengths = rollouts.prompt_ids_B, rollouts.context_length_B.tolist()
        if self._shares_prompts():
            return sum(len(prompt) for prompt in distinct(prompts)[0]) + sum(lengths)
        return len(lengths) * max(len(p) + n for p, n in zip(prompts, lengths, strict=True))

    def _shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all its completions. Gradient checkpointing may be switched on after
        the policy is made; in groups ranks would make different numbers of passes, which shards cannot have."""
        found = self.way is not None or (self.grouped is not None and not self.strategy.shards_weights)
        return found and not recomputes(self.model)

    def _forward(self, model: Any, rollouts: TextRollouts, ask: OutputFlags) -> PolicyOutput:
        assert rollouts.tokens_BT is not None
        row_M, step_M = rollouts.mask_BT.nonzero(as_tuple=True)
        token_M = rollouts.tokens_BT[row_M, step_M]
        after_B = rollouts.truncated_B if ask.after else None
        heard: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        if ask.balance and self.routers is not None:
            heard = self.routers.weighed(model)
        with self.autocast(), wide_logits(model):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not ask.frozen):
                with heard as parts:
                    states, logits_M = self._states(model, rollouts, after_B)
                logp_M, entropy_M = self._tokens(model, states[: len(token_M)], logits_M, token_M, ask)
            value = self._values(rollouts, states, after_B) if ask.value else None
        scores = PolicyOutput(_placed(logp_M, rollouts.mask_BT), _placed(entropy_M, rollouts.mask_BT))
        if parts:
            scores.balance = torch.stack(parts).sum()
        if value is not None:
            scores.value_BT = _placed(value[: len(token_M)], rollouts.mask_BT)
            if after_B is not None:
                scores.after_B = _placed(value[len(token_M) :], after_B)
        return scores

    def _tokens(
        self, model: Any, hidden_M: Tensor, logits_M: Tensor | None, token_M: Tensor, ask: OutputFlags
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each token."""
        if not (ask.logp or ask.entropy):
            none_M = torch.zeros(len(token_M), device=token_M.device)
            return none_M, none_M
        if logits_M is None:
            head = core_of(model).get_output_embeddings()
            return token_scores(
                hidden_M, head, token_M, self.params, with_entropy=ask.entropy, entropy_grad=ask.entropy_grad
            )
        warped = self.params.warp(logits_M, keep=token_M)
        logp_M = token_logp(warped, token_M)
        with torch.set_grad_enabled(torch.is_grad_enabled() and ask.entropy_grad):
            return logp_M, entropy(warped) if ask.entropy else torch.zeros_like(logp_M)

    def _values(self, rollouts: TextRollouts, states: Tensor, after_B: Tensor | None) -> Tensor:
        critic = self.critic
        assert critic is not None

        def forward() -> Tensor:
            own = states
            if critic.body is not None:
                own, _ = self._states(critic.body, rollouts, after_B, with_logits=False)
            return critic.values(own)

        return self.strategy.forward(critic, forward)

    def _states(
        self, model: Any, rollouts: TextRollouts, after_B: Tensor | None, with_logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states that predict each completion token, then those after the last tokens of the rows `after_B`;
        and the logits of the former where the head is not separate."""
        if self._shares_prompts():
            if self.way is not None:
                return packed_hidden(model, rollouts, after_B, self.way), None
            if self.grouped is not None and is_worth_it(rollouts):
                return self.grouped.hidden(model, rollouts, after_B), None
        return padded_states(model, rollouts, after_B, self.pad_id, with_logits=with_logits and not self._splits)


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """`values` at the true places of `mask`, in its order; 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.index_put(mask.nonzero(as_tuple=True), values)


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
