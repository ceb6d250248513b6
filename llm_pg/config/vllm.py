"""Whether vLLM is there, asked without importing it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .engines import ENGINES
from .load import ConfigError

if TYPE_CHECKING:
    from .schema import Config


def need_vllm(*, colocated: bool) -> None:
    """ConfigError (a ValueError), with the other ways to have one, where there is no vllm beside this Python."""
    if find_spec("vllm") is not None:
        return
    here = "there is no vllm beside this Python. Install it here (pip install 'llm-policy-gradient[vllm]'), "
    python = "the python of an environment that has it (rollout.vllm_python)"
    elsewhere = f"{python} or servers that already run (rollout.vllm_urls)."
    if colocated:
        raise ConfigError(f"rollout.vllm_mode is colocate, and {here}or use vllm_mode=server with {elsewhere}")
    raise ConfigError(f"rollout.engine is vllm, and {here}or name {elsewhere}")


def check_vllm(config: Config) -> None:
    """ConfigError where the config wants a vllm of this environment and there is none."""
    rollout = config.rollout
    if ENGINES[rollout.engine].served and not rollout.vllm_urls and not rollout.vllm_python:
        need_vllm(colocated=rollout.vllm_mode == "colocate")
