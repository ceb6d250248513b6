"""Every row of the table on one task, and TRL's trainer beside it where TRL has the row: steps and seconds to 90 %.

    python recipes/benchmarks/learning_table.py --out runs/learning --seeds 5               # every row, both sides
    python recipes/benchmarks/learning_table.py --out runs/learning --seeds 5 --rows grpo   # one
    python recipes/benchmarks/learning_table.py --out runs/learning --seeds 0               # the table of what is there

The task is the quickstart's. All runs of a seed start from the weights after its warm start and see the same prompts in
batches of the same size; a row has the same optimiser, schedule and KL weight (0.01) on both sides. One callback,
transformers' own kind, watches either trainer: it adds up the seconds of the steps, evaluates every few steps between
them, and ends the run at 90 % of the held-out prompts answered (greedy). TRL gets its whole batch at once, its fastest
setting at this size. Which side goes first alternates with the seed. One JSON line a row and seed is kept, so an
interrupted table goes on.
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
from transformers import AutoModelForCausalLM

from llm_pg import PolicyGradientTrainer, shipped
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import Config, load_config
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from reward_fns.sort_letters import sort_letters

PASS = 0.9
# The rows that TRL has, and the arguments that make its trainer one; `tests/peers` compare their gradients.
TRL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
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
SIDES = ("ours", "trl")
ALONE = [name for name, row in ALGORITHMS.items() if not row.teacher_coef]  # the others: distillation.py


def finished(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; a half-written last one is a run to make again."""
    done = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return done


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median and range of the runs that have a number."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return "-"
    low, middle, high = (f"{v:.{digits}f}" for v in (known[0], statistics.median(known), known[-1]))
    return middle if len(known) == 1 else f"{middle} ({low} to {high})"


def settings(out: Path, seed: int, name: str, *more: str) -> Config:
    given = [
        *(f"seed={seed}", f"output_dir={out}", f"run_name={name}", "overwrite=true", "eval_num_samples=0"),
        *("save_steps=0", "log_completions=0", "noise_steps=0", "eval_on_start=false", "report_seconds=0"),
        *("eval_steps=0", "try_longest_batch=false", *more),
    ]
    return load_config(shipped.find("quickstart.yaml"), given)


def warm(out: Path, seed: int) -> Path:
    """The weights after the warm start, made once a seed."""
    folder = out / f"warm-seed{seed}"
    if not (folder / "start" / "model.safetensors").exists():
        config = settings(out, seed, folder.name, "max_steps=1")
        PolicyGradientTrainer(args=config, terminal=Terminal.silent()).train()
    return folder


class Watch(transformers.TrainerCallback):
    """Of either trainer: the seconds of its steps, its greedy pass rate between them, and an end when it is reached."""

    def __init__(self, model: Any, tokenizer: Any, held_out: Sequence[Any], eval_steps: int) -> None:
        self.sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id])
        self.tokenizer, self.held_out, self.eval_steps = tokenizer, held_out, eval_steps
        self.seconds: list[float] = []
        self.best, self.reached_at = self.rate(), None
        self.before = self.best

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        if state.global_step % self.eval_steps == 0:
            self.best = max(self.best, self.rate())
            if self.best >= PASS:
                self.reached_at = state.global_step
                control.should_training_stop = True

    def rate(self) -> float:
        ids = [self.tokenizer(prompt.text)["input_ids"] for prompt in self.held_out]
        params = SamplingParams(greedy=True, max_completion_length=8)
        done = self.sampler.sample(ids, 1, params, torch.zeros(len(ids), dtype=torch.int64))
        texts = self.tokenizer.batch_decode(
            [tokens[mask].tolist() for tokens, mask in zip(done.tokens_BT, done.mask_BT, strict=True)],
            skip_special_tokens=True,
        )
        words = [prompt.row["letters"] for prompt in self.held_out]
        return statistics.mean(sort_letters(text, word) for text, word in zip(texts, words, strict=True))

    def found(self) -> dict[str, Any]:
        seconds = None if self.reached_at is None else round(sum(self.seconds), 2)
        a_step = round(statistics.median(self.seconds), 4)
        return {
            "before": self.before,
            "best": self.best,
            "steps": self.reached_at,
            "seconds": seconds,
            "a_step": a_step,
        }


def reward(completions: list[str], letters: list[str], **_: Any) -> list[float]:
    return [sort_letters(text, word) for text, word in zip(completions, letters, strict=True)]


def run(side: str, row: str, out: Path, seed: int, eval_steps: int, bf16: bool) -> dict[str, Any]:
    """One training from the weights after the seed's warm start."""
    start = warm(out, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "start", dtype=torch.float32)
    config = settings(out, seed, f"{row}-seed{seed}", f"algorithm={row}", "warm_start_steps=0", f"bf16={bf16}")
    own_model = model if side == "ours" else None  # TRL's run takes only the prompts from ours
    trainer = PolicyGradientTrainer(own_model, args=config, processing_class=tokenizer, terminal=Terminal.silent())
    watch = Watch(model, tokenizer, trainer.eval_prompts, eval_steps)
    if side == "ours":
        trainer.add_callback(watch)
        trainer.train()
        return watch.found()
    make_trainer, make_args, own = TRL[row]
    rows = [{"prompt": prompt.text, **prompt.row} for prompt in trainer.train_prompts]
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(
            output_dir=folder, max_steps=config.train.max_steps, seed=seed, gradient_accumulation_steps=1,
            per_device_train_batch_size=config.train.prompts_per_step * config.rollout.num_generations,
            num_generations=config.rollout.num_generations, temperature=1.0, use_cpu=True, bf16=bf16,
            max_completion_length=config.rollout.max_completion_length, learning_rate=config.train.learning_rate,
            lr_scheduler_type="linear", warmup_steps=config.train.warmup_steps, beta=config.algorithm.beta,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", **own,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        make_trainer(model, reward, args, data, processing_class=tokenizer, callbacks=[watch]).train()
    return watch.found()


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a row: medians with ranges over the runs that reached the mark, and pairwise ratios."""
    out = [
        "| row | reached, ours | TRL | steps, ours | TRL | seconds, ours | TRL | times sooner | s a step, TRL ÷ ours |",
        "|---|" + "--:|" * 8,
    ]
    for row in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == row]
        reached = {side: [x[side] for x in own if side in x and x[side]["steps"]] for side in SIDES}
        both = [x for x in own if "trl" in x]
        cells = [f"{len(reached[side])} of {n}" if (n := sum(side in x for x in own)) else "-" for side in SIDES]
        cells += [
            spread([x[key] for x in reached[side]], d) for key, d in (("steps", 0), ("seconds", 1)) for side in SIDES
        ]
        sooner = [x["trl"]["seconds"] / x["ours"]["seconds"] for x in both if all(x[s]["steps"] for s in SIDES)]
        cells += [spread(sooner, 2), spread([x["trl"]["a_step"] / x["ours"]["a_step"] for x in both], 2)]
        out.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--rows", nargs="+", default=ALONE, choices=ALONE)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this number less 1")
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="both sides under autocast (another --out)")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "runs.jsonl"
    done = {(line["row"], line["seed"]) for line in finished(path)}
    for seed, row in [(s, r) for s in range(a.seeds) for r in a.rows if (r, s) not in done]:
        line: dict[str, Any] = {"row": row, "seed": seed}
        for side in sorted(SIDES if row in TRL else SIDES[:1], reverse=bool(seed % 2)):
            line[side] = run(side, row, a.out, seed, a.eval_steps, a.bf16)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    print(table(finished(path)))


if __name__ == "__main__":
    main()
