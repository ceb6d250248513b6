"""Asynchronous rollouts: completions are sampled and scored in the background while earlier ones are trained on.

Batch t is sampled with the weights after update t-1-k, k = `rollout.max_staleness` (the first k+1 batches with those of
the start): a fixed lag, not whatever is newest, so that a run can be repeated and ranks need not agree on it by
messages. What that biases, and how it is corrected: docs/algorithms.md. The package is lazy, since the process that
samples imports it and needs few of its modules.

Source: the idea is A3C's, Mnih et al. 2016 (arXiv 1602.01783); for language models Noukhovitch et al. 2024 (arXiv
2410.18252) and AReaL, Fu et al. 2025 (arXiv 2505.24298). Departure from the latter: a batch has one age and its
place in the order, where there completions come as they end.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines import make_engine
    from .loop import Ahead

_HOMES = {"Ahead": "loop", "make_engine": "engines"}
__all__ = ["Ahead", "make_engine"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
