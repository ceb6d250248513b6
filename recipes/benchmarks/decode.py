"""Tokens per second of sampling: prompts shared, through the library's cache, and transformers' generate, in turns.

python recipes/benchmarks/decode.py --size S --prompt-len 64
With --others true instead our fastest beside the engines of others: generate, also with a static cache, transformers'
continuous batching, and, with --vllm-python PATH (of an environment with vllm), vLLM as a server on this machine on all
cores, in float32 and bfloat16 (--vllm-eager true: not compiled), weights unchanged. A batch of vLLM goes through HTTP
and is checked, as in training.
With --rows-at-once N instead rows that enter as others end, against batches of N one after the other; --ends-by T: half
of the completions have ended by about T / 2 tokens, whatever --completion.
With --cpu-engines true instead our engine with and without its compiled kernels beside engines that are made for CPUs
(cpu_engines.py); --model FOLDER: of a chat model, prompts of about 46 tokens, instead of random weights; --gguf
FILE,FILE: the same model for llama.cpp; --engine NAME: that engine alone, which is fairer, since the threads of several
in one process disturb each other.
With --static true instead the steps of fixed shapes that a GPU records, here called one by one: as they stand, and the
largest of them compiled (its seconds of compilation are distinguished, and its weights are read as they lie).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import chat_model, make_model, now, questions, shape_arguments, texts
from cpu_engines import CTranslate2, LlamaCpp
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from llm_pg.model.loading import end_token_ids
from llm_pg.sampling import lean as lean_layers
from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingEngine, SamplingParams, joined
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.static.step import Step
from llm_pg.sampling.vllm import VllmSampler
from llm_pg.sampling.vllm.engine import Settings


def main() -> None:
    options = ("--others", "--vllm-python", "--rows-at-once", "--ends-by", "--vllm-eager", "--static")
    a = shape_arguments(__doc__, *options, "--cpu-engines", "--model", "--gguf", "--engine")
    model, tokenizer = chat_model(a.model) if a.model else make_model(a.size, int(a.ends_by or a.completion))
    ends = end_token_ids(model, tokenizer)
    if a.cpu_engines:
        measure(a, tokenizer, made_for_cpus(a, model, tokenizer, ends), base=a.engine or "plain layers, bf16")
        return
    if a.rows_at_once:
        at_once = int(a.rows_at_once)
        refilled = NativeSampler(model, tokenizer, ends, at_once)
        measure(a, tokenizer, {"refilled": refilled, "waves": Waves(refilled, at_once)}, base="waves")
        return
    if a.static:
        static = NativeSampler(model, tokenizer, ends, static=True)
        plain, compiled = NativeSampler(model, tokenizer, ends), Compiled(model, tokenizer, ends)
        measure(a, tokenizer, {"lean": plain, "static": static, "static, compiled": compiled}, base="lean")
        return
    lean, generate = NativeSampler(model, tokenizer, ends), GenerateSampler(model, tokenizer, ends)
    if not (a.others or a.vllm_python):
        library = NativeSampler(model, tokenizer, ends, share_prompts=False)
        shared = NativeSampler(model, tokenizer, ends, lean=False)
        measure(a, tokenizer, {"lean": lean, "shared prompts": shared, "library cache": library, "generate": generate})
        return
    engines: dict[str, SamplingEngine] = {
        "lean": lean,
        "lean, bf16": NativeSampler(model, tokenizer, ends, dtype=torch.bfloat16),
        "generate": generate,
        "generate, static cache": StaticCache(model, tokenizer, ends),
        "generate_batch": ContinuousBatching(copy.deepcopy(model), tokenizer, ends),
    }
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{torch.get_num_threads() - 1}")
    with contextlib.ExitStack() as open_servers:
        for dtype in (torch.float32, torch.bfloat16) if a.vllm_python else ():
            settings = Settings(python=a.vllm_python, dtype=dtype, options={"enforce-eager": a.vllm_eager == "true"})
            server = VllmSampler(model, tokenizer, ends, settings=settings)
            engines[f"vllm, {dtype}"] = open_servers.enter_context(server)
        measure(a, tokenizer, engines)


def made_for_cpus(a: argparse.Namespace, model: Any, tokenizer: Any, ends: Sequence[int]) -> dict[str, SamplingEngine]:
    """Ours, and of the others those that are installed."""
    ours, half = functools.partial(NativeSampler, model, tokenizer, ends), torch.bfloat16
    rows, tokens, pad_id = a.prompts * a.group, a.prompt_len + a.completion, int(tokenizer.pad_token_id)
    makers: dict[str, Callable[[], SamplingEngine]] = {
        "kernels, bf16": functools.partial(ours, dtype=half),
        "plain layers, bf16": functools.partial(ours, dtype=half, compiled=False),
        "kernels, float32": ours,
        "plain layers, float32": functools.partial(ours, compiled=False),
    }
    for kind in ("float32", "int8"):
        makers[f"ctranslate2, {kind}"] = functools.partial(CTranslate2, model, tokenizer, ends, kind)
    for file in a.gguf.split(",") if a.gguf else ():
        makers[f"llama.cpp, {Path(file).stem}"] = functools.partial(LlamaCpp, file, ends, pad_id, rows, tokens)
    if not a.gguf:
        print("llama.cpp: left out, no --gguf", file=sys.stderr)
    engines = {}
    for name, make in makers.items():
        if a.engine not in (None, name):
            continue
        try:
            engines[name] = make()
        except (ImportError, RuntimeError) as error:  # not installed, or it cannot read this model or its tokenizer
            print(f"{name}: left out, {error}", file=sys.stderr)
    return engines


class StaticCache(GenerateSampler):
    """generate with a cache allocated ahead."""

    def _settings(self, params: SamplingParams) -> GenerationConfig:
        settings = super()._settings(params)
        settings.cache_implementation = "static"
        return settings


class ContinuousBatching(GenerateSampler):
    """transformers' continuous batching, a prompt computed once for its group; sampled by its own generator."""

    PAGE = 32  # tokens

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: torch.Tensor
    ) -> Completions:
        tokens = sum(len(ids) + num_generations * params.max_completion_length for ids in prompt_ids)
        settings = GenerationConfig(
            do_sample=True, temperature=params.temperature, top_k=0, top_p=1.0, eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id, max_new_tokens=params.max_completion_length, num_return_sequences=num_generations,
        )  # fmt: skip
        batching = ContinuousBatchingConfig(
            page_size=self.PAGE, num_blocks=2 * tokens // self.PAGE, max_batch_tokens=1024, return_logprobs=True
        )
        outputs = self.model.generate_batch(
            [list(ids) for ids in prompt_ids], settings, continuous_batching_config=batching, warmup=False
        )
        rows = [out.generated_tokens for out in outputs.values()]
        length_B = torch.tensor([len(row) for row in rows])
        tokens_BT = torch.full((len(rows), int(length_B.max())), self.pad_id)
        mask_BT = torch.arange(tokens_BT.shape[1]) < length_B.unsqueeze(1)
        tokens_BT[mask_BT] = torch.tensor([i for row in rows for i in row])
        logp_BT = torch.zeros(mask_BT.shape)
        logp_BT[mask_BT] = torch.tensor([x for out in outputs.values() for x in out.logprobs])
        return Completions(tokens_BT, mask_BT, logp_BT, length_B == params.max_completion_length)


class Compiled:
    """Static steps of which the largest is compiled by inductor; no layout of oneDNN's own, which it cannot read."""

    def __init__(self, model: Any, tokenizer: Any, ends: Sequence[int]) -> None:
        self.engine = NativeSampler(model, tokenizer, ends, static=True)
        assert self.engine.static is not None
        self.engine.static.record = lambda device: self.record
        self.largest: Step | None = None

    def record(self, step: Step) -> Callable[[], None]:
        if self.largest is not None:
            return step
        self.largest = step
        compiled = torch.compile(step.__call__, dynamic=False)

        def first() -> None:
            start = time.perf_counter()
            compiled()
            print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)

        calls = itertools.chain([first], itertools.repeat(compiled))
        return lambda: next(calls)()

    def sample(self, *given: Any) -> Completions:
        with unittest.mock.patch.object(lean_layers, "has_onednn", return_value=False):
            return self.engine.sample(*given)


class Waves:
    """Batches of at most `at_once` completions, each begun when the one before has ended."""

    def __init__(self, engine: NativeSampler, at_once: int) -> None:
        self.engine, self.at_once = engine, at_once

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: torch.Tensor
    ) -> Completions:
        each = self.at_once // num_generations
        parts = []
        for i in range(0, len(prompt_ids), each):
            keys = keys_B[i * num_generations : (i + each) * num_generations]
            parts.append(self.engine.sample(prompt_ids[i : i + each], num_generations, params, keys))
        return joined(parts, self.engine.pad_id)


def measure(a: argparse.Namespace, tokenizer: Any, engines: dict[str, SamplingEngine], base: str = "generate") -> None:
    speed: dict[str, list[float]] = {name: [] for name in engines}
    params = SamplingParams(max_completion_length=a.completion)
    for step in range(a.steps + 1):
        prompts = questions(tokenizer, a.prompts, step) if a.model else texts(a.prompts, a.prompt_len, step)
        ids = [tokenizer(p)["input_ids"] for p in prompts]
        keys = stream_key(0, step, torch.arange(a.prompts).unsqueeze(1), torch.arange(a.group)).reshape(-1)
        for name, engine in engines.items():
            start = now()
            done = engine.sample(ids, a.group, params, keys)
            speed[name].append(float(done.mask_BT.sum()) / (now() - start))
            print(f"batch {step}, {name}: {speed[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    reference = speed[base][1:]
    report = {
        name: {
            "tokens_per_second": statistics.median(v[1:]),
            "each": v[1:],
            "range": [min(v[1:]), max(v[1:])],
            f"times_{base}": [ratio(pairs) for ratio in (statistics.median, min, max)],
        }
        for name, v in speed.items()
        if (pairs := [x / y for x, y in zip(v[1:], reference, strict=True)])
    }
    print(json.dumps(report | {"threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
