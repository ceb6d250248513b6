"""What a step costs before anything is bought: FLOPs, bytes and messages of every phase, and the phase that binds.

Roofline formulas (Williams et al. 2009, doi:10.1145/1498765.1498785) with 2 FLOPs a weight and token forward and 4
backward (Kaplan et al. 2020, arXiv 2001.08361); figures are of one device. `docs/scaling.md` has them in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..config import ConfigError
from ..distributed import BUCKET_BYTES
from ..words import one_of


@dataclass(frozen=True)
class Model:
    """parameters; layers; hidden: width; kv: keys of one token and layer, numbers (values are as many); linear: weights
    in linear layers but for the output layer; ends: inputs and outputs of those layers, each layer's added up."""

    parameters: float
    layers: int
    hidden: int
    kv: int
    linear: float = 0
    ends: float = 0


@dataclass(frozen=True)
class Machine:
    """Of one device. flops: matrix products, FLOP/s; used: the share of it that training reaches; bandwidth: of memory,
    B/s; memory: bytes; link, wire: B/s to a device of the same machine, of another; devices: in a machine; latency:
    seconds a message; overhead: seconds a decoded token costs however few rows there are."""

    flops: float
    used: float
    bandwidth: float
    memory: float
    link: float
    wire: float
    devices: int = 8
    latency: float = 2e-5
    overhead: float = 1e-2


@dataclass(frozen=True)
class PlannedJob:
    """One step.

    Attributes:
        prompts: of all devices.
        generations: completions of each prompt.
        prompt_length: tokens.
        completion_length: tokens.
        rows: completions in one pass of training.
        passes: over the same rollouts, μ.
        reference: a KL penalty with a reference model.
        checkpointing: activations are computed again in the backward pass.
        weight_bytes: of a weight; 4 = float32, as it is under train.bf16.
        trained: share of the parameters that is trained, in float32 beside the frozen ones; 1 = full weights, about
            0.02 = LoRA, whose reference is the same model with the adapter off.
        moment_bytes: of the optimiser's state of a trained weight; see `MOMENT_BYTES`.
        four_bits: the frozen weights of linear layers are held in 4 bits (QLoRA).
    """

    prompts: int = 128
    generations: int = 8
    prompt_length: int = 256
    completion_length: int = 1024
    rows: int = 8
    passes: int = 1
    reference: bool = False
    checkpointing: bool = True
    weight_bytes: int = 4
    trained: float = 1.0
    moment_bytes: float = 8
    four_bits: bool = False


MODELS = {  # Qwen2.5 from 0.5B to 7B, Llama-3.1-70B
    "0.5b": Model(0.494e9, 24, 896, 128, 0.358e9, 549_888),
    "1.5b": Model(1.54e9, 28, 1536, 256, 1.31e9, 1_154_048),
    "3b": Model(3.09e9, 36, 2048, 256, 2.77e9, 1_870_848),
    "7b": Model(7.62e9, 28, 3584, 512, 6.53e9, 2_523_136),
    "70b": Model(70.6e9, 80, 8192, 1024, 68.5e9, 12_943_360),
}
# Data sheets (dense bf16 with float32 sums, memory, NVLink or PCIe one way, one 400 or 200 Gb/s card a GPU); `used` is
# what large runs report.
MACHINES = {
    "h100": Machine(989e12, 0.4, 3.35e12, 80e9, 450e9, 50e9),
    "a100": Machine(312e12, 0.45, 2.04e12, 80e9, 300e9, 25e9),
    "rtx4090": Machine(165e12, 0.4, 1.01e12, 24e9, 32e9, 3e9),
    "rtx3090": Machine(71e12, 0.4, 0.936e12, 24e9, 32e9, 3e9),
    "l4": Machine(121e12, 0.4, 0.3e12, 24e9, 32e9, 3e9),
    "rtx4080": Machine(97e12, 0.4, 0.717e12, 16e9, 32e9, 3e9),
    "a100-40": Machine(312e12, 0.45, 1.56e12, 40e9, 300e9, 25e9),
    "l40s": Machine(362e12, 0.4, 0.864e12, 48e9, 32e9, 25e9),
    "h200": Machine(989e12, 0.4, 4.8e12, 141e9, 450e9, 50e9),
    "cpu": Machine(5e10, 0.5, 1e10, 16e9, 1e9, 1e9, devices=1, latency=2e-4, overhead=2e-3),
}
# Of the state that an optimiser keeps of each trained weight, by the names of train.optim. Adafactor's, a number a row
# and column, is left out, as are the scales of blocks in 8 and 4 bits. Paged ones move it to the host where memory is
# short.
MOMENT_BYTES: dict[str, float] = {
    **{"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1, "adamw_anyprecision": 8},
    **{"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "stable_adamw": 8},
    **{"lion_32bit": 4, "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1, "grokadamw": 12},
    **{"ademamix": 12, "ademamix_8bit": 3, "paged_ademamix_32bit": 12, "paged_ademamix_8bit": 3},
    **{"rmsprop": 4, "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1},
    **{"adagrad": 4, "adafactor": 0, "sgd": 0},
}
# Of activations, a token, layer and unit of width: the input of a layer alone, or all of it.
INPUT_BYTES, LAYER_BYTES = 2, 34
# NF4 with scales of blocks of 64 in 8 bits, which have scales of their own in blocks of 256 (Dettmers et al. 2023,
# arXiv 2305.14314).
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
# vllm: servers on half of the devices. They are brought whole weights, which each training device gathers for it.
ENGINES = ("ddp", "fsdp2", "ddp+vllm", "fsdp2+vllm")


@dataclass(frozen=True)
class Phase:
    """flops; moved: bytes to and from memory; sent: bytes on the wire; messages; seconds; bound: what they are."""

    name: str
    flops: float
    moved: float
    sent: float
    messages: float
    seconds: float
    bound: str


def _phase(
    name: str, machine: Machine, speed: float, *, flops: float = 0, moved: float = 0, sent: float = 0,
    messages: float = 0, overhead: float = 0, devices: int = 1,
) -> Phase:  # fmt: skip
    """What needs the arithmetic, the memory and the wire at once takes as long as the slowest; overhead is added."""
    link = machine.link if devices <= machine.devices else machine.wire
    parts = {
        "arithmetic": flops / (machine.flops * speed),
        "memory": moved / machine.bandwidth,
        "wire": sent / link + messages * machine.latency,
    }
    bound = max(parts, key=lambda key: parts[key])
    seconds = parts[bound] + overhead
    return Phase(name, flops, moved, sent, messages, seconds, "overhead" if overhead > parts[bound] else bound)


def tokens(job: PlannedJob) -> float:
    """Tokens of a step that are computed: each prompt once, as packing does, and every completion."""
    return job.prompts * (job.prompt_length + job.generations * job.completion_length)


def memory(model: Model, job: PlannedJob, gpus: int, engine: str) -> dict[str, float]:
    """Bytes of one training device. Sampling and training come one after the other: the larger of the two counts."""
    one_of("engine", engine, ENGINES)
    if job.four_bits and engine != "ddp":
        raise ConfigError(
            f"Weights in 4 bits are held whole by each device and sampled there (engine ddp); {engine} has none."
        )
    cut = _training(gpus, engine) if engine.startswith("fsdp2") else 1
    weights = weight_bytes(model, job)
    width = INPUT_BYTES if job.checkpointing else LAYER_BYTES
    full = job.trained == 1
    # Gradients and the optimiser's state. An adapter is float32 and beside the frozen weights, which are its reference.
    beside = model.parameters * (job.weight_bytes + job.moment_bytes if full else (8 + job.moment_bytes) * job.trained)
    rest = (weights + beside + (weights if job.reference and full else 0)) / cut
    in_pass = job.rows * (job.completion_length + job.prompt_length / job.generations)
    training = in_pass * model.hidden * model.layers * width
    held = 0.0 if engine.endswith("vllm") else keys_bytes(model, job, job.generations)
    sampling = (weights if cut > 1 else 0) + held
    return {"at rest": rest, "training": training, "sampling": sampling, "most": rest + max(training, sampling)}


def weight_bytes(model: Model, job: PlannedJob) -> float:
    """Of all weights of the model, as they are held."""
    packed = model.linear if job.four_bits else 0.0
    return (model.parameters - packed) * job.weight_bytes + packed * FOUR_BITS


def _read_bytes(model: Model, job: PlannedJob) -> float:
    """Moved where all weights are used once: those in 4 bits are read, written in bfloat16 and read again."""
    return weight_bytes(model, job) + (model.linear * 4 if job.four_bits else 0.0)


def _training(gpus: int, engine: str) -> int:
    return gpus // 2 if engine.endswith("vllm") else gpus


def keys_bytes(model: Model, job: PlannedJob, rows: float) -> float:
    """Bytes of the keys and values of `rows` full completions, each prompt's once."""
    held = rows * (job.completion_length + job.prompt_length / job.generations)
    return held * 2 * model.layers * model.kv * job.weight_bytes


def _sampling(model: Model, machine: Machine, job: PlannedJob, gpus: int, engine: str) -> list[Phase]:
    rows, width, cards = job.prompts * job.generations / gpus, job.weight_bytes, 1
    weights = _read_bytes(model, job)
    free = machine.memory - memory(model, job, gpus, engine)["at rest"]
    sent, messages, name = 0.0, 0, "gather"
    if engine == "fsdp2":
        sent, messages, free = weights * (gpus - 1) / gpus, model.layers + 1, free - weights
    if engine.endswith("vllm"):  # as many devices to a replica as hold bf16 weights and half as much again
        width, weights = 2, model.parameters * 2
        cards = 2 ** max(0, ceil(weights * 1.5 / machine.memory) - 1).bit_length()
        rows, free = job.prompts * job.generations / max(gpus // 2 // cards, 1), machine.memory * cards - weights
        training = _training(gpus, engine)
        whole = model.parameters * job.weight_bytes * (training - 1) / training if engine.startswith("fsdp2") else 0
        sent, messages, name = weights + whole, model.layers * 9, "sync"
    needed = ceil(keys_bytes(model, job, rows) * (width / job.weight_bytes) / max(free, 1.0))
    batches = max(1, min(needed, ceil(rows / job.generations)))  # at the least a group at a time
    prefill = rows / job.generations * job.prompt_length
    keys = keys_bytes(model, job, rows) * (width / job.weight_bytes) / 2  # on average half of the completion is there
    return [
        _phase(name, machine, 1, sent=sent, messages=messages, devices=gpus),
        _phase("prefill", machine, machine.used, flops=2 * model.parameters * prefill / cards, moved=weights / cards),
        _phase(
            "decode", machine, machine.used, flops=2 * model.parameters * rows * job.completion_length / cards,
            moved=job.completion_length * (batches * weights + keys) / cards,
            overhead=job.completion_length * batches * machine.overhead,
        ),
    ]  # fmt: skip


def phases(model: Model, machine: Machine, job: PlannedJob, gpus: int, engine: str) -> list[Phase]:
    """The phases of a step, in order, of the busiest device.

    Raises:
        ConfigError: groups cannot be dealt out evenly, or vLLM finds no device beside those that train.
    """
    training = _training(gpus, engine)
    if training < 1 or job.prompts % training:
        raise ConfigError(f"{job.prompts} prompts cannot be dealt out to {training} training devices: give a multiple.")
    own = tokens(job) / training
    count, width = model.parameters, job.weight_bytes
    ring = 0 if training == 1 else (training - 1) / training
    sharded = engine.startswith("fsdp2")
    rounds = ceil(job.prompts * job.generations / training / job.rows)
    out = _sampling(model, machine, job, gpus, engine)
    if job.reference:
        sent = count * width * ring if sharded else 0
        out.append(_phase("reference", machine, machine.used, flops=2 * count * own, sent=sent, devices=training))
    out.append(
        _phase(
            "update", machine, machine.used, flops=(8 if job.checkpointing else 6) * count * own * job.passes,
            moved=rounds * job.passes * _read_bytes(model, job) * 3,
            sent=3 * rounds * job.passes * count * width * ring if sharded else 0,
            messages=3 * rounds * job.passes * (model.layers + 1) * bool(ring) if sharded else 0, devices=training,
        )
    )  # fmt: skip
    if not sharded:
        summed = count * job.trained * width
        sent, messages = 2 * summed * ring, ceil(summed / BUCKET_BYTES) * bool(ring)
        out.append(_phase("all-reduce", machine, 1, sent=sent, messages=messages, devices=training))
    moved = count * job.trained * (4 + 2 * job.moment_bytes + 2 * width) / (training if sharded else 1)
    out.append(_phase("optimiser", machine, 1, moved=moved))
    return [phase for phase in out if phase.seconds > 0]


def choose(model: Model, machine: Machine, job: PlannedJob, gpus: int) -> str:
    """The engine that holds the model in the simplest way. ConfigError where none does."""
    for engine in ("ddp",) if job.four_bits else ("ddp", "fsdp2"):
        if memory(model, job, gpus, engine)["most"] <= machine.memory:
            return engine
    last = "ddp" if job.four_bits or gpus == 1 else "fsdp2"
    need = memory(model, job, gpus, last)
    sizes = ", ".join(f"{name} {size / 1e9:.0f} GB" for name, size in need.items())
    raise ConfigError(
        f"No engine of this project holds it on {gpus} devices of {machine.memory / 1e9:.0f} GB; {last} needs on each: "
        f"{sizes}. What samples in the trainer's process holds whole weights. More devices lower the part at rest "
        "only; an adapter (--lora-r 16) lowers the rest, one on weights in 4 bits (--load-in-4bit) on one device most."
    )
