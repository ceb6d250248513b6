"""How far the sampler's log-probabilities are from the trainer's, on a real model, by type and by length.

    python recipes/benchmarks/mismatch.py --model FOLDER --lengths 32 128 --prompts 4 --group 4

Chat prompts of GSM8K-like questions are sampled; each token's log-probability by the sampler is compared with that of
the trainer's pass over the same weights: mean and largest distance in nats, and the share of tokens with none. Rows:
the native sampler as it is, `exact_on_policy`, and transformers' `generate` against a forward pass with logits of the
type that autocast gives, which is how TRL's trainer samples and scores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pg.estimators.distributions import token_logp
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.exact import ExactSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import stream_key

TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUESTION = "A shop sells {} pens a day for {} dollars each. How much does it earn in {} days? Explain each step."


def autocast(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def prompt_ids(tokenizer: Any, count: int) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION.format(3 + 2 * i, 2 + i, 4 + i)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for i in range(count)
    ]


def rollouts_of(done: Completions, ids: list[list[int]], group: int) -> TextRollouts:
    rows = len(ids) * group
    return TextRollouts.of_scored_text(
        mask_BT=done.mask_BT, logp_BT=done.logp_BT, tokens_BT=done.tokens_BT, truncated_B=done.truncated_B,
        group_B=torch.arange(len(ids)).repeat_interleave(group), reward_B=torch.rand(rows),
        prompt_ids_B=[tuple(ids[i // group]) for i in range(rows)],
    )  # fmt: skip


def distance(ours: Tensor, theirs: Tensor, mask: Tensor) -> dict[str, float]:
    apart = (ours - theirs).abs()[mask]
    same = float((apart == 0).float().mean())
    return {"mean": float(apart.mean()), "max": float(apart.max()), "same": same, "tokens": float(mask.sum())}


def of_sampler(
    a: argparse.Namespace, model: Any, tokenizer: Any, kind: str, length: int, exact: bool
) -> dict[str, Any]:
    """The native sampler, as it is or exact, against the policy's pass."""
    dtype, params = TYPES[kind], SamplingParams(max_completion_length=length)
    policy = Policy(model, params=params, tokenizer=tokenizer, autocast=lambda: autocast(dtype), exact_on_policy=exact)
    make = ExactSampler if exact else NativeSampler
    sampler = make(model, tokenizer, [tokenizer.eos_token_id], dtype=dtype)
    ids = prompt_ids(tokenizer, a.prompts)
    keys_B = stream_key(0, 1, torch.arange(len(ids)).unsqueeze(1), torch.arange(a.group)).flatten()
    start = time.process_time()
    done = sampler.sample(ids, a.group, params, keys_B)
    sampled = time.process_time()
    scored = policy.logp(rollouts_of(done, ids, a.group), 10**6)
    seconds = {"sample": sampled - start, "score": time.process_time() - sampled}
    return {**distance(done.logp_BT, scored, done.mask_BT), **seconds}


@torch.no_grad()
def of_generate(a: argparse.Namespace, model: Any, tokenizer: Any, kind: str, length: int) -> dict[str, Any]:
    """transformers' generate against a padded forward pass, both under autocast."""
    ids = [row for row in prompt_ids(tokenizer, a.prompts) for _ in range(a.group)]
    width = max(map(len, ids))
    prompts = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    torch.manual_seed(0)
    start = time.process_time()
    with autocast(TYPES[kind]):
        out = model.generate(
            prompts, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
            output_scores=True, return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        sampled = time.process_time()
        tokens = out.sequences[:, width:]
        ended = (tokens == tokenizer.eos_token_id).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (tokens == tokenizer.eos_token_id))
        whole = torch.cat([seen, mask.long()], 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        logits = model(out.sequences, attention_mask=whole, position_ids=positions).logits[:, width - 1 : -1]
    behavior = torch.stack([token_logp(s.float(), tokens[:, t]) for t, s in enumerate(out.scores)], 1)
    seconds = {"sample": sampled - start, "score": time.process_time() - sampled}
    return {**distance(behavior, token_logp(logits.float(), tokens), mask), **seconds}


def with_adapter(model: Any) -> Any:
    """LoRA of rank 8 on all linear layers, moved away from zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=["native", "exact", "generate"], default=["native", "exact"])
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    model = with_adapter(model) if a.lora else model
    for length in a.lengths:
        for kind in a.types:
            for side in a.sides:
                if side == "generate":
                    found = of_generate(a, model, tokenizer, kind, length)
                else:
                    found = of_sampler(a, model, tokenizer, kind, length, side == "exact")
                print(json.dumps({"type": kind, "length": length, "lora": a.lora, "side": side, **found}), flush=True)


if __name__ == "__main__":
    main()
