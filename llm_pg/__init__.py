"""Policy-gradient fine-tuning of causal language models on verifiable rewards.

Letters that name axes throughout the package: B rollouts, T completion tokens (or control steps), P prompts,
G samples per prompt, V vocabulary, H hidden.

The package is lazy: `import llm_pg` imports no torch; a name is loaded from its room when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "ReinforceTrainer": "llm_pg.trainer",
    "RLOOTrainer": "llm_pg.trainer",
    "GRPOTrainer": "llm_pg.trainer",
    "ActorCriticTrainer": "llm_pg.trainer",
    "ReinforceConfig": "llm_pg.config",
    "RLOOConfig": "llm_pg.config",
    "GRPOConfig": "llm_pg.config",
    "ActorCriticConfig": "llm_pg.config",
    "Config": "llm_pg.config",
    "register_algorithm": "llm_pg.algorithms.own",
}

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'llm_pg' has no attribute {name!r}; it has {', '.join(sorted(_ROOMS))}.")
