"""Seconds until 90 % of the held-out prompts are answered: our trainer and TRL's, from the same weights, over seeds.

    python recipes/benchmarks/time_to_pass_rate.py --out runs/time_to_pass --seeds 5
    python recipes/benchmarks/time_to_pass_rate.py --out runs/time_to_pass --seeds 5 --rows rloo dr_grpo gspo

The task is the quickstart's. Both sides start from the weights after its warm start, see the same prompts in batches
of the same size and have the same row of the table (with a KL weight of 0.01), optimiser and schedule. A greedy
evaluation every few steps is left out of the seconds on both sides. TRL gets its whole batch at once, its fastest
setting at this size.
Which side goes first alternates with the seed. One JSON line a row and seed is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from learning_table import PASS, finished, reached, spread
from transformers import AutoModelForCausalLM

from llm_pg import shipped
from llm_pg.config import Config, load_config
from llm_pg.metrics import read_metrics
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from llm_pg.trainer import PolicyGradientTrainer
from reward_fns.sort_letters import sort_letters

# The rows that TRL has, and the arguments that make its trainer one; `tests/peers` compare their gradients.
ROWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "dapo"}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
    "dr_grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "sapo"}),
}


def settings(out: Path, seed: int, name: str, *more: str) -> Config:
    given = [
        *(f"seed={seed}", f"output_dir={out}", f"run_name={name}", "overwrite=true", "eval_num_samples=0"),
        *("save_steps=0", "log_completions=0", "noise_steps=0", "eval_on_start=false", "report_seconds=0", *more),
    ]
    return load_config(shipped.find("quickstart.yaml"), given)


def warm(out: Path, seed: int) -> Path:
    """The weights after the warm start, made once a seed."""
    folder = out / f"warm-seed{seed}"
    if not (folder / "start" / "model.safetensors").exists():
        trainer = PolicyGradientTrainer(
            args=settings(out, seed, folder.name, "max_steps=1"), terminal=Terminal.silent()
        )
        trainer.train()
    return folder


def ours(row: str, out: Path, seed: int, start: Path, eval_steps: int) -> tuple[int | None, float | None]:
    name = f"ours-{row}-seed{seed}"
    config = settings(out, seed, name, f"algorithm={row}", "warm_start_steps=0", f"eval_steps={eval_steps}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "start", dtype=torch.float32)
    trainer = PolicyGradientTrainer(model, args=config, processing_class=tokenizer, terminal=Terminal.silent())
    summary = trainer.train()
    return reached(read_metrics(trainer.folder.metrics), summary["pass_rate_after"])


class Watch(transformers.TrainerCallback):
    """Seconds of TRL's steps, its greedy pass rate between them, and an end when it is reached."""

    def __init__(self, model: Any, tokenizer: Any, rows: list[dict[str, Any]], eval_steps: int) -> None:
        self.sampler, self.tokenizer, self.rows = (
            NativeSampler(model, tokenizer, [tokenizer.eos_token_id]),
            tokenizer,
            rows,
        )
        self.eval_steps, self.seconds = eval_steps, 0.0
        self.reached: tuple[int | None, float | None] = (None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.begin
        if state.global_step % self.eval_steps == 0 and self.rate() >= PASS:
            self.reached = (state.global_step, round(self.seconds, 2))
            control.should_training_stop = True

    def rate(self) -> float:
        ids = [self.tokenizer(row["prompt"])["input_ids"] for row in self.rows]
        params = SamplingParams(greedy=True, max_completion_length=8)
        done = self.sampler.sample(ids, 1, params, torch.zeros(len(ids), dtype=torch.int64))
        texts = self.tokenizer.batch_decode(
            [tokens[mask].tolist() for tokens, mask in zip(done.tokens_BT, done.mask_BT, strict=True)],
            skip_special_tokens=True,
        )
        return statistics.mean(sort_letters(text, row["letters"]) for text, row in zip(texts, self.rows, strict=True))


def reward(completions: list[str], letters: list[str], **_: Any) -> list[float]:
    return [sort_letters(text, word) for text, word in zip(completions, letters, strict=True)]


def theirs(row: str, out: Path, seed: int, start: Path, eval_steps: int) -> tuple[int | None, float | None]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "start", dtype=torch.float32)
    parts = PolicyGradientTrainer(args=settings(out, seed, f"prompts-seed{seed}"), terminal=Terminal.silent())
    config = parts.config
    rows = [{"prompt": p.text, **p.row} for p in parts.train_prompts]
    held_out = [{"prompt": p.text, **p.row} for p in parts.eval_prompts]
    group, batch = config.rollout.num_generations, config.train.prompts_per_step * config.rollout.num_generations
    watch = Watch(model, tokenizer, held_out, eval_steps)
    make_trainer, make_args, own = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(
            output_dir=folder, max_steps=config.train.max_steps, per_device_train_batch_size=batch, seed=seed,
            gradient_accumulation_steps=1, num_generations=group, temperature=1.0, use_cpu=True, bf16=False,
            max_completion_length=config.rollout.max_completion_length, learning_rate=config.train.learning_rate,
            lr_scheduler_type="linear", warmup_steps=config.train.warmup_steps, beta=config.algorithm.beta,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", **own,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        make_trainer(model, reward, args, data, processing_class=tokenizer, callbacks=[watch]).train()
    return watch.reached


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a row: medians with ranges, and how much sooner on the seeds where both sides reached it."""
    out = [
        "| row | seeds | steps, ours | TRL | seconds, ours | TRL | times sooner | s a step, TRL ÷ ours |",
        "|---|" + "--:|" * 7,
    ]
    for row in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == row]
        both = [x for x in own if x["trl_seconds"] and x["ours_seconds"]]
        sooner = [x["trl_seconds"] / x["ours_seconds"] for x in both]
        a_step = [q * x["ours_steps"] / x["trl_steps"] for q, x in zip(sooner, both, strict=True)]
        columns = (("ours_steps", 0), ("trl_steps", 0), ("ours_seconds", 1), ("trl_seconds", 1))
        numbers = [spread([line[key] for line in own], digits) for key, digits in columns]
        numbers += [spread(sooner, 2), spread(a_step, 2)]
        out.append(f"| {row} | {len(both)} of {len(own)} | " + " | ".join(numbers) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_pass"))
    parser.add_argument("--rows", nargs="+", default=["grpo"], choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--eval-steps", type=int, default=5)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "seeds.jsonl"
    done = {(line["row"], line["seed"]) for line in finished(path)}
    for seed, row in [(s, r) for s in range(a.seeds) for r in a.rows if (r, s) not in done]:
        start = warm(a.out, seed)
        line: dict[str, Any] = {"row": row, "seed": seed}
        for name, side in sorted([("ours", ours), ("trl", theirs)], reverse=bool(seed % 2)):
            line[f"{name}_steps"], line[f"{name}_seconds"] = side(row, a.out, seed, start, a.eval_steps)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    print(table(finished(path)))


if __name__ == "__main__":
    main()
