"""`llm-pg plan`: a step on paper, as text."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..config import ConfigError
from .costs import ENGINES, MACHINES, MODELS, MOMENT_BYTES, Machine, Model, PlannedJob, choose, memory, phases
from .fits import RANK, assumptions, cards, largest_batches, with_adapter


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
    trained, sampled = largest_batches(model, job, machine.memory, gpus, engine)
    if trained:
        lines.append(
            f"A batch that fits: {trained} completions in a pass (per_device_train_batch_size), {sampled} sampled at a "
            f"time: {sampled // job.generations} prompts × {job.generations} (rollout_batch_size)."
        )
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
    for name in ("prompts", "generations", "prompt_length", "completion_length", "rows", "passes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(job, name))
    parser.add_argument("--weight-bytes", type=int, help="of a weight; 4 = float32, and 2 with an adapter")
    parser.add_argument("--optim", default="adamw_torch", choices=MOMENT_BYTES, help="of the update")
    parser.add_argument(
        "--lora-r", type=int, help="rank of an adapter on all linear layers; weights in 16 bits unless given"
    )
    parser.add_argument("--load-in-4bit", dest="four_bits", action="store_true", help="QLoRA: needs --lora-r")
    parser.add_argument("--trained", type=float, default=job.trained, help="share of the parameters; LoRA: about 0.02")
    parser.add_argument("--reference", action="store_true", help="a KL penalty with a reference model (beta > 0)")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations")
    parser.set_defaults(run=main)


def _model(name: str) -> Model:
    if name in MODELS:
        return MODELS[name]
    from ..model.shape import shape_of_model  # loads transformers, which the help and the sizes above need not wait for

    shape = shape_of_model(name)
    kv = f"{shape.kv} keys a token and layer"
    print(f"{name}: {shape.parameters / 1e9:.3f}e9 parameters, {shape.layers} layers, width {shape.hidden}, {kv}.")
    return Model(shape.parameters, shape.layers, shape.hidden, shape.kv, shape.linear, shape.ends)


def main(given: argparse.Namespace) -> int:
    values = vars(given)
    rates = {k: v for k, v in values.items() if k in Machine.__dataclass_fields__ and v is not None}
    machine = replace(MACHINES[given.device], **rates)
    values["moment_bytes"] = MOMENT_BYTES[given.optim]
    values["weight_bytes"] = given.weight_bytes if given.weight_bytes is not None else 2 if given.lora_r else 4
    job = PlannedJob(**{name: values[name] for name in PlannedJob.__dataclass_fields__})
    _check(given, job, rates)
    model = _model(given.model)
    if given.lora_r:
        job = replace(with_adapter(model, job, given.lora_r, four_bits=job.four_bits), weight_bytes=job.weight_bytes)
    print(assumptions(model, job))
    print(render(model, machine, job, given.gpus, given.engine or choose(model, machine, job, given.gpus)))
    if given.gpus == 1:
        print(cards(model, job, given.lora_r or RANK))
    return 0


def _check(given: argparse.Namespace, job: PlannedJob, rates: dict[str, float]) -> None:
    numbers = {**rates, "gpus": given.gpus, **vars(job)}
    numbers |= {"lora_r": given.lora_r} if given.lora_r is not None else {}
    del numbers["moment_bytes"]
    low = [name for name, value in numbers.items() if value <= 0 and not isinstance(value, bool)]
    if not job.trained <= 1:
        raise ConfigError(f"--trained is a share of the parameters, over 0 and at most 1; {job.trained:g} is not.")
    if low:
        raise ConfigError(f"plan takes numbers above 0; {', '.join(low)} is not.")
    if given.lora_r and job.trained != 1:
        raise ConfigError("--lora-r says how much is trained; leave --trained out.")
    if job.four_bits and not given.lora_r:
        raise ConfigError(
            "--load-in-4bit holds frozen weights in 4 bits: give the rank of the adapter too (--lora-r 16)."
        )
