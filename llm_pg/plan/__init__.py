"""What a step costs before anything is bought: seconds, memory, and the batches that fit."""

from .command import add_arguments, render
from .costs import (
    ENGINES,
    MACHINES,
    MODELS,
    MOMENT_BYTES,
    Machine,
    Model,
    PlannedJob,
    choose,
    memory,
    phases,
    tokens,
)
from .fits import CARDS_GB, largest_batches, with_adapter

__all__ = [
    "CARDS_GB",
    "ENGINES",
    "MACHINES",
    "MODELS",
    "MOMENT_BYTES",
    "Machine",
    "Model",
    "PlannedJob",
    "add_arguments",
    "choose",
    "largest_batches",
    "memory",
    "phases",
    "render",
    "tokens",
    "with_adapter",
]
