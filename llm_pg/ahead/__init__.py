"""Asynchronous rollouts: completions are sampled and scored in the background while earlier ones are trained on.

Batch t is sampled with the weights after update t-1-k, k = `rollout.max_staleness` (the first k+1 batches with those of
the start): a fixed lag, not whatever is newest, so that a run can be repeated. What that biases, and how it is
corrected: docs/algorithms.md.

Source: the idea is A3C's, Mnih et al. 2016 (arXiv 1602.01783); for language models Noukhovitch et al. 2024 (arXiv
2410.18252) and AReaL, Fu et al. 2025 (arXiv 2505.24298). Departure from the latter: a batch has one age and its
place in the order, where there completions come as they end.
"""

from .engines import make_engine
from .loop import Ahead

__all__ = ["Ahead", "make_engine"]
