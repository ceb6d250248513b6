"""The trainer's weights under the names and in the form that vLLM loads.

Departure from what `save_pretrained` writes: tied embeddings are written untied, the head as a tensor of its own.
vLLM 0.32's `reload_weights` gives every layer new storage and leaves a tied head with the old one (HTTP 200, a warning
in its log, log-probabilities off by nats), so a server must be started from a folder that says untied. It costs the
server one more matrix of the embedding's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ...model.attention import core_of

FILE = "model.safetensors"
# vLLM's classes of these have no head beside the embedding; nothing there can go stale.
HEAD_IS_EMBEDDING = ("gemma", "gemma2", "gemma3n_text", "cohere", "cohere2", "cohere2_moe")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: Any) -> tuple[int, ...]:
    """A number for each parameter, of its bits: equal weights have equal ones, and any change shows (but for chance).

    Asking the weights themselves costs one reading of them and needs no word from whoever changes them.
    """
    with torch.no_grad():
        sums = [p.contiguous().view(_WORDS[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
        return tuple(torch.stack([s.to(sums[0].device) for s in sums]).tolist())


def unties(model: Any) -> bool:
    """Whether its files are written with a head of its own although the model's is tied."""
    config = core_of(model).config
    return config.model_type not in HEAD_IS_EMBEDDING


@torch.no_grad()
def named(model: Any, *, merges: bool = True) -> dict[str, Tensor]:
    """Every weight under its checkpoint's name, on the model's device, adapters merged into copies of their layers, or
    left out (merges=False)."""
    core = core_of(model)
    out = revert_weight_conversion(core, merged_state(model, merges=merges))
    head = f"{_head_name(core)}.weight"
    if unties(model):
        out.setdefault(head, core.get_output_embeddings().weight)
    else:
        out.pop(head, None)
    return out


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is served: `dtype` where it is floating, contiguous; `x` itself where it is that already."""
    return x.detach().to(dtype if x.is_floating_point() else x.dtype).contiguous()


def stream(model: Any, dtype: torch.dtype, *, merges: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The named weights as they are served, one at a time."""
    for name, x in named(model, merges=merges).items():
        yield name, cast(x, dtype)


def tensors(model: Any, dtype: torch.dtype, *, merges: bool = True) -> dict[str, Tensor]:
    """The same as copies on the CPU: safetensors refuses tensors that share memory, as a tied head does."""
    return {name: x.to("cpu", copy=True) for name, x in stream(model, dtype, merges=merges)}


class Lately:
    """The two states of weights given last, on the CPU, to tell which of the older ones vLLM kept.

    Only where they are small: a model of `limit` bytes costs the host twice that, and a copy at every sync.
    """

    def __init__(self, limit: int = 2**31) -> None:
        self.limit = limit
        self.states: list[dict[str, Tensor]] = []

    def begin(self, model: Any) -> Callable[[str, Tensor], None]:
        """Of a new state: what takes each weight of it."""
        if sum(p.numel() * p.element_size() for p in model.parameters()) > self.limit:
            self.states = []
            return lambda name, x: None
        state: dict[str, Tensor] = {}
        self.states = [*self.states, state][-2:]

        def note(name: str, x: Tensor) -> None:
            state[name] = x.to("cpu", copy=True)

        return note

    def older(self) -> dict[str, Tensor] | None:
        return self.states[0] if len(self.states) == 2 else None


@torch.no_grad()
def merged_state(model: Any, *, merges: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in the bare model, adapters merged into copies of layers or left
    out."""
    core, out = core_of(model), {}
    merged, copied = _merged_layers(core, merges), _copied_modules(core)
    out.update({f"{name}.{leaf}": value for name, own in copied.items() for leaf, value in own.items()})
    for name, value in _state(core).items():
        if any(name.startswith(f"{whole}.") for whole in copied):
            continue
        layer, _, leaf = name.rpartition(".base_layer.")
        if layer in merged:
            out[f"{layer}.{leaf}"] = merged[layer][leaf]
        elif not any(name.startswith(f"{adapted}.") for adapted in merged):
            out[name] = value
    return out


def _state(module: Any) -> dict[str, Tensor]:
    """`state_dict` without its hooks: under FSDP2 these cut weights up that were gathered to be read."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": value
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name, value in (*part._parameters.items(), *part._buffers.items())
        if value is not None and name not in part._non_persistent_buffers_set
    }


def _merged_layers(core: Any, merges: bool) -> dict[str, dict[str, Tensor]]:
    """What each adapted layer is with its adapter merged or without it, by its name; one layer is copied at a time."""
    merged = {}
    for name, module in core.named_modules():
        if isinstance(module, BaseTunerLayer):
            alone = copy.deepcopy(module) if merges else module
            if merges:
                alone.merge()
            merged[name] = _state(alone.get_base_layer())
    return merged


def _copied_modules(core: Any) -> dict[str, dict[str, Tensor]]:
    """The trained copies of modules that an adapter trains as a whole (modules_to_save), by their names."""
    return {
        name: dict(module.modules_to_save[module.active_adapter].state_dict())
        for name, module in core.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _head_name(core: Any) -> str:
    head = core.get_output_embeddings()
    return next((name for name, module in core.named_modules() if module is head), "lm_head")


def write_weights(folder: Path, values: dict[str, Tensor]) -> None:
    """`folder/model.safetensors`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{FILE}.new"
    save_file(values, beside, metadata={"format": "pt"})
    beside.replace(folder / FILE)


def write_model(folder: Path, model: Any, tokenizer: Any, values: dict[str, Tensor]) -> None:
    """A folder to start a server from: config (untied), tokenizer and weights."""
    write_config(folder, model, tokenizer)
    write_weights(folder, values)


def write_config(folder: Path, model: Any, tokenizer: Any) -> None:
    """The same without weights."""
    core = core_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    core.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if unties(model):
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        for part in (settings, settings.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
        settings.setdefault("architectures", [type(core).__name__])
        path.write_text(json.dumps(settings, indent=2))
