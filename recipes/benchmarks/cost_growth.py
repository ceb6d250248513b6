"""How a step's time and memory grow in the group, the prompt, the completion, the prompts and the vocabulary.

    python recipes/benchmarks/cost_growth.py

Each line is a pair: the first size and one with a single number changed, in turns. `law` is the growth of the work
that has to be done: FLOPs of each prompt once and each live token once, the head on sampled tokens alone, attention on
what a token sees. `update` and `generate` are the growths measured, medians with their range; `peak_mb` is the peak
memory of two steps of each size, in a process of its own. Memory has no law but a bound: a pass of the update holds a
limited number of tokens, so only the keys of what is being sampled, and the logits of a chunk, may grow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from common import SHAPES, Ours, make_model, peak_mb, texts

FIRST = {"prompts": 4, "group": 8, "prompt": 64, "completion": 64, "vocabulary": 512}
CHANGES: dict[str, dict[str, int]] = {
    "group 8 -> 16": {"group": 16},
    "prompt 64 -> 256": {"prompt": 256},
    "completion 64 -> 128": {"completion": 128},
    "prompts 4 -> 8": {"prompts": 8},
    "vocabulary 512 -> 8192": {"vocabulary": 8192},
}
PHASES = ("law", "generate", "update")


def side(sizes: dict[str, int]) -> Ours:
    model, tokenizer = make_model("S", sizes["completion"], vocab_size=sizes["vocabulary"])
    return Ours(model, tokenizer, sizes["group"], sizes["completion"])


def step(run: Ours, sizes: dict[str, int], number: int) -> dict[str, float]:
    return run.step(texts(sizes["prompts"], sizes["prompt"], number), number)


def work(sizes: dict[str, int], tokens: float) -> float:
    """Multiply-adds of a forward pass."""
    shape = SHAPES["S"]
    d, layers = shape["hidden_size"], shape["num_hidden_layers"]
    body = layers * (4 * d * d + 3 * d * shape["intermediate_size"])
    of_prompts = sizes["prompts"] * sizes["prompt"]
    # Lengths are nearly geometric, so that half the mean square of a length is its mean squared.
    mean = tokens / (sizes["prompts"] * sizes["group"])
    seen = of_prompts * sizes["prompt"] / 2 + tokens * (sizes["prompt"] + mean)
    return body * (of_prompts + tokens) + 2 * layers * d * seen + d * sizes["vocabulary"] * tokens


def growth(sizes: list[dict[str, int]], steps: int) -> dict[str, Any]:
    """Second over first, by pairs after one to warm up."""
    runs = [side(s) for s in sizes]
    ratios: dict[str, list[float]] = {name: [] for name in PHASES}
    for number in range(steps + 1):
        done = [step(run, s, number) for run, s in zip(runs, sizes, strict=True)]
        for d, s in zip(done, sizes, strict=True):
            d["law"] = work(s, d["tokens"])
        if number:
            for name in PHASES:
                ratios[name].append(done[1][name] / done[0][name])
    return {name: [round(statistics.median(v), 2), round(min(v), 2), round(max(v), 2)] for name, v in ratios.items()}


def memory(sizes: dict[str, int]) -> float:
    command = [sys.executable, __file__, "--memory", json.dumps(sizes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory", type=json.loads, help="two steps of these sizes; prints the peak in MB")
    a = parser.parse_args()
    if a.memory:
        run = side(a.memory)
        for number in range(2):
            step(run, a.memory, number)
        print(peak_mb())
        return
    first_mb = memory(FIRST)
    report: dict[str, Any] = {}
    for title, change in CHANGES.items():
        sizes = [FIRST, FIRST | change]
        report[title] = growth(sizes, a.steps) | {"peak_mb": [round(first_mb), round(memory(sizes[1]))]}
        print(title, json.dumps(report[title]), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
