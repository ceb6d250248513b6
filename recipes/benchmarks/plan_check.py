"""`llm-pg plan` against runs on this machine: two rates are read off a short run, then another run is foretold.

python recipes/benchmarks/plan_check.py --steps 8

On a machine that others use too, seconds on the wall tell of them: --clock cpu counts those of the run's own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llm_pg.plan import MACHINES, Machine, Model, PlannedJob, phases

SIZES = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 683,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True}
MODEL = Model(4 * (4 * 256**2 + 3 * 256 * 683) + 4096 * 256, 4, 256, 256)
FIRST = PlannedJob(8, 4, 8, 32, 32, checkpointing=False)  # the rates are read off this one
# What is foretold: twice the completions, twice their length, two processes with the first job, two with the second.
CASES = [(replace(FIRST, generations=8), 1), (replace(FIRST, completion_length=64), 1), (FIRST, 2)]
CASES.append((replace(FIRST, generations=8), 2))


def spread(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Another number for every completion: rows of groups that agree are left out of an update, and cost nothing."""
    return [zlib.crc32(repr(ids).encode()) / 2**32 for ids in completion_ids]


def worker(folder: str, job: PlannedJob, steps: int, clock: str) -> None:
    if clock == "cpu":
        time.perf_counter = time.process_time  # before anything reads it
    from llm_pg import PolicyGradientTrainer
    from llm_pg.config.load import check_values
    from llm_pg.config.schema import ModelConfig
    from llm_pg.model.loading import character_tokenizer, load_model

    tokenizer = character_tokenizer()
    values = {"name": "rloo", "output_dir": folder, "run_name": "r", "use_cpu": True, "reward_in_process": True}
    values |= {"prompts_per_step": job.prompts, "num_generations": job.generations, "max_steps": steps}
    values |= {"max_completion_length": job.completion_length, "num_eval_prompts": 2, "eval_num_samples": 0}
    values |= {"per_device_train_batch_size": job.rows, "eval_on_start": False, "save_steps": 0, "noise_steps": 0}
    model = load_model(ModelConfig(make={**SIZES, **HEADS}), tokenizer, seed=0)
    rows = [{"prompt": f"{number:0{job.prompt_length}d}"} for number in range(64)]
    PolicyGradientTrainer(model, spread, check_values(values), rows, processing_class=tokenizer).train()


def measure(job: PlannedJob, ranks: int, steps: int, clock: str) -> dict[str, float]:
    """Median seconds of a step's phases, the first step left out; the slower rank's, as a run writes them."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([folder, vars(job), steps, clock])
        subprocess.run([sys.executable, *launch, __file__, "--worker", given], check=True, env=env, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "r" / "metrics.jsonl").read_text().splitlines()][1:]
    return {name: statistics.median(line[f"seconds/{name}"] for line in lines) for name in ("sample", "update")}


def foretell(machine: Machine, job: PlannedJob, ranks: int) -> dict[str, float]:
    seconds = {phase.name: phase.seconds for phase in phases(MODEL, machine, job, ranks, "ddp")}
    sample = seconds.pop("prefill") + seconds.pop("decode")
    return {"sample": sample, "update": sum(seconds.values())}


def fitted(machine: Machine, job: PlannedJob, seen: dict[str, float]) -> Machine:
    """The machine whose share of its rate and whose overhead a token give what was seen in one process."""
    update = next(phase for phase in phases(MODEL, machine, job, 1, "ddp") if phase.name == "update")
    machine = replace(machine, used=update.flops / machine.flops / seen["update"], overhead=0.0)
    rest = seen["sample"] - foretell(machine, job, 1)["sample"]
    return replace(machine, overhead=max(rest, 0.0) / job.completion_length)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        folder, job, steps, clock = json.loads(given.worker)
        return worker(folder, PlannedJob(**job), steps, clock)
    for job, ranks in CASES:  # the rates anew before each: other work comes and goes on a shared machine
        machine = fitted(replace(MACHINES["cpu"], devices=2), FIRST, measure(FIRST, 1, given.steps, given.clock))
        print(f"{machine.flops * machine.used:.2e} FLOP/s, {machine.overhead * 1e3:.1f} ms a decoded token")
        seen, reported = measure(job, ranks, given.steps, given.clock), foretell(machine, job, ranks)
        each = "  ".join(f"{name} {seen[name]:.3f} s, foretold {reported[name]:.3f}" for name in seen)
        error = sum(reported.values()) / sum(seen.values()) - 1
        print(
            f"{ranks} x ({job.prompts} x {job.generations}, {job.completion_length} tokens): {each}  step {error:+.0%}"
        )


if __name__ == "__main__":
    main()
