"""Models, prompts and our step, shared by the benchmarks. Random weights: only the shapes matter for speed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.learner.update import Updater
from llm_pg.metrics import peak_memory_mb
from llm_pg.model.loading import character_tokenizer, disable_dropout
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key

SHAPES = {
    "T": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 512},
    "S": {"hidden_size": 256, "intermediate_size": 683, "num_hidden_layers": 6, "num_attention_heads": 4,
          "num_key_value_heads": 4, "vocab_size": 512},
    "M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
          "num_key_value_heads": 3, "vocab_size": 49_152},
    "L": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
          "num_key_value_heads": 2, "vocab_size": 151_936},
    "XL": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "vocab_size": 151_936},
}  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# All of an optimiser's work, and no drift: at 1e-6 a few steps make nearly all completions as long as the limit.
LEARNING_RATE = 1e-9
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def shape_arguments(description: str | None, *paths: str) -> argparse.Namespace:
    """The command line of the scripts that measure one phase: sizes in tokens, rows, steps; `paths`: more options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=list(SHAPES), default="S")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    for path in paths:
        parser.add_argument(path)
    return parser.parse_args()


def make_model(size: str, completion: int, seed: int = 0, **changes: int) -> tuple[Any, Any]:
    """A Llama of that shape, but for `changes`, whose completions end by the end token after about half of
    `completion` tokens."""
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", **{**SHAPES[size], **changes}, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    here = DEVICE if DEVICE.type == "cuda" else torch.device("cpu")  # a billion random numbers take a CPU a minute
    with here:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    disable_dropout(model)
    with torch.no_grad(), here:  # a coordinate that is the same everywhere stands in for a bias of the end token
        weight = model.get_input_embeddings().weight
        weight[:, 0] = 0.3
        hidden = model.base_model(torch.randint(3, 90, (4, 32))).last_hidden_state
        hazard = 1.6 / completion
        logits = hidden @ weight.T
        odds = torch.tensor(hazard / (1 - hazard)).log() + logits.logsumexp(-1).mean()
        weight[tokenizer.eos_token_id, 0] += (odds - logits[..., tokenizer.eos_token_id].mean()) / hidden[..., 0].mean()
    return model.to(DEVICE), tokenizer


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def texts(count: int, length: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return ["".join(LETTERS[i] for i in torch.randint(26, (length,), generator=g)) for _ in range(count)]


def chat_model(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def questions(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Sums in words, in the chat template."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x, y = (int(torch.randint(100, (), generator=g)) for _ in range(2))
        text = f"Add {x} and {y}. Say how you do it in one sentence, then give the sum."
        message = [{"role": "user", "content": text}]
        made.append(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    return made


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Share of even ids: any number that differs between completions."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Ours:
    """One GRPO step as the trainer makes it, without its files; seconds and tokens by phase.

    Args: as those of the config; `packing` and `micro_rows` of the update.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        group: int,
        completion: int,
        *,
        packing: str = "auto",
        micro_rows: int = 10**6,
        bf16: bool = False,
    ) -> None:
        self.tokenizer, self.group = tokenizer, group
        self.params = SamplingParams(max_completion_length=completion)
        dtype = torch.bfloat16 if bf16 else None
        self.sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id], dtype=dtype)
        autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16) if bf16 else contextlib.nullcontext
        self.policy = Policy(
            model, params=self.params, pad_id=tokenizer.pad_token_id, packing=packing, autocast=autocast
        )
        self.algorithm = Algorithm(ALGORITHMS["grpo"], completion)
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, fused=True)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        self.updater = Updater(self.policy, self.algorithm, optimizer, scheduler, micro_rows=micro_rows)
        self.seconds: dict[str, float] = defaultdict(float)

    def rollouts(self, prompts: Sequence[str], step: int) -> TextRollouts:
        ids = [self.tokenizer(p)["input_ids"] for p in prompts]
        keys = stream_key(0, step, torch.arange(len(ids)).unsqueeze(1), torch.arange(self.group)).reshape(-1)
        done = self.sampler.sample(ids, self.group, self.params, keys)
        completions = [row[mask].tolist() for row, mask in zip(done.tokens_BT, done.mask_BT, strict=True)]
        return TextRollouts.of_scored_text(
            mask_BT=done.mask_BT, logp_BT=done.logp_BT, tokens_BT=done.tokens_BT, truncated_B=done.truncated_B,
            group_B=torch.arange(len(ids), device=DEVICE).repeat_interleave(self.group),
            reward_B=torch.tensor(reward(completions), device=DEVICE),
            prompt_ids_B=[tuple(ids[i // self.group]) for i in range(len(completions))],
        )  # fmt: skip

    def step(self, prompts: Sequence[str], step: int) -> dict[str, float]:
        start = now()
        self.updater.strategy.zero_grad()  # as the trainer does before it samples
        rollouts = self.rollouts(prompts, step)
        sampled = now()
        batch = self.algorithm.compute_advantages(rollouts)
        self.updater.update(batch, torch.arange(len(rollouts.mask_BT)).unsqueeze(0))
        end = now()
        tokens = float(rollouts.mask_BT.sum())
        return {"generate": sampled - start, "update": end - sampled, "step": end - start, "tokens": tokens}


def rates() -> dict[str, float]:
    """What this machine gives at this moment: GEMM rate (FLOP/s; on a CPU float32 and 1024 rows, on a GPU bfloat16 and
    8192) and copy rate (bytes/s)."""
    on_gpu = DEVICE.type == "cuda"
    n, kind = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = torch.randn(n, n // 2, dtype=kind, device=DEVICE), torch.randn(n // 2, n, dtype=kind, device=DEVICE)
    source, target = (torch.ones(1 << (28 if on_gpu else 24), device=DEVICE) for _ in range(2))

    def best(work: Any) -> float:
        times = []
        for _ in range(8):
            start = now()
            work()
            times.append(now() - start)
        return min(times)

    gemm = n**3 / best(lambda: a @ b)
    return {"gemm": gemm, "bytes": 2 * source.nbytes / best(lambda: target.copy_(source))}


def floor(
    size: str, prompts: int, group: int, length: int, tokens: float, steps: int, rate: dict[str, float]
) -> dict[str, float]:
    """Seconds below which no step of this work can come: 2 FLOPs a parameter and token forward, 4 backward; each
    prompt once, each live token once; a decoding step reads the weights, and the keys and values of what came before
    (the prompts' once a group, the completions' as if all were as long as their mean)."""
    shape = SHAPES[size]
    d, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
    body = layers * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate_size"])
    head = shape["vocab_size"] * d
    all_tokens = prompts * length + tokens
    forward = 2 * (body * all_tokens + head * tokens)
    mean = tokens / (prompts * group)
    cache = 2 * 4 * kv * layers * (prompts * length * mean + tokens * mean / 2)
    decode = max(forward / rate["gemm"], (steps * 4 * (body + head) + cache) / rate["bytes"])
    return {"generate": decode, "update": 3 * forward / rate["gemm"], "step": decode + 3 * forward / rate["gemm"]}


def peak_mb() -> float:
    """Peak memory of the GPU's allocator, or on a CPU resident memory of this process. (getrusage's begins with that of
    the process that started this one.)"""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_mb()
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
