"""A real chat model learns arithmetic in words, and TRL's trainer beside it on the same work: seconds to a pass rate.

    python recipes/benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --seeds 0 1 2    # both sides
    python recipes/benchmarks/real_model.py --model FOLDER --sides ours --goal 0.6               # one side

Settings, prompts and the reward function are those of configs/arithmetic_smollm2.yaml for both sides. TRL gets the same
prompts as rendered text, the same algorithm (its `loss_type="dapo"`, deviations of the group, beta 0), optimiser,
schedule, length limit and bfloat16 autocast, and the whole batch of a step at once, its fastest setting here. One
callback watches either trainer: it adds up the seconds of the steps, evaluates greedily on the held-out prompts between
them (not counted), and ends the run at the goal. The sides run one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pg import PolicyGradientTrainer, shipped
from llm_pg.config import Config, load_config
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from reward_fns.text import number_match

SIDES = ("ours", "trl")


class Watch(transformers.TrainerCallback):
    """Of either trainer: the seconds of its steps, its greedy pass rate between them, and an end at the goal."""

    def __init__(self, model: Any, tokenizer: Any, held_out: list[Any], *, max_length: int, every: int, goal: float):
        ends = [tokenizer.eos_token_id]
        self.sampler = NativeSampler(model, tokenizer, ends, dtype=torch.bfloat16)
        self.params = SamplingParams(greedy=True, max_completion_length=max_length)
        self.tokenizer, self.held_out, self.every, self.goal = tokenizer, held_out, every, goal
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = [(0, 0.0, self.rate())]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        if state.global_step % self.every == 0 or state.global_step == args_max_steps(args):
            self.curve.append((state.global_step, round(sum(self.seconds), 1), self.rate()))
            print(f"  step {state.global_step}, {sum(self.seconds):.0f} s: {self.curve[-1][2]:.1%}", flush=True)
            control.should_training_stop = self.curve[-1][2] >= self.goal

    def rate(self) -> float:
        """Share of the held-out prompts answered, greedily."""
        ids = [list(prompt.ids) for prompt in self.held_out]
        done = self.sampler.sample(ids, 1, self.params, torch.zeros(len(ids), dtype=torch.int64))
        texts = self.tokenizer.batch_decode(
            [tokens[mask].tolist() for tokens, mask in zip(done.tokens_BT, done.mask_BT, strict=True)],
            skip_special_tokens=True,
        )
        answers = [prompt.row["answer"] for prompt in self.held_out]
        return statistics.mean(number_match(text, answer) for text, answer in zip(texts, answers, strict=True))

    def found(self) -> dict[str, Any]:
        """Step and seconds to each mark (None where it was not reached), the best rate and a step's median seconds."""
        marks = {
            f"to_{mark:.0%}": next(((step, sec) for step, sec, rate in self.curve if rate >= mark), None)
            for mark in (0.4, 0.5, 0.6)
        }
        a_step = round(statistics.median(self.seconds), 2)
        return {"curve": self.curve, **marks, "best": max(rate for *_, rate in self.curve), "a_step": a_step}


def args_max_steps(args: Any) -> int:
    """max_steps of either trainer's arguments."""
    return int(args.train.max_steps if isinstance(args, Config) else args.max_steps)


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [number_match(text, right) for text, right in zip(completions, answer, strict=True)]


def run(side: str, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """One training of one side, from the model as released."""
    out = a.out / f"{side}-seed{seed}"
    given = [
        *(f"model_name_or_path={a.model}", f"seed={seed}", f"output_dir={a.out}", f"run_name={out.name}"),
        *("overwrite=true", "eval_steps=0", "eval_on_start=false", "save_steps=0", "log_completions=0"),
        *("noise_steps=0", "report_seconds=0", "try_longest_batch=false", "use_cpu=true", *a.settings),
    ]
    config = load_config(shipped.find("arithmetic_smollm2.yaml"), given)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    own_model = model if side == "ours" else None  # TRL's run takes only the prompts from ours
    trainer = PolicyGradientTrainer(own_model, args=config, processing_class=tokenizer, terminal=Terminal.silent())
    length = config.rollout.max_completion_length
    watch = Watch(model, tokenizer, trainer.eval_prompts, max_length=length, every=a.every, goal=a.goal)
    if side == "ours":
        trainer.add_callback(watch)
        trainer.train()
        return watch.found()
    rows = [{"prompt": prompt.text, "answer": prompt.row["answer"]} for prompt in trainer.train_prompts]
    del trainer
    train = config.train
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, max_steps=train.max_steps, seed=seed, gradient_accumulation_steps=1,
            per_device_train_batch_size=(train.prompts_per_step or 0) * config.rollout.num_generations,
            num_generations=config.rollout.num_generations, temperature=1.0, use_cpu=True, bf16=train.bf16,
            max_completion_length=length, learning_rate=train.learning_rate, loss_type="dapo",
            lr_scheduler_type=train.lr_scheduler_type, warmup_steps=train.warmup_steps, beta=0.0,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        trl.GRPOTrainer(model, reward, args, data, processing_class=tokenizer, callbacks=[watch]).train()
    return watch.found()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--goal", type=float, default=2.0, help="pass rate that ends a run; over 1 = never")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes of the config, for both sides")
    a = parser.parse_intermixed_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        for side in a.sides:
            print(f"{side}, seed {seed}", flush=True)
            line = {"side": side, "seed": seed, **run(side, seed, a)}
            with (a.out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
