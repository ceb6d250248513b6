"""Tokens per second of sampling: prompts shared, through the library's cache, and transformers' generate, in turns.

python recipes/benchmarks/decode.py --size S --prompt-len 64
With --vllm-python PATH (of an environment with vllm) also a vLLM server on this machine, weights unchanged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from common import make_model, shape_arguments, texts

from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Sampler, SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import VllmSampler
from llm_pg.sampling.vllm.engine import Settings


def main() -> None:
    a = shape_arguments(__doc__, "--vllm-python")
    model, tokenizer = make_model(a.size, a.completion)
    ends = [tokenizer.eos_token_id]
    engines: dict[str, Sampler] = {
        "lean": NativeSampler(model, tokenizer, ends),
        "shared prompts": NativeSampler(model, tokenizer, ends, lean=False),
        "library cache": NativeSampler(model, tokenizer, ends, share_prompts=False),
        "generate": GenerateSampler(model, tokenizer, ends),
    }
    if a.vllm_python:
        settings = Settings(python=a.vllm_python, options={"enforce-eager": True})
        with VllmSampler(model, tokenizer, ends, settings=settings) as server:
            measure(a, tokenizer, engines | {"vllm": server})
    else:
        measure(a, tokenizer, engines)


def measure(a: argparse.Namespace, tokenizer: Any, engines: dict[str, Sampler]) -> None:
    speed: dict[str, list[float]] = {name: [] for name in engines}
    params = SamplingParams(max_completion_length=a.completion)
    for step in range(a.steps + 1):
        ids = [tokenizer(p)["input_ids"] for p in texts(a.prompts, a.prompt_len, step)]
        keys = stream_key(0, step, torch.arange(a.prompts).unsqueeze(1), torch.arange(a.group)).reshape(-1)
        for name, engine in engines.items():
            start = time.perf_counter()
            done = engine.sample(ids, a.group, params, keys)
            speed[name].append(float(done.mask_BT.sum()) / (time.perf_counter() - start))
    base = speed["generate"][1:]
    report = {
        name: {
            "tokens_per_second": statistics.median(v[1:]),
            "range": [min(v[1:]), max(v[1:])],
            "times_generate": statistics.median(x / y for x, y in zip(v[1:], base, strict=True)),
        }
        for name, v in speed.items()
    }
    print(json.dumps(report | {"threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
