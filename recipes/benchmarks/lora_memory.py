"""Peak memory of full training against LoRA, with and without a reference: each in a process of its own.

    python recipes/benchmarks/lora_memory.py [--layers 16] [--steps 2]

A made Llama (50 M parameters at 16 layers, float32), AdamW, 8 short completions a step on the CPU, so that weights,
gradients and moments are most of the memory and activations little. Columns: MB of resident memory at its peak, these
less what the imports took, and what the parameters, the reference, the gradients and the moments add up to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "full, beta 0": {"beta": 0.0},
    "full, beta 0.05": {"beta": 0.05},
    "LoRA r 16, beta 0": {"beta": 0.0, "use_peft": True},
    "LoRA r 16, beta 0.05": {"beta": 0.05, "use_peft": True},
}


def letters(completion: str, **row: Any) -> float:
    return sum(c.isalpha() for c in completion) / 8


def measure(name: str, layers: int, steps: int) -> dict[str, float]:
    """Train one case here; MB."""
    from llm_pg import GRPOConfig, GRPOTrainer
    from llm_pg.metrics import peak_memory_mb
    from llm_pg.model.loading import character_tokenizer
    from llm_pg.terminal import Terminal

    imports = peak_memory_mb()
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            **{"make": {"model_type": "llama", **sizes}, "max_steps": steps, "prompts_per_step": 2},
            **{"num_generations": 4, "max_completion_length": 8, "num_eval_prompts": 0, "engine": "native"},
            **{"reward_in_process": True, "use_cpu": True, "try_longest_batch": False, "learning_rate": 1e-4},
            **{"run_name": "r", **CASES[name]},
        }
        trainer = GRPOTrainer(
            reward_funcs=letters,
            args=GRPOConfig(folder, **settings),
            train_dataset=[{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)],
            processing_class=character_tokenizer(),
            terminal=Terminal(quiet=True),
        )
        trainer.train()
    policy, optimizer = trainer.policy, trainer.optimizer
    moments = sum(x.nbytes for entry in optimizer.state.values() for x in entry.values())
    own = sum(p.nbytes for p in policy.model.parameters())
    reference = sum(p.nbytes for p in policy.reference.parameters()) if policy.reference is not None else 0
    trained = sum(p.nbytes for p in policy.parameters())
    peak = peak_memory_mb()
    return {
        "parameters": own / 4e6,
        "peak": peak,
        "less_imports": peak - imports,
        "held": (own + reference + trained + moments) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--case", choices=list(CASES), help="measure this one here and print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.layers, arguments.steps)))
        return
    print("| case | parameters, M | peak, MB | less imports, MB | weights, reference, gradients, moments, MB |")
    print("|---|--:|--:|--:|--:|")
    for name in CASES:
        words = ["--case", name, "--layers", str(arguments.layers), "--steps", str(arguments.steps)]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *words], check=True, capture_output=True, text=True
        )
        reported = json.loads(done.stdout.splitlines()[-1])
        numbers = (reported["parameters"], reported["peak"], reported["less_imports"], reported["held"])
        print(f"| {name} | {numbers[0]:.1f} | {numbers[1]:.0f} | {numbers[2]:.0f} | {numbers[3]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
