"""Tokens per second of sampling: prompts shared, through the library's cache, and transformers' generate, in turns.

python recipes/benchmarks/decode.py --size S --prompt-len 64
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from common import make_model, shape_arguments, texts

from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key


def main() -> None:
    a = shape_arguments(__doc__)
    model, tokenizer = make_model(a.size, a.completion)
    ends = [tokenizer.eos_token_id]
    engines = {
        "shared prompts": NativeSampler(model, tokenizer, ends),
        "library cache": NativeSampler(model, tokenizer, ends, share_prompts=False),
        "generate": GenerateSampler(model, tokenizer, ends),
    }
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
            "times_generate": statistics.median(x / y for x, y in zip(v[1:], base, strict=True)),
        }
        for name, v in speed.items()
    }
    print(json.dumps(report | {"threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
