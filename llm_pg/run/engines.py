"""The engine that samples, made from a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import Config, ConfigError
from ..config.engines import ENGINES
from ..model.loading import end_token_ids
from ..model.precision import products_of
from ..sampling.exact import ExactSampler
from ..sampling.generate import GenerateSampler
from ..sampling.native import NativeSampler
from ..sampling.protocol import SamplingEngine
from ..sampling.vllm import VllmSampler
from ..sampling.vllm.settings import Settings
from .ranks import Ranks
from .saving.folder import RunFolder

MAKERS: dict[str, Callable[..., SamplingEngine]] = {
    "native": NativeSampler,
    "transformers": GenerateSampler,
    "vllm": VllmSampler,
}


def make_sampler(
    config: Config,
    model: Any,
    tokenizer: Any,
    *,
    ranks: Ranks | None = None,
    say: Callable[[str], None] | None = None,
) -> SamplingEngine:
    """Returns the engine of the config. With `ranks` it belongs to a run: servers' weights and log are in its folder.

    Raises:
        ConfigError: it cannot work here.
    """
    rollout = config.rollout
    options = _of_servers(config, ranks, say) if ENGINES[rollout.engine].served else {"dtype": products_of(config)}
    ends = end_token_ids(model, tokenizer)
    make = ExactSampler if config.train.exact_on_policy else MAKERS[rollout.engine]
    try:
        return make(model, tokenizer, ends, rollout.rollout_batch_size, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _of_servers(config: Config, ranks: Ranks | None, say: Callable[[str], None] | None) -> dict[str, Any]:
    number, count = (ranks.number, ranks.count) if ranks is not None else (0, 1)
    options = {"settings": vllm_settings(config, number, count), "say": say}
    if ranks is None:
        return options
    return options | {"folder": RunFolder(config).path / "vllm" / (f"rank{number}" if count > 1 else "")}


def vllm_settings(config: Config, number: int = 0, count: int = 1) -> Settings:
    """Of rank `number` of `count`: each rank has servers of its own, and brings them its weights, which are equal."""
    rollout = config.rollout
    urls = rollout.vllm_urls[number::count]
    if rollout.vllm_urls and not urls:
        raise ConfigError(
            f"vllm_urls names {len(rollout.vllm_urls)} servers for {count} ranks: give each rank one at least."
        )
    options: dict[str, Any] = {"tensor-parallel-size": rollout.vllm_tensor_parallel_size}
    if torch.cuda.is_available() or rollout.vllm_mode == "colocate":  # of the host's memory where there is no GPU
        options["gpu-memory-utilization"] = rollout.vllm_gpu_memory_utilization
    if not torch.cuda.is_available():
        options["enforce-eager"] = True  # compiling takes longer than small models on a CPU win by it
    if rollout.vllm_max_model_length is not None:
        options["max-model-len"] = rollout.vllm_max_model_length
    return Settings(
        urls=urls,
        python=rollout.vllm_python,
        dtype=products_of(config),
        options=options | rollout.vllm_options,
        start_timeout=rollout.vllm_server_timeout,
        request_timeout=rollout.vllm_request_timeout,
        tolerance=rollout.vllm_max_logp_gap,
        colocated=rollout.vllm_mode == "colocate",
        sleep=rollout.vllm_enable_sleep_mode,
        adapters=rollout.vllm_enable_lora,
    )
