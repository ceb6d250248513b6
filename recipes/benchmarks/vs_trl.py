"""Our step against TRL's GRPOTrainer: the same model, prompts, lengths, reward and optimiser, alternating in one run.

    python recipes/benchmarks/vs_trl.py --size S --prompt-len 64 --json out.json

TRL runs its own training loop; after each of its steps one of ours is timed. TRL's micro-batch and precision are swept
first and its fastest kept. Peak memory comes from a process for each side. With --model FOLDER a chat model answers
sums in words, 8 x 8 completions of at most 48 tokens, instead of random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from typing import Any

import datasets
import torch
import transformers
import trl
from common import (
    DEVICE,
    LEARNING_RATE,
    SHAPES,
    Ours,
    chat_model,
    floor,
    make_model,
    now,
    peak_mb,
    questions,
    rates,
    reward,
    texts,
)  # fmt: skip

PRESETS = {("S", 64): (8, 8, 64), ("S", 256): (8, 8, 128), ("M", 64): (2, 8, 64), ("L", 128): (32, 16, 512)}
TRL_CHOICES = {
    "whole batch": {},
    "half batch": {"halves": 2},
    "bf16": {"bf16": True},
    "static cache": {"generation_kwargs": {"cache_implementation": "static"}},
}


def timed(seconds: dict[str, float], name: str, function: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = now()
        out = function(*args, **kwargs)
        seconds[name] += now() - start
        return out

    return wrapped


class Alternate(transformers.TrainerCallback):
    """Times each of TRL's steps by phase, and runs one of ours after it."""

    def __init__(self, ours: Ours | None, prompts: list[list[str]], warm_up: int) -> None:
        self.ours, self.prompts, self.warm_up = ours, prompts, warm_up
        self.seconds: dict[str, float] = defaultdict(float)
        self.trl: list[dict[str, float]] = []
        self.mine: list[dict[str, float]] = []
        self.rates: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.clear()
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = now() - self.start
        generate = self.seconds["generate"]
        self.trl.append({"generate": generate, "update": step - generate, "step": step, **self.seconds})
        if self.ours is not None:
            self.rates.append(rates())
            prompts = self.prompts[(state.global_step - 1) % len(self.prompts)]
            self.mine.append(self.ours.step(prompts, state.global_step))
            print(
                json.dumps({"trl": self.trl[-1], "ours": self.mine[-1], **self.rates[-1]}), file=sys.stderr, flush=True
            )


def load(a: argparse.Namespace) -> tuple[Any, Any]:
    return chat_model(a.model) if a.model else make_model(a.size, a.completion)


def make_prompts(a: argparse.Namespace, tokenizer: Any, steps: int) -> list[list[str]]:
    if a.model:
        return [questions(tokenizer, a.prompts, seed) for seed in range(steps)]
    return [texts(a.prompts, a.prompt_len, seed) for seed in range(steps)]


def run_trl(a: argparse.Namespace, choice: str, steps: int, ours: Ours | None, prompts: list[list[str]]) -> Alternate:
    options = dict(TRL_CHOICES[choice])
    halves = options.pop("halves", 1)
    model, tokenizer = load(a)
    rows = [{"prompt": p} for batch in prompts for p in batch]
    callback = Alternate(ours, prompts, a.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=a.prompts * a.group // halves,
            gradient_accumulation_steps=halves, num_generations=a.group, max_completion_length=a.completion,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", beta=0.0, temperature=1.0, loss_type="grpo",
            use_cpu=DEVICE.type == "cpu", gradient_checkpointing=False, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
            **{"bf16": False, **options},
        )  # fmt: skip

        def counted(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            callback.seconds["tokens"] = float(sum(map(len, completion_ids)))
            return reward(completion_ids, **columns)

        trainer = trl.GRPOTrainer(
            model, counted, config, datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
        )
        phases = {"generate": "_generate_single_turn", "forward": "_get_per_token_logps_and_entropies"}
        for phase, name in phases.items():
            setattr(trainer, name, timed(callback.seconds, phase, getattr(trainer, name)))
        trainer.accelerator.backward = timed(callback.seconds, "backward", trainer.accelerator.backward)
        trainer.train()
    return callback


def measure(a: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(a)
    prompts = make_prompts(a, tokenizer, a.warm_up + a.steps)
    sweep = {}
    for choice in a.choices if len(a.choices) > 1 else ():
        done = run_trl(a, choice, 3, None, prompts).trl[1:]
        sweep[choice] = statistics.median(s["step"] for s in done)
        print(f"TRL, {choice}: {sweep[choice]:.2f} s", file=sys.stderr)
    best = min(sweep, key=lambda k: sweep[k]) if sweep else a.choices[0]
    ours = Ours(model, tokenizer, a.group, a.completion, packing=a.packing, bf16=a.bf16)
    run = run_trl(a, best, a.warm_up + a.steps, ours, prompts)
    theirs, mine = run.trl[a.warm_up :], run.mine[a.warm_up :]
    rate = {k: max(r[k] for r in run.rates) for k in run.rates[0]}
    tokens = statistics.median(s["tokens"] for s in mine)
    known = not a.model  # the shape
    bound = floor(a.size, a.prompts, a.group, a.prompt_len, tokens, a.completion, rate) if known else {}

    def middle(steps: list[dict[str, float]]) -> dict[str, float]:
        return {k: statistics.median(s.get(k, 0.0) for s in steps) for k in steps[0]}

    # Each side samples for itself, so a pair shares its prompts but not its lengths: seconds, and seconds a token.
    pairs = list(zip(theirs, mine, strict=True))
    ratios = {k: [t[k] / m[k] for t, m in pairs] for k in ("generate", "update", "step")}
    ratios["step_per_token"] = [t["step"] / t["tokens"] / (m["step"] / m["tokens"]) for t, m in pairs]
    return {
        "trl": middle(theirs) | {"best": best, "sweep": sweep}, "ours": middle(mine), "floor": bound,
        "ratio": {k: {"median": statistics.median(v), "range": [min(v), max(v)]} for k, v in ratios.items()},
        "over_floor": {k: middle(mine)[k] / bound[k] for k in bound}, "rates": rate,
        "threads": torch.get_num_threads(), "versions": {"trl": trl.__version__, "torch": torch.__version__},
    }  # fmt: skip


def memory(a: argparse.Namespace, side: str) -> float:
    """Peak resident memory (MB) of two steps of one side in its own process."""
    command = [sys.executable, __file__, "--size", a.size, "--prompt-len", str(a.prompt_len), "--only", side]
    command += ["--model", a.model] if a.model else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="S", help="L, with --prompt-len 128, is for a GPU")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--packing", default="auto")
    parser.add_argument("--bf16", action="store_true", help="our update under autocast too; TRL has it in its sweep")
    parser.add_argument("--choices", nargs="+", default=list(TRL_CHOICES), help="TRL settings to sweep")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--model", help="folder or hub id of a chat model")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--only", choices=["trl", "ours"], help="two steps of one side; prints its peak memory in MB")
    a = parser.parse_args()
    a.prompts, a.group, a.completion = PRESETS.get((a.size, a.prompt_len), (8, 8, 64))
    if a.model:
        a.prompts, a.group, a.completion = 8, 8, 48
    if a.only:
        model, tokenizer = load(a)
        prompts = make_prompts(a, tokenizer, 2)
        if a.only == "trl":
            del model
            run_trl(a, "whole batch", 2, None, prompts)
        else:
            ours = Ours(model, tokenizer, a.group, a.completion)
            for i, batch in enumerate(prompts):
                ours.step(batch, i)
        print(peak_mb())
        return
    result = measure(a)
    if not a.no_memory:
        print(json.dumps(result), file=sys.stderr, flush=True)
        result["memory_mb"] = {side: memory(a, side) for side in ("trl", "ours")}
    text = json.dumps(result, indent=1)
    print(text)
    if a.json:
        with open(a.json, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
