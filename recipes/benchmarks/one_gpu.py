"""One command for a machine with one NVIDIA GPU, of at most 8 minutes: is everything right there, and how fast is it?

python recipes/benchmarks/one_gpu.py --json one_gpu.json

Needs torch 2.11 or newer with CUDA and transformers 5.17 or newer, no network and no weights: models are random ones of
real shapes. First what must be right (the native sampler against generate, steps of fixed shapes and their graphs, flex
attention against padding, bfloat16, LoRA, a run that is resumed), then speed, memory and the gap between sampler and
trainer. The JSON file is written after every line of the table, so that nothing measured is lost. What is missing, or
does not fit into --seconds, is left out with the reason. On another device the same is done as far as it goes; --tiny
takes sizes that a CPU can do in a minute. Ends with 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from common import Ours, make_model, now, reward, texts

from llm_pg import GRPOConfig, GRPOTrainer, __version__
from llm_pg.learner.update import Updater
from llm_pg.model.flex import FlexBlocks
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.run.logs.throughput import Work, matmul_rate, tokens_to_train
from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.static.graphs import Captured
from llm_pg.terminal import Terminal

EXACT = 1e-3  # nats in float32 between two ways to the same log-probability, and of a gradient relative to its largest
HALF_GAP = 0.05  # nats a token in bfloat16: above it importance ratios of a completion of 100 tokens mean little


@dataclass(frozen=True)
class Sizes:
    """check: shape of the models that are checked. models: name -> shape of those that are timed. rows: of decoding.
    group: completions of a prompt. prompt, completion: tokens. update: rows of an update. step: rows of a whole step.
    """

    check: str = "S"
    models: tuple[tuple[str, str], ...] = (("0.5B", "L"), ("1.5B", "XL"))
    rows: tuple[int, ...] = (64, 512)
    group: int = 8
    prompt: int = 128
    completion: int = 256
    update: int = 128
    step: int = 64


TINY = Sizes("T", (("tiny", "T"),), (8, 16), 4, 12, 8, 16, 8)


class MissingPart(Exception):
    """Something that a measurement needs is not here."""


class WrongResult(Exception):
    """A check failed."""


class OutOfTime(BaseException):
    """No handler of a library may take it for an error of its own."""


class Report:
    """The table, which is on disk after each of its lines.

    Args:
        path: of the JSON file.
        seconds: of everything together.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.begin, self.seconds = path, time.monotonic(), seconds
        self.rows: list[dict[str, Any]] = []
        self.machine = machine()
        self.write()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def run(self, name: str, needs: float, work: Callable[[], dict[str, Any]]) -> None:
        """One line. needs: seconds it takes at least; with less left it is skipped."""
        begin, row = time.monotonic(), {"name": name}
        if self.left < needs:
            row |= {"result": "skipped", "why": f"{self.left:.0f} s are left, and it takes {needs:.0f} s or more"}
        else:
            row |= self._outcome(work)
        row["seconds"] = round(time.monotonic() - begin, 2)
        self.rows.append(row)
        self.write()
        print(line_of(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _outcome(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def end(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.1))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the table
                return {"result": "ok", **work()}
        except MissingPart as error:
            return {"result": "skipped", "why": str(error)}
        except WrongResult as error:
            return {"result": "wrong", "why": str(error)}
        except OutOfTime:
            return {"result": "skipped", "why": f"the time of {self.seconds:.0f} s ended in the middle of it"}
        except torch.OutOfMemoryError as error:
            return {"result": "skipped", "why": f"it does not fit into memory: {first_line(error)}"}
        except Exception as error:  # noqa: BLE001 - the lines after it are worth having; its traceback is in the file
            why = f"{type(error).__name__}: {first_line(error)}"
            return {"result": "failed", "why": why, "traceback": traceback.format_exc()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def write(self) -> None:
        content = {"machine": self.machine, "seconds": round(time.monotonic() - self.begin, 1), "rows": self.rows}
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(whole, self.path)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def line_of(row: dict[str, Any]) -> str:
    values = {k: v for k, v in row.items() if k not in ("name", "result", "why", "seconds", "traceback")}
    shown = ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return f"{row['name']:<32} {row['result']:<8} {row['seconds']:6.1f} s  {row.get('why') or shown}"


def machine() -> dict[str, Any]:
    on_gpu = common.DEVICE.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else str(common.DEVICE),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "llm_pg": __version__,
    }  # fmt: skip
    if on_gpu:
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise MissingPart(f"{name} is not installed")


# --- what must be right


def prompts_of(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random ones of a few lengths."""
    rows = texts(count, length, seed)
    return [tokenizer(text[: length - i % 3])["input_ids"] for i, text in enumerate(rows)]


def keys_of(prompts: int, group: int) -> torch.Tensor:
    return stream_key(0, 1, torch.arange(prompts).unsqueeze(1), torch.arange(group)).reshape(-1)


def same_tokens(one: Completions, other: Completions) -> dict[str, Any]:
    """The largest difference of log-probabilities; WrongResult where the tokens differ."""
    if one.tokens_BT.shape != other.tokens_BT.shape or not torch.equal(one.tokens_BT, other.tokens_BT):
        width = min(one.tokens_BT.shape[1], other.tokens_BT.shape[1])
        equal = (one.tokens_BT[:, :width] == other.tokens_BT[:, :width]).double().mean()
        raise WrongResult(f"other tokens are sampled: {float(equal):.1%} of the places are equal")
    gap = float((one.logp_BT - other.logp_BT).abs().max())
    if not gap <= EXACT:
        raise WrongResult(f"log-probabilities differ by {gap:.2g} nats")
    return {"rows": len(one.tokens_BT), "tokens": int(one.mask_BT.sum()), "gap_nats": gap}


def native_against_generate(a: Sizes) -> dict[str, Any]:
    model, tokenizer = make_model(a.check, a.completion)
    prompts, params = prompts_of(tokenizer, 8, a.prompt), SamplingParams(greedy=True, max_completion_length=32)
    samplers = [
        NativeSampler(model, tokenizer, [tokenizer.eos_token_id], static=False),
        GenerateSampler(model, tokenizer, [tokenizer.eos_token_id]),
    ]
    return same_tokens(*(sampler.sample(prompts, 1, params, keys_of(8, 1)) for sampler in samplers))


def fixed_shapes(a: Sizes) -> dict[str, Any]:
    model, tokenizer = make_model(a.check, a.completion)
    prompts, params = prompts_of(tokenizer, 8, a.prompt), SamplingParams(max_completion_length=a.completion)
    keys_B, ends = keys_of(8, a.group), [tokenizer.eos_token_id]
    plain = NativeSampler(model, tokenizer, ends, static=False).sample(prompts, a.group, params, keys_B)
    sampler = NativeSampler(model, tokenizer, ends, static=True)
    if sampler.static is None:
        raise WrongResult("steps of fixed shapes were refused; the log says why")
    done = sampler.sample(prompts, a.group, params, keys_B)
    out = same_tokens(plain, done)
    out |= same_tokens(plain, sampler.sample(prompts, a.group, params, keys_B))  # replayed
    if common.DEVICE.type != "cuda":
        return out | {"graphs": f"none on {common.DEVICE.type}"}
    steps = sampler.static.arena.graphs.made.values() if sampler.static.arena is not None else []
    graphs = [s for s in steps if isinstance(s, Captured) and s.replay is not None and s.replay is not s.step]
    if not graphs:
        raise WrongResult("no step was captured as a CUDA graph; the log says why")
    return out | {"graphs": len(graphs)}


def scored(a: Sizes, model: Any, tokenizer: Any, **options: Any) -> tuple[Ours, TextRollouts]:
    """Our side of a step, and sampled rollouts of it."""
    ours = Ours(model, tokenizer, a.group, a.completion, **options)
    return ours, ours.rollouts(texts(max(a.update // a.group, 1), a.prompt, 0), 0)


def flex_against_padded(a: Sizes) -> dict[str, Any]:
    model, tokenizer = make_model(a.check, a.completion)
    ours, rollouts = scored(a, model, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy(model, params=ours.params, pad_id=tokenizer.pad_token_id)
    on_gpu = common.DEVICE.type == "cuda"
    if not on_gpu:
        policy.layout.way = FlexBlocks  # uncompiled
    if policy.layout.way is not FlexBlocks:
        said = [str(w.message) for w in caught if "flex" in str(w.message)]
        raise WrongResult(said[0] if said else "completions are not packed by flex attention")
    padded = Policy(model, params=ours.params, pad_id=tokenizer.pad_token_id, packing="padded")
    weight_BT = torch.linspace(-1, 1, rollouts.mask_BT.numel(), device=common.DEVICE).view(rollouts.mask_BT.shape)
    logps, slopes = [], []
    for side in (policy, padded):
        model.zero_grad()
        with torch.set_grad_enabled(on_gpu):  # elsewhere torch has no gradient of it
            logps.append(side.forward(rollouts).logp_BT)
        if on_gpu:
            (logps[-1] * weight_BT).sum().backward()
            slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    gap = float((logps[0] - logps[1]).detach().abs().max())
    found: dict[str, Any] = {"gap_nats": gap, "gradient_gap": f"not on {common.DEVICE.type}"}
    if on_gpu:
        found["gradient_gap"] = float((slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max())
    if not gap <= EXACT or (on_gpu and not found["gradient_gap"] <= EXACT):
        raise WrongResult(f"log-probabilities and gradients differ too much: {found}")
    return found


def gaps(policy: Policy, rollouts: TextRollouts) -> dict[str, float]:
    """Between the log-probabilities of the sampler and those of the trainer, nats a token."""
    gap_M = (policy.logp(rollouts, 10**6) - rollouts.logp_BT).abs()[rollouts.mask_BT]
    return {"gap_mean_nats": float(gap_M.mean()), "gap_most_nats": float(gap_M.max())}


def half_precision(a: Sizes) -> dict[str, Any]:
    ours, rollouts = scored(a, *make_model(a.check, a.completion), bf16=True)
    found = gaps(ours.policy, rollouts)
    if not found["gap_mean_nats"] <= HALF_GAP:
        raise WrongResult(f"sampler and trainer are {found['gap_mean_nats']:.3g} nats a token apart")
    return found


def lora(a: Sizes) -> dict[str, Any]:
    needs_package("peft")
    from peft import LoraConfig, get_peft_model

    model, tokenizer = make_model(a.check, a.completion)
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).to(common.DEVICE)
    ours, rollouts = scored(a, adapted, tokenizer)
    found = gaps(ours.policy, rollouts)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(ours.policy.parameters(), lr=1e-3)
    updater = Updater(ours.policy, ours.algorithm, optimizer, ours.updater.scheduler, micro_rows=10**6)
    updater.update(ours.algorithm.compute_advantages(rollouts), torch.arange(len(rollouts.mask_BT)).unsqueeze(0))
    moved = [name for name, p in adapted.named_parameters() if not torch.equal(p.detach(), before[name])]
    if not found["gap_most_nats"] <= EXACT:
        raise WrongResult(f"sampler and trainer are {found['gap_most_nats']:.2g} nats apart")
    if not moved or any("lora_" not in name for name in moved):
        raise WrongResult(f"an update moved {len(moved)} weights, among them {moved[:1]}")
    return found | {"weights_moved": len(moved)}


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def resume(a: Sizes) -> dict[str, Any]:
    """Two runs of four steps, one of them stopped after the second and resumed."""

    def trainer(folder: str, *callbacks: Any) -> GRPOTrainer:
        model, tokenizer = make_model(a.check, a.completion)
        config = GRPOConfig(
            folder, run_name="r", max_steps=4, save_steps=2, per_device_train_batch_size=16, num_generations=4,
            max_completion_length=8, eval_strategy="no", learning_rate=1e-3, reward_in_process=True, report_seconds=0,
            disable_tqdm=True, use_cpu=common.DEVICE.type == "cpu",
        )  # fmt: skip
        rows = [{"prompt": text} for text in texts(32, a.prompt, 1)]
        return GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer,
            callbacks=list(callbacks), terminal=Terminal(quiet=True),
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(f"{folder}/whole")
        whole.train()
        trainer(f"{folder}/cut", StopAt(2)).train()
        cut = trainer(f"{folder}/cut")
        cut.train(resume=True)
        pairs = zip(whole.policy.model.parameters(), cut.policy.model.parameters(), strict=True)
        gap = max(float((one - other).detach().abs().max()) for one, other in pairs)
    if not gap <= 1e-5:  # a GPU adds up in any order
        raise WrongResult(f"the weights of a resumed run are {gap:.2g} from those of a run that was not stopped")
    return {"weight_gap": gap}


# --- how fast


def decode(a: Sizes, shape: str, rows: int) -> dict[str, Any]:
    model, tokenizer = make_model(shape, a.completion)
    sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id], dtype=torch.bfloat16)
    params, prompts = SamplingParams(max_completion_length=a.completion), rows // a.group
    speeds = []
    for number in range(3):
        ids, begin = prompts_of(tokenizer, prompts, a.prompt, number), now()
        done = sampler.sample(ids, a.group, params, keys_of(prompts, a.group))
        speeds.append(float(done.mask_BT.sum()) / (now() - begin))
    return {
        "tokens_per_second": max(speeds[1:]), "first": speeds[0], "fixed_shapes": sampler.static is not None,
        "memory_mb": common.peak_mb(),
    }  # fmt: skip


def update(a: Sizes, shape: str) -> dict[str, Any]:
    model, tokenizer = make_model(shape, a.completion)
    ours, rollouts = scored(a, model, tokenizer, bf16=True)
    batch, order = ours.algorithm.compute_advantages(rollouts), torch.arange(len(rollouts.mask_BT)).unsqueeze(0)
    found = gaps(ours.policy, rollouts)
    if common.DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(4):
        begin = now()
        ours.updater.update(batch, order)
        seconds.append(now() - begin)
    best = min(seconds[1:])
    tokens = tokens_to_train(rollouts.prompt_ids_B, int(rollouts.mask_BT.sum()))
    work = Work(model, matmul_rate(common.DEVICE, torch.bfloat16))
    return {
        "tokens_per_second": tokens / best, "mfu": work.utilisation(tokens, best), "first_s": seconds[0],
        "memory_mb": common.peak_mb(), "layout": str(getattr(ours.policy.layout, "name", "")), **found,
    }  # fmt: skip


def against_trl(a: Sizes, shape: str) -> dict[str, Any]:
    needs_package("trl")
    from accelerate.state import AcceleratorState
    from vs_trl import run_trl

    AcceleratorState._reset_state()  # that of the run that was resumed computes in float32

    warm_up, steps = 1, 3
    count = max(a.step // a.group, 1)
    options = argparse.Namespace(size=shape, model=None, prompts=count, group=a.group, completion=a.completion)
    options.warm_up, options.prompt_len = warm_up, a.prompt
    batches = [texts(count, a.prompt, seed) for seed in range(warm_up + steps)]
    ours = Ours(*make_model(shape, a.completion), a.group, a.completion, bf16=True)
    run = run_trl(options, "bf16", warm_up + steps, ours, batches)
    pairs = list(zip(run.trl, run.mine, strict=True))[warm_up:]
    ratios = [trl["step"] / trl["tokens"] / (mine["step"] / mine["tokens"]) for trl, mine in pairs]
    return {
        "times_trl": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "ours_s": statistics.median(m["step"] for _, m in pairs),
        "trl_s": statistics.median(t["step"] for t, _ in pairs),
        "ours_generate_s": statistics.median(m["generate"] for _, m in pairs),
        "trl_generate_s": statistics.median(t["generate"] for t, _ in pairs),
    }  # fmt: skip


def quickstart(a: Sizes, left: float) -> dict[str, Any]:
    if a is TINY:
        raise MissingPart("--tiny leaves it out: it takes a CPU a minute or more")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llm_pg", "quickstart", "--quiet", f"output_dir={folder}"]
        begin = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1.0), check=False)
        except subprocess.TimeoutExpired:
            raise MissingPart(f"it was not done in the {left:.0f} s that were left") from None
    if done.returncode:
        raise WrongResult(f"it ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}")
    return {"quickstart_s": time.monotonic() - begin}


def measure(report: Report, a: Sizes) -> None:
    """The table, what matters most first."""
    scale = 0.0 if a is TINY else 1.0
    for name, check in (
        ("native against generate", native_against_generate), ("fixed shapes, graphs", fixed_shapes),
        ("flex against padded", flex_against_padded), ("bfloat16", half_precision), ("LoRA", lora), ("resume", resume),
    ):  # fmt: skip
        report.run(name, 10 * scale, lambda check=check: check(a))
    for model, shape in a.models:
        for rows in a.rows:
            report.run(f"decode, {model}, {rows} rows", 15 * scale, lambda s=shape, r=rows: decode(a, s, r))
        report.run(f"update, {model}, {a.update} rows", 20 * scale, lambda s=shape: update(a, s))
    model, shape = a.models[0]
    report.run(f"step against TRL, {model}", 60 * scale, lambda: against_trl(a, shape))
    report.run("quickstart", 20 * scale, lambda: quickstart(a, report.left - 5))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("one_gpu.json"), help="file for the numbers")
    parser.add_argument("--seconds", type=float, default=480.0, help="of everything together")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    given = parser.parse_args(arguments)
    report = Report(given.json, given.seconds)
    print(json.dumps(report.machine))
    measure(report, TINY if given.tiny else Sizes())
    counts = {r: sum(row["result"] == r for row in report.rows) for r in ("ok", "skipped", "wrong", "failed")}
    print(f"{', '.join(f'{n} {r}' for r, n in counts.items())}, in {given.seconds - report.left:.0f} s: {given.json}")
    return int(counts["wrong"] + counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
