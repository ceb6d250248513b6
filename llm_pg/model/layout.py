"""How rollouts are laid out in the forward passes of a model, and how a batch is cut into passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..rollouts import TextRollouts, distinct
from ..words import one_of
from .attention import Layout, core_of, forward, mixes_types, recomputes
from .exact import Autocast, exact_groups, exact_way, follows_its_past, objection_to_lean
from .grouped import Grouped, is_worth_it
from .head import head_is_separate
from .lean_layers import LeanLayers, NotLlamaStyle
from .linears import Copies
from .own_head import OwnHead, has_own_head
from .packing import bins, packed_hidden
from .padding import padded_states
from .segments import ExactCalls
from .wide import has_onednn, is_plain

# Tokens of one packed forward pass at most, by the kind of device: beyond them a pass grows in memory, not in speed.
# On a CPU that was measured. Elsewhere it is a bound that none should need: there memory ends a pass first, which the
# trial of the longest batch finds out (`BatchLayout.most_tokens`).
TOKENS_PER_PASS = {"cpu": 1024}
TOKENS_PER_PASS_OTHERWISE = 32_768


class BatchLayout:
    """The layout of a model's training passes, chosen by trials of the model.

    Args:
        model: the model in training, a transformers model or a PEFT model.
        pad_id: filler of unused positions, never attended.
        packing: auto, padded or shared_prefix; see `Policy`.
        autocast: context in which forwards run (mixed precision).
        exact_on_policy: compute log-probabilities as `sampling.exact.ExactSampler` does, bit for bit.

    Attributes:
        way: how packed completions attend; None = they are not packed.
        grouped: passes of completions that go on from their prompt's cache; None = there are none.
        why_padded: the reason against the other layouts; "" = there is none.
        most_tokens: tokens of one pass that are known to fit into memory; None = nothing is known.
        exact_on_policy: as it was asked for.
        head_is_plain: whether logits are just the output layer's product.
        head_is_separate: whether they follow from the last hidden states alone.
        is_lean: whether packed rows go through layers written out, see `lean_layers`.
        copies: of weights, as those layers multiply them.
        same_passes: whether all ranks must make the same number of passes, which grouped ones cannot promise.

    Raises:
        ValueError: packing is shared_prefix and the model's attention is not covered; the model is not causal;
            exact_on_policy, and a part of the model that another pass would round in another way.
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        packing: str = "auto",
        autocast: Autocast = contextlib.nullcontext,
        *,
        exact_on_policy: bool = False,
    ) -> None:
        one_of("packing", packing, ("auto", "padded", "shared_prefix"))
        self.model, self.pad_id = model, pad_id
        self.grouped: Grouped | None = None
        self.why_padded = "" if packing == "auto" else f"train.packing is {packing}"
        self.most_tokens: int | None = None
        self.same_passes = False
        self.copies, self.exact_on_policy = Copies(), exact_on_policy
        with autocast() if mixes_types(model) else contextlib.nullcontext():
            self.head_is_plain = head_is_separate(model)
            self.head_is_separate = self.head_is_plain or has_own_head(model)
            tries_packing = packing != "padded" and self.head_is_separate
            self.way = exact_way(model, autocast) if tries_packing else None
            if self.way is None:
                self._check_causal()
                if packing == "auto":
                    self._try_groups(autocast)
        objection = "" if self.way is None else objection_to_lean(model, autocast)
        self.is_lean = objection is None
        if exact_on_policy:
            self._compute_exactly(objection)
        if packing == "shared_prefix" and self.name != "packed":
            raise ValueError(
                f"train.packing is shared_prefix, and packed completions of {type(core_of(model)).__name__} do not get "
                "the hidden states they have alone (sliding windows, soft caps, gradient checkpointing, layers with a "
                "state). Use train.packing: auto, which takes the padded layout for such a model."
            )

    def _compute_exactly(self, objection: str | None) -> None:
        """The attention that no layout changes. objection: to the layers written out."""
        head = core_of(self.model).get_output_embeddings()
        parts = {
            "its completions are not packed" + f" ({self.why_padded})" * bool(self.why_padded): self.way is None,
            f"its layers are not written out: {objection}": objection is not None,
            "its output layer is more than a matrix": not (self.head_is_plain and is_plain(head))
            or head.bias is not None,
            "this torch has no oneDNN, whose products give a row the same numbers in any batch": not has_onednn(),
        }
        for part, holds in parts.items():
            if holds:
                raise ValueError(
                    f"exact_on_policy is true, and {type(core_of(self.model)).__name__} would be computed differently "
                    f"by sampler and trainer: {part}. Leave exact_on_policy out: sampler_gap tells the difference."
                )
        self.way = ExactCalls

    def _check_causal(self) -> None:
        if not follows_its_past(self.model, self.pad_id):
            raise ValueError(
                f"{type(core_of(self.model)).__name__} gives a token a log-probability that depends on tokens behind "
                "it, on padding or on another row of the batch, so it is no policy over completions. Take a causal "
                "language model (an encoder's config needs is_decoder=True)."
            )

    def _try_groups(self, autocast: Autocast) -> None:
        if not self.head_is_separate:
            self.why_padded = "its logits do not follow from its last hidden states alone"
            return
        found = exact_groups(self.model, autocast)
        if isinstance(found, Grouped):
            self.grouped = found
        else:
            self.why_padded = found

    @property
    def name(self) -> str:
        """packed, grouped or padded."""
        if not self.shares_prompts():
            return "padded"
        return "packed" if self.way is not None else "grouped"

    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all its completions. Gradient checkpointing, which rules that out, may
        be switched on after the layout is made."""
        found = self.way is not None or (self.grouped is not None and not self.same_passes)
        return found and not recomputes(self.model)

    def cuts(self, rollouts: TextRollouts, micro_rows: int) -> list[Tensor]:
        """Rows of each forward pass, on the host: at most as many tokens as `micro_rows` of the longest rows have.

        Padded, that is `micro_rows` rows, longest first; packed, whole groups by their real number of tokens.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass.
        """
        lengths, kind = rollouts.context_length_B.tolist(), rollouts.mask_BT.device.type
        longest = max(len(p) + n for p, n in zip(rollouts.prompt_ids_B, lengths, strict=True))
        if not self.shares_prompts():
            fitting = micro_rows if self.most_tokens is None else max(self.most_tokens // longest, 1)
            return list(micro_batches(rollouts.context_length_B, min(micro_rows, fitting)))
        most = self.most_tokens or TOKENS_PER_PASS.get(kind, TOKENS_PER_PASS_OTHERWISE)
        passes = bins(rollouts.prompt_ids_B, lengths, min(micro_rows * longest, most))
        return [torch.tensor(rows) for rows in passes]

    def num_tokens(self, rollouts: TextRollouts) -> int:
        """Tokens that one pass over these rows computes: padding too, or, packed, each prompt once.

        Args:
            rollouts: scored or unscored rows of text.
        """
        prompts, lengths = rollouts.prompt_ids_B, rollouts.context_length_B.tolist()
        if self.shares_prompts():
            return sum(len(prompt) for prompt in distinct(prompts)[0]) + sum(lengths)
        return len(lengths) * max(len(p) + n for p, n in zip(prompts, lengths, strict=True))

    def limit_passes(self, rollouts: TextRollouts) -> None:
        """No pass has more tokens than one over these rows from now on.

        Args:
            rollouts: rows that fit into memory.
        """
        self.most_tokens = self.num_tokens(rollouts)

    def head_of(self, model: Any) -> Any:
        """Returns what makes logits of last hidden states: the output layer, or all that follows the body.

        Args:
            model: that of the layout, or one of the same architecture.
        """
        return core_of(model).get_output_embeddings() if self.head_is_plain else OwnHead(model)

    def hidden_states(
        self, model: Any, rollouts: TextRollouts, after_B: Tensor | None, *, with_logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Returns hidden states that predict each completion token, (M, hidden), then those after the last tokens of
        the rows `after_B`; and the logits of the former where the output layer is not separate, else None.

        Args:
            model: that of the layout, or one of the same architecture.
            rollouts: rows of one pass.
            after_B: bool (B,), on the host; None = no rows.
            with_logits: False = none in any case.
        """
        if self.shares_prompts():
            if self.way is not None:
                return packed_hidden(model, rollouts, after_B, self.way, self._forward), None
            if self.grouped is not None and is_worth_it(rollouts):
                return self.grouped.hidden(model, rollouts, after_B), None
        with_logits = with_logits and not self.head_is_separate
        return padded_states(model, rollouts, after_B, self.pad_id, with_logits=with_logits)

    def _forward(self, model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """See `attention.forward`."""
        if self.is_lean and not self.same_passes:
            with contextlib.suppress(NotLlamaStyle):  # hooks, or dropout, that came after the trial
                return LeanLayers(model, self.copies)(ids, positions, layout)
        return forward(model, ids, positions, layout)


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
