"""Which layout of a batch gives a model's own hidden states: not read off its name but tried, on two prompts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import (
    FAULTS,
    UnsupportedAttention,
    attends,
    body_of,
    core_of,
    eval_mode,
    forward,
    mixes_types,
    tolerance,
    window_of,
)
from .flex import FlexBlocks
from .grouped import Grouped
from .lean_layers import LeanLayers, NotLlamaStyle
from .linears import Copies
from .packing import Packed
from .precision import HALF
from .segments import MaskedCalls, PackedAttention

PROMPTS, COMPLETIONS = (5, 9), (4, 7, 2)  # tokens in the trial; the second prompt has two completions
LONGEST_WINDOW = 8192  # the trial has to go beyond a window to see it

Prompts = Sequence[tuple[int, ...]]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def exact_way(
    model: Any, autocast: Autocast = contextlib.nullcontext, kind: str | None = None
) -> type[PackedAttention] | None:
    """How to pack completions for this model: the first way for its device that the trial finds exact; None = none.

    autocast: the context of the forward passes in training. kind: of device, if not that of the weights.
    """
    if (kind or core_of(model).get_input_embeddings().weight.device.type) != "cuda":
        return MaskedCalls if packs_exactly(model) else None
    objection = _objection(model, FlexBlocks, autocast)
    if objection is None:
        return FlexBlocks
    if not packs_exactly(model):
        return None
    warnings.warn(
        f"flex_attention is not used for packed completions ({objection}); many smaller calls of attention take its "
        "place: the same gradient, at less speed.",
        stacklevel=2,
    )
    return MaskedCalls


def packs_exactly(
    model: Any, way: type[PackedAttention] = MaskedCalls, autocast: Autocast = contextlib.nullcontext
) -> bool:
    """Whether packed completions that attend in this way get the model's own hidden states, and, where the way is
    compiled for the machine, their gradient too."""
    return _objection(model, way, autocast) is None


def objection_to_lean(model: Any, autocast: Autocast = contextlib.nullcontext) -> str | None:
    """Why packed completions may not go through layers written out; None = they get the model's own hidden states and
    their gradient. On a CPU alone, where that was measured."""
    device = core_of(model).get_input_embeddings().weight.device

    def together(prompt_ids_B: Prompts, completions_B: list[list[int]]) -> Tensor:
        packed = Packed(prompt_ids_B, completions_B, device)
        return LeanLayers(model, Copies())(packed.ids, packed.positions, packed)[0][packed.place_M]

    if device.type != "cpu":
        return "it is not on a CPU"
    try:
        return None if _agrees(model, together, autocast, COMPLETIONS, slopes=True) else "a trial gave other numbers"
    except torch.OutOfMemoryError:
        raise
    except NotLlamaStyle as error:
        return str(error)
    except FAULTS as error:
        return _first_line(error)


def exact_groups(model: Any, autocast: Autocast = contextlib.nullcontext) -> Grouped | str:
    """Passes in which completions go on from their prompt's cache, where these give the model's own hidden states and
    their gradient; else the reason why not."""
    if body_of(model) is core_of(model):
        return "it has no body apart from its output layer"
    try:
        with eval_mode(model), autocast():
            grouped = Grouped(model)

        def together(prompt_ids_B: Prompts, completions_B: list[list[int]]) -> Tensor:
            sampled_B = [range(len(completion)) for completion in completions_B]
            return grouped.states(model, prompt_ids_B, completions_B, sampled_B, [False] * len(prompt_ids_B))

        agrees = _agrees(model, together, autocast, COMPLETIONS, slopes=True)
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return _first_line(error)
    return grouped if agrees else "a trial gave other numbers"


def follows_its_past(model: Any, pad_id: int) -> bool:
    """Whether a token's logits depend on what is before it in its row alone: not on what follows, on padding behind
    it, or on another row. Tried in float32 or wider: in half precision rounding alone may choose other experts."""
    if mixes_types(model) or core_of(model).get_input_embeddings().weight.dtype in HALF:
        return True
    core, device = core_of(model), core_of(model).get_input_embeddings().weight.device
    vocabulary, (short, long) = core.get_input_embeddings().weight.shape[0], PROMPTS
    whole = torch.arange(7, 7 + 3 * (short + long), 3, device=device) % vocabulary
    ids = torch.stack([torch.cat([whole[:short], whole.new_full((long - short,), pad_id)]), whole[short:]])
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    with eval_mode(model), torch.no_grad():
        logits, first, second = (
            model(input_ids=x, use_cache=False, **rest).logits.float()
            for x, rest in ((ids, {"attention_mask": mask}), (ids[:1, :short], {}), (ids[1:, :short], {}))
        )
    together = torch.cat([logits[:1, :short], logits[1:, :short]])
    return bool((together - torch.cat([first, second])).abs().max() <= tolerance(logits.dtype) * logits.abs().max())


def _objection(model: Any, way: type[PackedAttention], autocast: Autocast) -> str | None:
    """Why packed completions may not attend in this way; None = they may."""
    window = window_of(model)
    if not attends(model) or (window is not None and "sliding_window" not in way.special):
        return "the model has layers of another kind"
    if window is not None and window > LONGEST_WINDOW:
        return f"its windows of {window} tokens are longer than a trial can be"

    def together(prompt_ids_B: Prompts, completions_B: list[list[int]]) -> Tensor:
        packed = Packed(prompt_ids_B, completions_B, core_of(model).get_input_embeddings().weight.device, way=way)
        return forward(model, packed.ids, packed.positions, packed)[0][packed.place_M]

    try:
        if not _agrees(model, together, autocast, COMPLETIONS, slopes=way.compiled):
            return "a trial gave other numbers"
        if window is not None and not _agrees(model, together, autocast, (4, window + 2, 2), slopes=False):
            return "a trial beyond its windows gave other numbers"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises; it is reported
        if not way.compiled and not isinstance(error, FAULTS):
            raise
        return str(error) if isinstance(error, UnsupportedAttention | TypeError) else _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _agrees(
    model: Any,
    together: Callable[[Prompts, list[list[int]]], Tensor],
    autocast: Autocast,
    lengths: Sequence[int],
    *,
    slopes: bool,
) -> bool:
    """Whether completions of these lengths get together what they get alone; slopes: and so does its gradient."""
    core = core_of(model)
    weight = core.get_input_embeddings().weight
    number = iter(range(7, 7 + 3 * (sum(PROMPTS) + sum(lengths)), 3))
    first, second = (tuple(next(number) % weight.shape[0] for _ in range(n)) for n in PROMPTS)
    prompt_ids_B = [first, second, second]
    completions = [[next(number) % weight.shape[0] for _ in range(n)] for n in lengths]
    rows = [
        torch.tensor([[*prompt, *completion[:-1]]], device=weight.device)
        for prompt, completion in zip(prompt_ids_B, completions, strict=True)
    ]

    def alone() -> Tensor:
        states = (body_of(core)(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows)
        return torch.cat([s[len(p) - 1 :] for s, p in zip(states, prompt_ids_B, strict=True)])

    with eval_mode(model), autocast(), torch.set_grad_enabled(slopes):
        ours = _states_and_slopes(core, lambda: together(prompt_ids_B, completions), slopes)
        theirs = _states_and_slopes(core, alone, slopes)
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    _forget_graphs(core)
    return all(
        _is_near(a, b, dtype, of_slopes=place > 0) for place, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )


def _is_near(ours: Tensor, theirs: Tensor, dtype: torch.dtype, *, of_slopes: bool) -> bool:
    """Gradients of a 16-bit type as a whole: rounding adds up on its way back through the layers, so that single
    numbers may be 0.1 off, and all together 0.06."""
    if of_slopes and dtype in HALF:
        return bool((ours - theirs).norm() <= 3 * tolerance(dtype) * theirs.norm())
    return bool((ours - theirs).abs().max() <= tolerance(dtype) * theirs.abs().max())


def _forget_graphs(core: Any) -> None:
    """Of states that modules keep (RecurrentGemma's): a module with a graph in it cannot be copied as a reference."""
    for module in core.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _states_and_slopes(core: Any, run: Callable[[], Tensor], slopes: bool) -> list[Tensor]:
    """What `run` computes; with slopes, also the gradient of a weighted sum of it by the embedding of each token."""
    if not slopes:
        return [run()]
    tokens: list[Tensor] = []
    embedded: list[Tensor] = []

    def keep(_module: Any, inputs: Any, out: Tensor) -> None:
        tokens.append(inputs[0].flatten())
        embedded.append(out.requires_grad_())  # the weights may be frozen

    hook = core.get_input_embeddings().register_forward_hook(keep)
    try:
        states = run()
    finally:
        hook.remove()
    probe = torch.linspace(-1.0, 1.0, states.numel(), device=states.device).view_as(states)
    slope_N = torch.cat([g.flatten(0, 1) for g in torch.autograd.grad((states.float() * probe).sum(), embedded)])
    place = torch.cat(tokens)
    by_token = torch.zeros((int(core.get_input_embeddings().weight.shape[0]), slope_N.shape[1]), device=slope_N.device)
    return [states.detach(), by_token.to(slope_N.dtype).index_add(0, place, slope_N)]
