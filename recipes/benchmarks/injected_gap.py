"""What a gap between sampler and trainer does: the quickstart's task, with noise on the logits that are sampled from.

    python recipes/benchmarks/injected_gap.py --seeds 0 1 2 --out runs/gap

`fresh` noise is drawn anew for every token, as rounding is; `fixed` noise is one vector for the whole run, as a wrong
weight or another temperature would be. Completions are really sampled from the changed distribution, whose
log-probabilities are recorded; the trainer does not know. One line a run: the gap that was measured (the metric
`sampler_gap`), steps to a greedy pass rate of 90 %, the rate at the end. `--table` prints what is in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from learning_table import finished, settings, spread, warm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pg import PolicyGradientTrainer
from llm_pg.metrics import read_metrics
from llm_pg.sampling.choice import Choice
from llm_pg.sampling.native import NativeSampler
from llm_pg.terminal import Terminal

CASES = [
    ("none", 0.0, False),
    *((kind, size, False) for kind in ("fresh", "fixed") for size in (0.1, 0.3, 1.0)),
    *((kind, 1.0, True) for kind in ("fresh", "fixed")),
]


class NoisyDecoder:
    """A decoder whose logits are not those of the model."""

    def __init__(self, inner: Any, noise: Any) -> None:
        self.inner, self.noise = inner, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prefill(self, prompts_R: Any) -> Tensor:
        return self.noise(self.inner.prefill(prompts_R))

    def step(self, next_R: Tensor, depth_R: Tensor) -> Tensor:
        return self.noise(self.inner.step(next_R, depth_R))


def noisy_sampler(model: Any, tokenizer: Any, kind: str, size: float, seed: int) -> NativeSampler:
    sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id])
    g = torch.Generator().manual_seed(1000 + seed)
    fixed = torch.randn(model.config.vocab_size, generator=g)

    def noise(logits: Tensor) -> Tensor:
        drawn = torch.randn(logits.shape, generator=g) if kind == "fresh" else fixed
        return logits + size * drawn

    make = sampler.choice.make
    sampler.choice = Choice("noisy", lambda *given: NoisyDecoder(make(*given), noise), refills=False)
    return sampler


def run(out: Path, seed: int, kind: str, size: float, corrected: bool) -> dict[str, Any]:
    start = warm(out, seed)
    name = f"{kind}-{size:g}-{'corrected-' * corrected}seed{seed}"
    config = settings(
        out, seed, name, "eval_steps=10", f"vllm_importance_sampling_correction={str(corrected).lower()}",
        "warm_start_steps=0",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "start", dtype=torch.float32)
    sampler = noisy_sampler(model, tokenizer, kind, size, seed) if size else None
    PolicyGradientTrainer(
        model, args=config, processing_class=tokenizer, sampler=sampler, terminal=Terminal.silent()
    ).train()
    lines = read_metrics(out / name / "metrics.jsonl")
    curve = [(line["step"], line["eval/greedy"]) for line in lines if "eval/greedy" in line]
    gaps = [line["sampler_gap"] for line in lines if "sampler_gap" in line]
    reached = next((step for step, rate in curve if rate >= 0.9), None)
    return {
        "kind": kind, "size": size, "corrected": corrected, "seed": seed, "gap": statistics.fmean(gaps[:20]),
        "reached": reached, "end": curve[-1][1], "curve": curve,
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> None:
    print("| noise | size | correction | runs | gap at first, nats a token | steps to 90 % | pass rate at the end, % |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for kind, size, corrected in CASES:
        own = [r for r in runs if (r["kind"], r["size"], r["corrected"]) == (kind, size, corrected)]
        if own:
            word = "token_truncate" if corrected else "none"
            print(
                f"| {kind} | {size:g} | {word} | {len(own)} | {spread([r['gap'] for r in own], 4)} | "
                f"{spread([r['reached'] for r in own], 0)} | {spread([100 * r['end'] for r in own], 1)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/injected_gap"))
    parser.add_argument("--table", action="store_true", help="only print the table of the runs made so far")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    results = a.out / "runs.jsonl"
    done = {(r["kind"], r["size"], r["corrected"], r["seed"]) for r in finished(results)}
    for seed in () if a.table else a.seeds:
        for case in CASES:
            if (*case, seed) not in done:
                found = run(a.out, seed, *case)
                with results.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)
    table(finished(results))


if __name__ == "__main__":
    main()
