"""What a step costs before anything is bought: FLOPs, bytes and messages of every phase, and the phase that binds.

Roofline formulas (Williams et al. 2009, doi:10.1145/1498765.1498785) with 2 FLOPs a weight and token forward and 4
backward (Kaplan et al. 2020, arXiv 2001.08361); figures are of one device. `docs/scaling.md` has them in words.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from math import ceil

from .config import ConfigError
from .distributed import BUCKET_BYTES
from .words import one_of


@dataclass(frozen=True)
class Model:
    """parameters; layers; hidden: width; kv: keys of one token and layer, numbers (values are as many)."""

    parameters: float
    layers: int
    hidden: int
    kv: int


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
    moment_bytes: int = 8


MODELS = {  # Qwen2.5 from 0.5B to 7B, Llama-3.1-70B
    "0.5b": Model(0.494e9, 24, 896, 128),
    "1.5b": Model(1.54e9, 28, 1536, 256),
    "3b": Model(3.09e9, 36, 2048, 256),
    "7b": Model(7.62e9, 28, 3584, 512),
    "70b": Model(70.6e9, 80, 8192, 1024),
}
# Data sheets (dense bf16 with float32 sums, memory, NVLink or PCIe one way, one 400 or 200 Gb/s card a GPU); `used` is
# what large runs report.
MACHINES = {
    "h100": Machine(989e12, 0.4, 3.35e12, 80e9, 450e9, 50e9),
    "a100": Machine(312e12, 0.45, 2.04e12, 80e9, 300e9, 25e9),
    "rtx4090": Machine(165e12, 0.4, 1.01e12, 24e9, 32e9, 3e9),
    "rtx3090": Machine(71e12, 0.4, 0.936e12, 24e9, 32e9, 3e9),
    "l4": Machine(121e12, 0.4, 0.3e12, 24e9, 32e9, 3e9),
    "cpu": Machine(5e10, 0.5, 1e10, 16e9, 1e9, 1e9, devices=1, latency=2e-4, overhead=2e-3),
}
# Of the state that an optimiser keeps of each trained weight, by the names of train.optim. Adafactor's, a number a row
# and column, is left out; 8-bit states are in blocks, whose scales are.
MOMENT_BYTES = {
    **{
        "adamw_torch": 8,
        "adamw_torch_fused": 8,
        "adamw_8bit": 2,
        "paged_adamw_8bit": 2,
        "lion_32bit": 4,
        "lion_8bit": 1,
    },
    **{"adafactor": 0, "sgd": 0},
}
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
    cut = _training(gpus, engine) if engine.startswith("fsdp2") else 1
    weights = model.parameters * job.weight_bytes
    width = 2 if job.checkpointing else 34  # bytes a token, layer and unit of width: inputs alone, or all
    full = job.trained == 1
    # Gradients and the optimiser's state. An adapter is float32 and beside the frozen weights, which are its reference.
    beside = model.parameters * (job.weight_bytes + job.moment_bytes if full else (8 + job.moment_bytes) * job.trained)
    rest = (weights + beside + (weights if job.reference and full else 0)) / cut
    in_pass = job.rows * (job.completion_length + job.prompt_length / job.generations)
    training = in_pass * model.hidden * model.layers * width
    held = 0.0 if engine.endswith("vllm") else _keys(model, job, job.generations)
    sampling = (weights if cut > 1 else 0) + held
    return {"at rest": rest, "training": training, "sampling": sampling, "most": rest + max(training, sampling)}


def _training(gpus: int, engine: str) -> int:
    return gpus // 2 if engine.endswith("vllm") else gpus


def _keys(model: Model, job: PlannedJob, rows: float) -> float:
    """Bytes of the keys and values of `rows` full completions, each prompt's once."""
    held = rows * (job.completion_length + job.prompt_length / job.generations)
    return held * 2 * model.layers * model.kv * job.weight_bytes


def _sampling(model: Model, machine: Machine, job: PlannedJob, gpus: int, engine: str) -> list[Phase]:
    rows, width, cards = job.prompts * job.generations / gpus, job.weight_bytes, 1
    weights = model.parameters * width
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
    needed = ceil(_keys(model, job, rows) * (width / job.weight_bytes) / max(free, 1.0))
    batches = max(1, min(needed, ceil(rows / job.generations)))  # at the least a group at a time
    prefill = rows / job.generations * job.prompt_length
    keys = _keys(model, job, rows) * (width / job.weight_bytes) / 2  # on average half of the completion is there
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
            moved=rounds * job.passes * count * width * 3,
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
    for engine in ("ddp", "fsdp2"):
        if memory(model, job, gpus, engine)["most"] <= machine.memory:
            return engine
    need = memory(model, job, gpus, "fsdp2")
    sizes = ", ".join(f"{name} {size / 1e9:.0f} GB" for name, size in need.items())
    raise ConfigError(
        f"No engine of this project holds it on {gpus} devices of {machine.memory / 1e9:.0f} GB; FSDP2 needs, on each: "
        f"{sizes}. What samples in the trainer's process holds whole weights. More devices lower the part at rest "
        "only; an adapter (--trained 0.02 --weight-bytes 2) lowers the rest."
    )


def render(model: Model, machine: Machine, job: PlannedJob, gpus: int, engine: str) -> str:
    """The plan as text: a table, the step, its bottleneck, and what twice the devices would change."""
    rows = phases(model, machine, job, gpus, engine)
    total = sum(row.seconds for row in rows)
    head = f"{'TFLOP':>9} {'moved GB':>9} {'wire GB':>8} {'messages':>8} {'seconds':>8}"
    lines = [f"{'phase':<10} {head}  share  bound by"]
    for row in rows:
        lines.append(
            f"{row.name:<10} {row.flops / 1e12:9.1f} {row.moved / 1e9:9.1f} {row.sent / 1e9:8.1f} {row.messages:8.0f} "
            f"{row.seconds:8.2f}  {row.seconds / total:4.0%}  {row.bound}"
        )
    worst = max(rows, key=lambda row: row.seconds)
    parts = memory(model, job, gpus, engine)
    lines.append(f"Step: {total:.1f} s with {engine} on {gpus}; bottleneck: {worst.name}, bound by {worst.bound}.")
    held = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
    fits = "" if parts["most"] <= machine.memory else " It does not fit."
    lines.append(f"Memory of a training device ({machine.memory / 1e9:.0f} GB): {held}.{fits}")
    twice = phases(model, machine, replace(job, prompts=job.prompts * 2), gpus * 2, engine)
    rate = 2 * total / sum(row.seconds for row in twice)
    limit = max(twice, key=lambda row: row.seconds)
    lines.append(f"Twice the devices and prompts: {rate:.2f} times the completions a second; {limit.name} then binds.")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job, machine = PlannedJob(), MACHINES["h100"]
    sizes = f"{', '.join(MODELS)}, a folder with a config.json, or a hub id"
    parser.add_argument("--model", default="7b", help=f"{sizes}; no weights are read")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--device", default="h100", choices=MACHINES)
    parser.add_argument("--engine", choices=ENGINES, help="left out: the simplest that holds the model")
    for name in ("flops", "used", "bandwidth", "memory", "link", "wire", "latency", "overhead"):
        text = f"of a device, in FLOP/s, B/s, bytes or s; h100: {getattr(machine, name):g}"
        parser.add_argument(f"--{name}", type=float, help=text)
    for name in ("prompts", "generations", "prompt_length", "completion_length", "rows", "passes", "weight_bytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(job, name))
    parser.add_argument("--optim", default="adamw_torch", choices=MOMENT_BYTES, help="of the update")
    parser.add_argument("--trained", type=float, default=job.trained, help="share of the parameters; LoRA: about 0.02")
    parser.add_argument("--reference", action="store_true", help="a KL penalty with a reference model (beta > 0)")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations")
    parser.set_defaults(run=main)


def _model(name: str) -> Model:
    if name in MODELS:
        return MODELS[name]
    from .model.shape import shape_of_model  # loads transformers, which the help and the sizes above need not wait for

    shape = shape_of_model(name)
    kv = f"{shape.kv} keys a token and layer"
    print(f"{name}: {shape.parameters / 1e9:.3f}e9 parameters, {shape.layers} layers, width {shape.hidden}, {kv}.")
    return Model(shape.parameters, shape.layers, shape.hidden, shape.kv)


def main(given: argparse.Namespace) -> int:
    values = vars(given)
    rates = {k: v for k, v in values.items() if k in Machine.__dataclass_fields__ and v is not None}
    machine = replace(MACHINES[given.device], **rates)
    values["moment_bytes"] = MOMENT_BYTES[given.optim]
    job = PlannedJob(**{name: values[name] for name in PlannedJob.__dataclass_fields__})
    numbers = {**rates, "gpus": given.gpus, **vars(job)}
    del numbers["moment_bytes"]
    low = [name for name, value in numbers.items() if value <= 0 and not isinstance(value, bool)]
    if not job.trained <= 1:
        raise ConfigError(f"--trained is a share of the parameters, over 0 and at most 1; {job.trained:g} is not.")
    if low:
        raise ConfigError(f"plan takes numbers above 0; {', '.join(low)} is not.")
    model = _model(given.model)
    print(render(model, machine, job, given.gpus, given.engine or choose(model, machine, job, given.gpus)))
    return 0
