"""Adapters (peft): what is added to a model, what is refused, and weights in 4 bits.

The reference of the KL is the policy as it was before step 1. Where a trial shows that this is the model with its
adapter switched off, it is switched off for the reference. Else (an adapter that was trained before or begins as a part
of the weights, biases or norms trained in place) a copy of what is trained is held, and takes its place for the
reference. In neither case is there a second model in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..config.schema import ModelConfig
from .attention import core_of, eval_mode

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

# Kinds of peft that do more than replace layers: their wrapper changes the inputs or must be called at every step.
_BEYOND_LAYERS = {
    "ADALORA": "moves its ranks by calls of its own at every step",
    "ADAPTION_PROMPT": "puts learned prompts into attention",
    "LILY": "weighs its experts by the mean over all tokens of a pass, those that follow and those of other rows",
    "POLY": "needs a task number with every input",
    "SHADOW": "runs a second model beside the layers, with a state of its own",
    "XLORA": "mixes adapters by a pass of its own before each pass",
}


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def lora_config(config: ModelConfig) -> Any:
    """The peft config that the settings describe. Imports peft."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def wrap(model: Any, peft_config: Any) -> Any:
    """The model with a new adapter of any kind of peft that lives in the model's layers.

    Raises ConfigError for other kinds, for what is no peft config, and for a model that has an adapter already.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a config of peft, such as LoraConfig(r=16); got {type(peft_config).__name__}."
        )
    if has_adapter(model):
        raise ConfigError(
            "The model has an adapter already, and a peft_config (or model.use_peft) asks for a new one. Train the "
            "adapter that is there (leave peft_config out), or give model.merge_and_unload(), which has it in its "
            "weights."
        )
    _check_kind(peft_config)
    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"peft cannot add {type(peft_config).__name__} to this model: {error}") from error


def _check_kind(peft_config: Any) -> None:
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    why = _BEYOND_LAYERS.get(kind)
    if peft_config.is_prompt_learning:
        why = "puts learned tokens before the prompt"
    if getattr(peft_config, "alora_invocation_tokens", None):
        why = "switches itself on at certain tokens"
    if getattr(peft_config, "use_asa", False):
        why = "chooses its subspaces (use_asa) by calls of its own at every step"
    if why:
        raise ConfigError(_beyond_layers(type(peft_config).__name__, why))


def _beyond_layers(kind: str, why: str) -> str:
    return (
        f"{kind} {why}; here passes are packed and call the model's layers, so that it would be left out or act "
        "otherwise. Use one that replaces layers: LoraConfig (also use_dora, use_rslora), LoHaConfig, LoKrConfig, "
        "IA3Config, OFTConfig, VeraConfig, ..."
    )


def check_trainable(model: Any) -> None:
    """ConfigError where nothing of the model is trained, as with an adapter loaded for use alone."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "No weight of the model has requires_grad, so there is nothing to train. An adapter of your own is loaded "
            "for training by PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    for name, other in _overlapping(model):
        raise ConfigError(
            f"The trained weights {other} and {name} are in the same memory without being one weight, so that a step "
            "would move them twice, and no file could hold both. LoraConfig(ensure_weight_tying=True) on a model "
            "whose input and output embeddings are one does this: leave it out, or leave lm_head and embed_tokens out "
            "of target_modules."
        )


def _overlapping(model: Any) -> Iterator[tuple[str, str]]:
    """Pairs of trained parameters that overlap in memory."""
    spans = []
    for name, p in model.named_parameters():
        if p.requires_grad and p.numel() and p.device.type != "meta":
            numbers = 1 + sum((size - 1) * step for size, step in zip(p.shape, p.stride(), strict=True))
            spans.append((p.data_ptr(), p.data_ptr() + numbers * p.element_size(), name))
    spans.sort()
    for (_, end, other), (begin, _, name) in itertools.pairwise(spans):
        if begin < end:
            yield name, other


def in_four_bits(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that hold the frozen weights in 4 bits (QLoRA: NF4, doubly quantised, computed in
    bfloat16). Source: Dettmers et al. 2023, arXiv 2305.14314.

    Raises ConfigError where it cannot work here.
    """
    if not config.load_in_4bit:
        return {}
    if not config.use_peft:
        raise ConfigError(
            "load_in_4bit is true and use_peft is false: weights in 4 bits cannot be trained, only an adapter on them. "
            "Set use_peft=true."
        )
    if config.make is not None:
        raise ConfigError("load_in_4bit is for saved models (model_name_or_path); a made one has no weights to read.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_in_4bit needs the package bitsandbytes (pip install it), which is not here. Train an adapter "
            "on weights in bfloat16: load_in_4bit=false dtype=bfloat16, about four times their memory."
        )
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": four, "device_map": {"": device}}


def keep_four_bits_differentiable(model: Any) -> None:
    """Keeps weights in 4 bits in the form that has a gradient.

    On a CPU with bfloat16 instructions bitsandbytes (0.50) packs them anew in the first pass without a gradient, as
    sampling is; later passes then give no gradient to what is before such a layer, with a warning at most.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class Exchanged:
    """Other values for what a model trains, put in their place for a while.

    Args:
        model: whose trained parameters these are. value: of each parameter, the other value.
    """

    def __init__(self, model: Any, value: Callable[[torch.nn.Parameter], Tensor]) -> None:
        own = [p for p in model.parameters() if p.requires_grad]
        self.pairs: list[tuple[torch.nn.Parameter, Tensor]] = [(p, value(p)) for p in own]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with these values inside the block; no gradient may be taken there.

        Not inside autocast, which keeps 16-bit copies of the weights it has seen: it is entered in the block.
        """
        present = [p.data for p, _ in self.pairs]
        try:
            for parameter, start in self.pairs:
                parameter.data = start
            yield
        finally:
            for (parameter, _), value in zip(self.pairs, present, strict=True):
                parameter.data = value


class StartingAdapter(Exchanged):
    """What is trained, as it was when this was made: what the policy is compared with."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, lambda parameter: parameter.detach().clone())


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The model without its adapter inside the block.

    peft asks for gradients of the whole adapter when it is switched on again; here each weight has its own again.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, asks in flags:
            parameter.requires_grad_(asks)


@torch.no_grad()
def starts_switched_off(model: Any, autocast: Autocast = contextlib.nullcontext) -> bool:
    """Whether the model with its adapter switched off is the policy as it is now, and stays so whatever is trained.

    Tried on a few tokens: switched off it must give the logits it gives now, and still give them with other values in
    every weight that is trained. autocast: context of the passes.
    """
    now = _logits(model, autocast)
    with switched_off(model):
        before = _logits(model, autocast)
    with moved(model).in_place(), switched_off(model):
        after = _logits(model, autocast)
    return _equal(before, now) and _equal(before, after)


@torch.no_grad()
def check_passes(model: Any, autocast: Autocast = contextlib.nullcontext) -> None:
    """ConfigError where a pass as it is made here does not see the adapter as peft's own pass does.

    Passes here call the model inside peft's wrapper, of which `_BEYOND_LAYERS` names what is known to be left out. This
    finds the rest by a trial: the adapter, moved away from its start, must change the logits, and equally by both.
    """
    kind = type(model.active_peft_config).__name__
    start = _logits(model, autocast)
    if not bool(torch.isfinite(start).all()):
        raise ConfigError(
            f"The model with {kind} gives logits that are no finite numbers, before anything is trained. use_dora on a "
            "weight with a row of zeros does this, such as the padding row of embeddings that are the output layer "
            "too: leave lm_head and embed_tokens out of target_modules, or set use_dora=false. Else look for NaN in "
            "the model's weights."
        )
    with moved(model).in_place():
        inside, outside = _logits(model, autocast), _logits(model, autocast, through_wrapper=True)
    if _equal(inside, start):
        raise ConfigError(
            f"{kind} adds weights that change nothing: other values in all of them leave the logits as they are. Look "
            "at its target_modules, and at which adapter is active."
        )
    if not _equal(inside, outside):
        raise ConfigError(_beyond_layers(kind, "changes what goes into the model or comes out of it"))


@torch.no_grad()
def check_repeatable(model: Any, autocast: Autocast = contextlib.nullcontext) -> None:
    """ConfigError where a pass in training is not the pass that sampling makes, as with dropout: tried on a few tokens,
    with other values in an adapter, as most begin by changing nothing."""
    other = moved(model).in_place() if has_adapter(model) else contextlib.nullcontext()
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with other, torch.random.fork_rng(devices=devices, device_type="cuda"):
        sampling, training = _logits(model, autocast), _logits(model, autocast, training=True)
    if not _equal(training, sampling):
        name = type(core_of(model)).__name__
        if has_adapter(model):
            name += f" with {type(model.active_peft_config).__name__}"
        raise ConfigError(
            f"model.disable_dropout is true, and {name} still computes other logits in training than in sampling "
            f"(by up to {float((training - sampling).abs().max()):.2g}): something in it draws at random, or acts in "
            "training alone. Choose another adapter or model, or set model.disable_dropout=false to train it as it is."
        )


TRIED = (5, 11, 7, 23, 3)  # token ids of a trial


def _logits(model: Any, autocast: Autocast, *, through_wrapper: bool = False, training: bool = False) -> Tensor:
    core = core_of(model)
    vocabulary, device = core.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    ids = torch.tensor([TRIED], device=device) % vocabulary
    with eval_mode(model), autocast():
        model.train(training)
        logits: Tensor = (model if through_wrapper else core)(input_ids=ids, use_cache=False).logits
    return logits.float()


def moved(model: Any) -> Exchanged:
    """Other values for everything that is trained: a fixed pattern, as no generator of the run may be drawn from."""

    def value(parameter: torch.nn.Parameter) -> Tensor:
        number = torch.arange(parameter.numel(), device=parameter.device, dtype=torch.float32)
        return parameter.detach() + (0.05 * torch.sin(number + 1)).view_as(parameter).to(parameter.dtype)

    return Exchanged(model, value)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())
