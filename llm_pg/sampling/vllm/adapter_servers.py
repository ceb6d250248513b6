"""Servers that hold the frozen weights and are brought the adapter alone, as vLLM's LoRA requests take it.

Every state of the adapter has a name of its own (policy-1f0a77c2-1, -2, ...): a server that kept an older one would not
know the name, where replaced weights look like any others. The check of log-probabilities is that of other servers.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ...distributed.tensors import can_be_copied
from .answers import Ask
from .client import Client
from .errors import EngineError
from .host import State
from .servers import Servers
from .weights import cast

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
# Settings of an adapter that vLLM 0.32 does not read or refuses, and their values where they change nothing.
_PLAIN: Mapping[str, Any] = {
    **{"use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "layer_replication": None},
    **{"rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None, "trainable_token_indices": None},
}


class AdapterServers(Servers):
    """A `Host` of servers that were started with --enable-lora; the arguments are those of `Servers`."""

    merges = False

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._adapter = ""  # the name of the newest
        self._run = secrets.token_hex(4)  # a server may still have the adapters of a run that was killed
        self._loaded: dict[str, str] = {}  # by address
        if self.python is None:
            self.advice += (
                " For adapters it needs --enable-lora, --max-lora-rank with at least the adapter's, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
            )

    def start(self, model: Any, present: State) -> None:
        check_adapter(model)
        super().start(model, present)
        self.served = None  # a server begins without an adapter

    def older(self) -> dict[str, Tensor] | None:
        """None: the weights that it holds are not those that change."""
        return None

    def load(self, model: Any, present: State) -> None:
        self._number += 1
        self._adapter, folder = f"policy-{self._run}-{self._number}", self.folder / f"adapter-{self._number % 2}"
        write_adapter(folder, model, self.dtype)
        self.pool.tell_all(lambda client: self._bring_adapter(client, folder))
        self.served = present

    def _bring_adapter(self, client: Client, folder: Path) -> None:
        client.post("/v1/load_lora_adapter", {"lora_name": self._adapter, "lora_path": str(folder)}, reads=False)
        before = self._loaded.get(client.url)
        self._loaded[client.url] = self._adapter
        if before is not None:
            with contextlib.suppress(EngineError):  # a server that was started again has none
                client.post("/v1/unload_lora_adapter", {"lora_name": before}, reads=False)

    def _flags(self, model: Any) -> dict[str, Any]:
        rank = _config(model).r
        return {"enable-lora": True, "max-lora-rank": next(each for each in RANKS if each >= rank)}

    def _body(self, ask: Ask) -> dict[str, Any]:
        return ask.body() | {"model": self._adapter}


def check_adapter(model: Any) -> None:
    """ValueError where vLLM cannot serve what a model trains as one LoRA adapter."""
    if not isinstance(model, PeftModel) or not isinstance(_config(model), LoraConfig) or not can_be_copied(model):
        raise ValueError(
            "vllm_enable_lora brings servers a LoRA adapter alone, and the model has none, or is in shards. Set "
            "use_peft=true, or leave vllm_enable_lora out: weights are then brought whole."
        )
    config = _config(model)
    other = [name for name, plain in _PLAIN.items() if getattr(config, name, plain) not in (plain, None)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if other or trained or config.r > RANKS[-1]:
        what = ", ".join([*other, *trained[:2]]) or f"a rank of {config.r}"
        raise ValueError(
            f"vllm_enable_lora: vLLM serves plain LoRA on linear layers, and this adapter has {what}. Leave "
            "vllm_enable_lora out: the adapter is then merged, and weights are brought whole."
        )


def write_adapter(folder: Path, model: Any, dtype: torch.dtype) -> None:
    """The adapter as vLLM and peft load it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    beside = folder / "adapter_model.safetensors.new"
    save_file({name: cast(x, dtype).cpu() for name, x in state.items()}, beside, metadata={"format": "pt"})
    beside.replace(folder / "adapter_model.safetensors")
    _config(model).save_pretrained(str(folder))


def _config(model: Any) -> Any:
    return model.peft_config[model.active_adapter] if hasattr(model, "peft_config") else None
