"""What `train.exact_on_policy` cannot go with, known before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..algorithms.table import AlgorithmSpec

if TYPE_CHECKING:
    from .schema import Config


def check_exactness(spec: AlgorithmSpec, config: Config) -> None:
    """Raises ValueError, with the part that would make sampler and trainer differ."""
    if not config.train.exact_on_policy:
        return
    rollout, algorithm, train = config.rollout, config.algorithm, config.train
    reuse = algorithm.num_iterations * algorithm.steps_per_generation
    refusals = {
        f"engine {rollout.engine} computes in its own way. Use engine=native": rollout.engine != "native",
        f"max_staleness {rollout.max_staleness} samples with weights of before. Use max_staleness=0": (
            rollout.max_staleness > 0
        ),
        f"num_iterations {algorithm.num_iterations} and steps_per_generation {algorithm.steps_per_generation} make "
        "more than one step on a batch, and the ratio is 1 in the first alone. Use 1 and 1": reuse > 1,
        "packing padded computes rows with padding. Use packing=auto": train.packing == "padded",
        "gradient_checkpointing leaves no packed rows. Use gradient_checkpointing=false": train.gradient_checkpointing,
        "top_k, top_p, min_p and repetition_penalty take the trainer through other operations on the logits. Use "
        "top_k=0, top_p=1, min_p=0 and repetition_penalty=1": bool(
            rollout.top_k or rollout.top_p < 1.0 or rollout.min_p or rollout.repetition_penalty != 1.0
        ),
        "an entropy bonus takes the trainer through other operations on the logits. Leave it out": (
            bool(spec.entropy_coef or spec.entropy_coef_final or spec.use_adaptive_entropy)
        ),
    }
    for reason, holds in refusals.items():
        if holds:
            raise ValueError(f"exact_on_policy is true, and {reason}, or leave exact_on_policy out.")
