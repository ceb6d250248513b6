"""What fits one card: the largest batches, by how the weights are trained."""

from __future__ import annotations

from dataclasses import replace

from ..doctor.sizes import LOGITS_AT_ONCE, LOGITS_COPIES
from .costs import INPUT_BYTES, LAYER_BYTES, Model, PlannedJob, keys_bytes, memory

CARDS_GB = (16, 24, 40, 48, 80)
# Of a card's memory: what CUDA and the libraries hold, and the share that is lost between tensors.
HELD, LOST = 1e9, 0.05
LOGITS = LOGITS_AT_ONCE * 4 * LOGITS_COPIES  # float32, of a chunk of rows
RANK = 16  # of the adapters of the table where none was asked for


def with_adapter(model: Model, job: PlannedJob, rank: int, *, four_bits: bool = False) -> PlannedJob:
    """The job with an adapter on every linear layer but the output's, on frozen weights in bfloat16 or in 4 bits."""
    return replace(job, trained=rank * model.ends / model.parameters, weight_bytes=2, four_bits=four_bits)


def largest_batches(model: Model, job: PlannedJob, card: float, gpus: int = 1, engine: str = "ddp") -> tuple[int, int]:
    """Returns how many completions fit into a pass of training, and how many are sampled at a time, beside what is at
    rest; (0, 0) where not one completion or one group does.

    Args:
        model: whose widths they have.
        job: whose lengths they have; its rows are not read.
        card: bytes of a device. gpus, engine: as of `memory`.
    """
    one = memory(model, replace(job, rows=1), gpus, engine)
    free = card * (1 - LOST) - HELD - one["at rest"]
    a_row = one["training"]
    if job.checkpointing:  # one layer is whole while it is computed again
        a_row += one["training"] / model.layers * (LAYER_BYTES - INPUT_BYTES) / INPUT_BYTES
    a_group = keys_bytes(model, job, job.generations)
    beside = one["sampling"] - a_group if not engine.endswith("vllm") else 0.0
    trained = max(int((free - LOGITS) // a_row), 0)
    sampled = max(int((free - beside) // a_group), 0) * job.generations
    return (trained, sampled) if trained and sampled else (0, 0)


def assumptions(model: Model, job: PlannedJob) -> str:
    """What the memory of a plan was computed for, in a line."""
    kind = {4: "float32", 2: "16 bits"}.get(job.weight_bytes, f"{job.weight_bytes} bytes")
    weights = f"frozen weights in {kind}" if job.trained < 1 else f"weights and gradients in {kind}"
    if job.four_bits:
        weights = f"{model.linear / model.parameters:.0%} of the weights in 4 bits, the others frozen in {kind}"
    beside = (
        f", an adapter of {model.parameters * job.trained / 1e6:.1f}e6 weights in float32" if job.trained < 1 else ""
    )
    reference = ", a reference" if job.reference and job.trained == 1 else ""
    kept = (
        "the inputs of layers are kept and one layer is computed again" if job.checkpointing else "activations are kept"
    )
    lengths = f"prompts of {job.prompt_length} and completions of {job.completion_length} tokens, all of full length"
    return (
        f"Assumed: {weights}{beside}{reference}; the optimiser keeps {job.moment_bytes:g} bytes of each trained "
        f"weight; computed in 16 bits; {kept}; {lengths}; logits {LOGITS / 1e9:.1f} GB at a time; CUDA holds "
        f"{HELD / 1e9:g} GB, and {LOST:.0%} of a card is lost between tensors."
    )


def cards(model: Model, job: PlannedJob, rank: int) -> str:
    """A table of the largest batches on one card of each size: full weights, an adapter, an adapter on 4 bits."""
    full = replace(job, trained=1.0, weight_bytes=4, four_bits=False)
    kinds = {"full weights": full}
    if model.ends:
        kinds[f"LoRA r={rank}"] = with_adapter(model, job, rank)
        kinds[f"QLoRA r={rank}"] = with_adapter(model, job, rank, four_bits=True)
    lines = [
        "One card: completions in a pass (per_device_train_batch_size) | sampled at a time (rollout_batch_size); - = "
        "does not fit.",
        f"{'card':<8}" + "".join(f"{name:>18}" for name in kinds),
    ]
    for size in CARDS_GB:
        pairs = [largest_batches(model, each, size * 1e9) for each in kinds.values()]
        texts = [f"{trained} | {sampled}" if trained else "-" for trained, sampled in pairs]
        lines.append(f"{f'{size} GB':<8}" + "".join(f"{text:>18}" for text in texts))
    return "\n".join(lines)
