"""The quickstart's model, taught by its own RL-trained self: samples, seconds and memory to 90 %, beside GRPO from the
reward, supervised steps on the teacher's samples, and TRL's DistillationTrainer.

    python recipes/benchmarks/distillation.py --out runs/distillation --seeds 3
    python recipes/benchmarks/distillation.py --out runs/distillation --seeds 0      # the table of what is there

All ways of a seed start from the weights after its warm start, with the same batches of prompts and the same
optimiser and schedule. The teacher is what 100 steps of GRPO made of the same weights; the samples of that are not
counted. Each way is a process of its own, so that peak memory is its own; the ways go in turn, which first changes
with the seed. One JSON line a way and seed is kept, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
import trl
from learning_table import Watch, finished, settings, spread, warm
from transformers import AutoModelForCausalLM

from llm_pg import Policy, PolicyGradientTrainer, Prompts, Sampler
from llm_pg.config import Config
from llm_pg.metrics import peak_memory_mb
from llm_pg.rewards.tally import Scores
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal

TEACHER_STEPS = 100


def teacher(out: Path, seed: int) -> Path:
    """What GRPO makes of the weights after the seed's warm start."""
    config = settings(out, seed, f"teacher-seed{seed}", "warm_start_steps=0", f"max_steps={TEACHER_STEPS}")
    folder = out / f"teacher-seed{seed}" / "model"
    if not (folder / "model.safetensors").exists():
        model, tokenizer = start(out, seed)
        PolicyGradientTrainer(model, args=config, processing_class=tokenizer, terminal=Terminal.silent()).train()
    return folder


def start(out: Path, seed: int) -> tuple[Any, Any]:
    """Model and tokenizer after the warm start."""
    folder = warm(out, seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder / "model")


def by_reinforcement(row: str) -> Callable[[Path, int, int], Watch]:
    def run(out: Path, seed: int, eval_steps: int) -> Watch:
        model, tokenizer = start(out, seed)
        more = [f"algorithm={row}", "warm_start_steps=0"]
        if row != "grpo":
            more += ["beta=0", f"teacher_model_name_or_path={teacher(out, seed)}"]
        config = settings(out, seed, f"{row}-seed{seed}", *more)
        trainer = PolicyGradientTrainer(model, args=config, processing_class=tokenizer, terminal=Terminal.silent())
        watch = Watch(model, tokenizer, trainer.eval_prompts, eval_steps)
        trainer.add_callback(watch)
        trainer.train()
        return watch

    return run


def material(out: Path, seed: int, eval_steps: int) -> tuple[Any, Any, Config, list[dict[str, Any]], Watch]:
    """Model, tokenizer, config, training rows and a watch, for the ways that are not our trainer."""
    model, tokenizer = start(out, seed)
    config = settings(out, seed, "material", "warm_start_steps=0")
    made = PolicyGradientTrainer(model, args=config, processing_class=tokenizer, terminal=Terminal.silent())
    rows = [{"prompt": prompt.text, **prompt.row} for prompt in made.train_prompts]
    return model, tokenizer, config, rows, Watch(model, tokenizer, made.eval_prompts, eval_steps)


def by_supervision(out: Path, seed: int, eval_steps: int) -> Watch:
    """Cross-entropy on fresh samples of the teacher, as many a step as the others sample."""
    model, tokenizer, config, rows, watch = material(out, seed, eval_steps)
    train, params = config.train, SamplingParams(max_completion_length=config.rollout.max_completion_length)
    policy = Policy(model, params=params, tokenizer=tokenizer)
    frozen = AutoModelForCausalLM.from_pretrained(teacher(out, seed))
    sampler = Sampler(Policy(frozen, params=params, tokenizer=tokenizer))
    assert train.prompts_per_step is not None
    prompts = Prompts(rows, tokenizer, per_step=train.prompts_per_step, seed=seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=train.learning_rate, weight_decay=0.0, fused=True)
    schedule = transformers.get_scheduler("linear", optimizer, train.warmup_steps, train.max_steps)
    control = SimpleNamespace(should_training_stop=False)
    for step in range(train.max_steps):
        watch.on_step_begin(None, None, control)
        samples = sampler.sample(prompts[step], config.rollout.num_generations, seed=(seed, step))
        rollouts = samples.scored(Scores([0.0] * len(samples.texts))).rollouts
        loss = -policy.forward(rollouts, with_entropy=False).logp_BT.sum() / rollouts.mask_BT.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        watch.on_step_end(None, SimpleNamespace(global_step=step + 1), control)
        if control.should_training_stop:
            break
    return watch


def by_trl(out: Path, seed: int, eval_steps: int) -> Watch:
    """TRL's: the reverse KL over the whole vocabulary at each sampled token."""
    model, tokenizer, config, rows, watch = material(out, seed, eval_steps)
    train, group = config.train, config.rollout.num_generations
    assert train.prompts_per_step is not None
    frozen = AutoModelForCausalLM.from_pretrained(teacher(out, seed))
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DistillationConfig(
            output_dir=folder, max_steps=train.max_steps, seed=seed, gradient_accumulation_steps=1,
            per_device_train_batch_size=train.prompts_per_step * group, temperature=1.0, use_cpu=True, bf16=False,
            max_completion_length=config.rollout.max_completion_length, learning_rate=train.learning_rate, beta=1.0,
            lr_scheduler_type="linear", warmup_steps=train.warmup_steps, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        data = datasets.Dataset.from_list([row for row in rows for _ in range(group)])
        trl.DistillationTrainer(model, frozen, args, data, processing_class=tokenizer, callbacks=[watch]).train()
    return watch


WAYS: dict[str, Callable[[Path, int, int], Watch]] = {
    "grpo": by_reinforcement("grpo"),
    "opd": by_reinforcement("opd"),
    "opd_token": by_reinforcement("opd_token"),
    "sft": by_supervision,
    "trl": by_trl,
}
NAMES = {
    "grpo": "GRPO, from the reward",
    "opd": "opd, to-go",
    "opd_token": "opd_token, token by token",
    "sft": "supervised, on the teacher's samples",
    "trl": "TRL's DistillationTrainer, beta 1",
}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: medians with ranges over the runs that reached 90 %."""
    out = [
        "| way | reached | steps | samples, thousands | seconds | s a step | peak memory, MB |",
        "|---|" + "--:|" * 6,
    ]
    for way, name in NAMES.items():
        own = [line for line in lines if line["way"] == way]
        reached = [line for line in own if line["steps"]]
        cells = [f"{len(reached)} of {len(own)}", spread([x["steps"] for x in reached], 0)]
        cells += [spread([x["samples"] / 1000 for x in reached], 1), spread([x["seconds"] for x in reached], 1)]
        cells += [spread([x["a_step"] for x in own], 3), spread([x["memory"] for x in own], 0)]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this number less 1")
    parser.add_argument("--eval-steps", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SEED"), help="a single run, in this process")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.one:
        way, seed = a.one[0], int(a.one[1])
        found = WAYS[way](a.out, seed, a.eval_steps).found()
        a_step = 64 * 4  # completions of the quickstart
        samples = None if found["steps"] is None else found["steps"] * a_step
        print(json.dumps({"way": way, "seed": seed, **found, "samples": samples, "memory": peak_memory_mb()}))
        return
    path = a.out / "runs.jsonl"
    done = {(line["way"], line["seed"]) for line in finished(path)}
    for seed in range(a.seeds):
        teacher(a.out, seed)
        turn = seed % len(a.ways)
        for way in [*a.ways[turn:], *a.ways[:turn]]:
            if (way, seed) in done:
                continue
            command = [sys.executable, __file__, "--out", str(a.out), "--eval-steps", str(a.eval_steps)]
            ended = subprocess.run([*command, "--one", way, str(seed)], stdout=subprocess.PIPE, text=True, check=True)
            line = ended.stdout.strip().splitlines()[-1]
            with path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    print(table(finished(path)))


if __name__ == "__main__":
    main()
