"""The load-balancing loss of a mixture of experts in training, the same however a batch is cut.

Which experts the tokens of the whole batch choose is counted first, in passes without a gradient (one pass that is the
whole step counts for itself); then each pass of the update adds its tokens' part. TRL and transformers take the loss of
each micro-batch by itself, which is another loss for another cut; with the whole step in one micro-batch both are the
same, but for the last token of each completion, of which nothing here is predicted, and rows of weight 0, which are not
computed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..estimators.balance import choices, load_balancing
from .attention import body_of, core_of, eval_mode, tolerance
from .grouped import Grouped

Heard = Callable[[tuple[Tensor, ...], Tensor], None]


class RouterLoss:
    """Adds the loss to the passes of a policy.

    Args:
        coef: its weight beside the policy's loss. top_k: experts of a token. num_experts: of a layer.

    Attributes:
        grouped: passes in parts that the policy makes; None = it makes none.
    """

    def __init__(self, coef: float, top_k: int, num_experts: int) -> None:
        self.coef, self.top_k, self.num_experts = coef, top_k, num_experts
        self.choices_E = torch.zeros(num_experts)
        self.total: Tensor | None = None
        self.grouped: Grouped | None = None

    def forget(self) -> None:
        """The next passes are each a whole batch, and count for themselves."""
        self.total = None

    def counting(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside the block the passes of a batch are counted, from 0."""
        device = next(model.parameters()).device
        self.choices_E, self.total = torch.zeros(self.num_experts, device=device), torch.zeros((), device=device)

        def hear(router_logits: tuple[Tensor, ...], weight_N: Tensor) -> None:
            chosen_E, weight = self._count(router_logits, weight_N)
            self.choices_E += chosen_E
            self.total = weight if self.total is None else self.total + weight

        return _hearing(model, hear, self.grouped)

    def sum_over(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Makes the counts those of all ranks, which must all call it."""
        assert self.total is not None
        self.choices_E, self.total = all_sum(self.choices_E), all_sum(self.total)

    @contextlib.contextmanager
    def weighed(self, model: Any) -> Iterator[list[Tensor]]:
        """Inside the block each pass appends its part of the loss, without `coef`."""
        parts: list[Tensor] = []

        def hear(router_logits: tuple[Tensor, ...], weight_N: Tensor) -> None:
            chosen_E, total = self.choices_E, self.total
            if total is None:
                chosen_E, total = self._count(router_logits, weight_N)
            parts.append(load_balancing(router_logits, weight_N, chosen_E, total))

        with _hearing(model, hear, self.grouped):
            yield parts

    def _count(self, router_logits: tuple[Tensor, ...], weight_N: Tensor) -> tuple[Tensor, Tensor]:
        return choices(router_logits, weight_N, self.top_k), (len(router_logits) * weight_N.sum()).float()


@contextlib.contextmanager
def _hearing(model: Any, hear: Heard, grouped: Grouped | None = None) -> Iterator[None]:
    """Inside the block `hear` is called with the router logits of each pass of the model's body, and with how often
    each of its tokens counts: as often as rows have it before a token that they predict."""
    core = core_of(model)
    config = body_of(core).config.get_text_config()

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        layout = kwargs.get("layout")
        if layout is not None:
            weight_N = layout.times_N
        else:
            mask = kwargs["attention_mask"]  # rows are padded on the right
            if mask is None:
                return  # a part of a grouped pass, which is heard as one
            weight_N = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).flatten()
        hear(tuple(logits.flatten(0, -2) for logits in out.router_logits), weight_N)

    def note_parts(outs: list[Any], times: list[Tensor]) -> None:
        layers = zip(*(out.router_logits for out in outs), strict=True)
        hear(tuple(torch.cat([x.flatten(0, -2) for x in parts]) for parts in layers), torch.cat(times))

    before, config.output_router_logits = config.output_router_logits, True
    if grouped is not None:
        grouped.listener = note_parts
    hook = body_of(core).register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        config.output_router_logits = before
        if grouped is not None:
            grouped.listener = None


def make_router_loss(
    model: Any, coef: float | None = None, autocast: Any = contextlib.nullcontext, grouped: Grouped | None = None
) -> RouterLoss | None:
    """The same as `router_loss`; a reason why it cannot be trained is warned of. grouped: passes in parts that are
    made of the model, if any are."""
    made = router_loss(model, coef, autocast)
    if isinstance(made, str):
        warnings.warn(
            f"The load-balancing loss of the router is not trained: {made}. Freeze the router, or train this model by "
            "TRL.",
            stacklevel=3,
        )
        return None
    if made is not None:
        made.grouped = grouped
    return made


def router_loss(
    model: Any, coef: float | None = None, autocast: Any = contextlib.nullcontext
) -> RouterLoss | str | None:
    """The load-balancing loss of a model, as its config and a trial say.

    Args:
        coef: None = that of the model's config. autocast: context of the passes.

    Returns:
        None where there is none (no experts, or a weight of 0); the reason where the model has one that cannot be
        trained here.

    Raises:
        ConfigError: `coef` is given, and the model returns no router logits.
    """
    core = core_of(model)
    config = core.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coef:
            raise ConfigError(
                f"router_aux_loss_coef is {coef:g}, and {type(core).__name__} is no mixture of experts that returns "
                "the logits of its router. Leave it out."
            )
        return None
    weight = getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef
    if not weight:
        return None
    made = _tried(model, float(weight), autocast)
    return made if isinstance(made, RouterLoss) else f"{type(core).__name__} {made}"


@torch.no_grad()
def _tried(model: Any, weight: float, autocast: Any) -> RouterLoss | str:
    """Made from what the model returns, and compared with the loss that it computes itself."""
    core, device = core_of(model), next(model.parameters()).device
    top_k = getattr(core.config.get_text_config(), "num_experts_per_tok", None) or 0
    vocabulary = core.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(24, device=device).view(2, 12) * 7 + 5) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    with eval_mode(model), autocast(), _hearing(model, lambda *heard: seen.append(heard)):
        try:
            body_of(core)(input_ids=ids, attention_mask=mask, use_cache=False)
            ends = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
            theirs = core(input_ids=ids, attention_mask=ends, use_cache=False, output_router_logits=True).aux_loss
        except (AttributeError, TypeError, ValueError) as error:
            return f"does not return its router's logits ({error})"
    router_logits, weight_N = seen[0]
    made = RouterLoss(weight, int(top_k), router_logits[0].shape[-1])
    if not 0 < made.top_k <= made.num_experts or not isinstance(theirs, Tensor):
        return "computes no such loss itself"
    counted = choices(router_logits, weight_N, made.top_k)
    ours = load_balancing(router_logits, weight_N, counted, len(router_logits) * weight_N.sum())
    if not abs(float(ours - theirs)) <= tolerance(router_logits[0].dtype) * abs(float(theirs)):
        return f"computes another such loss ({float(theirs):.4g}) than the one known here ({float(ours):.4g})"
    return made
