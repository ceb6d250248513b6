"""The native engine in a process of its own, so that it samples while this one trains.

Why no thread: the decoding of a small model is mostly Python around short kernels, and so is the host's side of a large
one on an accelerator; both would wait for the same interpreter lock as the update. A thread would need a second copy of
the model all the same.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...config import ConfigError
from ...distributed.tensors import class_of
from ...kernels.build import library
from ...model.attention import core_of
from ...processes.child import PATIENCE, Child, anonymous_file, end_of
from ...sampling.protocol import Completions, SamplingParams
from ...sampling.vllm.errors import EngineError
from ...sampling.vllm.weights import merged_state
from .weight_buffers import WeightBuffers, layout_of


class SamplerProcess:
    """A `Sampler` in another process, with the weights of one of `count` slots. A context manager.

    Args:
        model: in training; its weights are copied by `keep`. tokenizer, eos_ids, rows_at_once, dtype: see
            `NativeSampler`.
        count: slots. log: where the process writes what goes wrong.

    Raises:
        ConfigError: the process could not make this model from its config.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None,
        *,
        count: int,
        log: Path,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.tokenizer, self.log = model, tokenizer, log
        self.eos_ids, self.rows_at_once, self.count = list(eos_ids), rows_at_once, count
        self.dtype = dtype
        self._buffers = _check_remade(model)
        self._version, self._loaded = 0, -1  # whose weights are asked for, and which the process has
        self._is_ready = False

    def __enter__(self) -> SamplerProcess:
        """Start the process, without waiting for it."""
        self._handle = anonymous_file()
        state = self._state()
        self.buffers = WeightBuffers(self._handle, layout_of(state), self.count)
        self._folder = tempfile.TemporaryDirectory(prefix="llm_pg-ahead-")
        core = core_of(self.model)
        self._device = core.device  # asked for now: weights in parts move while a batch is sampled
        core.config.save_pretrained(self._folder.name)
        self.tokenizer.save_pretrained(self._folder.name)
        with self.log.open("wb") as log:
            self.child = Child("llm_pg.rollout.ahead.worker:main", output=log, pass_fds=(self._handle,))
        setup = {
            "folder": self._folder.name,
            "layout": layout_of(state),
            "count": self.count,
            "handle": self._handle,
            "dtype": str(core.dtype).removeprefix("torch."),
            "attention": core.config._attn_implementation,
            "device": str(core.device),
            "eos_ids": self.eos_ids,
            "rows_at_once": self.rows_at_once,
            "products": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "compiled": library() is not None,  # the other process does as this one would, to the last bit
            "threads": torch.get_num_threads(),  # another number could round otherwise
            "matmul_precision": torch.get_float32_matmul_precision(),
        }
        self._send(setup)
        return self

    def __exit__(self, *_: object) -> None:
        self.child.end()
        os.close(self._handle)
        self._folder.cleanup()

    def stop(self) -> None:
        """End a batch that is being sampled: `sample` raises EngineError. Called from another thread."""
        self.child.ask_to_end()

    def keep(self, version: int) -> None:
        """Copy the present weights as those of `version`; over those of `version` - count."""
        self.buffers.put(version % self.count, self._state())

    def _state(self) -> dict[str, Tensor]:
        """Weights, and buffers that no checkpoint holds: a model cast as a whole has rounded those too."""
        buffers = dict(core_of(self.model).named_buffers())
        return {**{name: buffers[name] for name in self._buffers}, **merged_state(self.model)}

    def use(self, version: int) -> None:
        """From now on sample with these."""
        self._version = version

    def use_present(self) -> None:
        """Nothing to do: who samples with the present weights does it in the trainer's process."""

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `SamplingEngine.sample`. EngineError where the process fails or has ended."""
        if not self._is_ready:
            self._receive()
            self._folder.cleanup()
            self._is_ready = True
        self._send(
            {
                "slot": None if self._loaded == self._version else self._version % self.count,
                "prompts": [list(ids) for ids in prompt_ids],
                "num_generations": num_generations,
                "params": dataclasses.asdict(params),
                "keys": keys_B.tolist(),
            }
        )
        self._receive()
        payload = self.child.receive_bytes()
        if payload is None:
            raise self._ended()
        self._loaded = self._version
        device = self._device
        return Completions(**{name: x.to(device) for name, x in load(payload).items()})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.child.send(message)
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        answer = self.child.receive()
        if answer is None:
            raise self._ended()
        if "error" in answer:
            raise EngineError(
                f"The process that samples ahead failed: {answer['error']}. Where memory is short, lower "
                "rollout.rollout_batch_size: a second copy of the model is beside the one in training. "
                "rollout.max_staleness=0 samples in the trainer."
            )
        return answer

    def _ended(self) -> EngineError:
        return EngineError(f"The process that samples ahead ended: {self.child.end(PATIENCE)}. {end_of(self.log)}")


def _check_remade(model: Any) -> list[str]:
    """The names of the model's buffers. ConfigError where another process could not make it anew from its config."""
    core, state = core_of(model), merged_state(model)
    try:
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(type(core.config)(**core.config.to_dict()))
    except ValueError:
        twin = None
    theirs = {} if twin is None else {name: x.shape for name, x in twin.state_dict().items()}
    own = class_of(core)
    odd = sorted(set(theirs) ^ set(state)) or [name for name in state if state[name].shape != theirs[name]]
    if type(twin) is not own or odd:
        what = f"weights differ in name or shape, {odd[0]} first" if odd else "it makes another class"
        raise ConfigError(
            f"rollout.max_staleness is above 0, and the process that samples cannot make {own.__name__} anew "
            f"from its config ({what}). Use rollout.max_staleness=0, or engine vllm."
        )
    assert twin is not None
    return [name for name, _ in twin.named_buffers()]
