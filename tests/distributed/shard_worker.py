"""One of two ranks: gradients, samples and log-probabilities of models in shards beside those of the same models whole.

`python shard_worker.py OUT`; the first rank writes a line of JSON per case.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from llm_pg.config.schema import ModelConfig
from llm_pg.distributed.fully_sharded import FullySharded
from llm_pg.distributed.tensors import whole
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from tests.conftest import FAMILIES

PARAMS = SamplingParams(max_completion_length=5, temperature=0.8)
CASES: list[dict[str, Any]] = [
    *({"family": family} for family in FAMILIES),
    {"family": "llama", "packing": "padded"},
    {"family": "llama", "reshard": False},
    {"family": "qwen3", "checkpointing": True},
    {"family": "llama", "lora": True},
    {"family": "gpt2", "lora": True},
]


def make(case: dict[str, Any], tokenizer: Any) -> Any:
    model = load_model(ModelConfig(make=FAMILIES[case["family"]]), tokenizer, seed=1)
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def rollouts(rank: int) -> TextRollouts:
    """Two groups of two, other ones on each rank, of different lengths."""
    mask_BT = torch.arange(6) < torch.tensor([[6], [3], [4 + rank], [2]])
    made: TextRollouts = TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=torch.zeros(4, 6),
        group_B=torch.tensor([0, 0, 1, 1]),
        reward_B=torch.zeros(4),
        tokens_BT=(torch.arange(24).view(4, 6) * (3 + rank) + 5) % 90,
        prompt_ids_B=[(4, 5, 6 + rank)] * 2 + [(7 + rank, 8)] * 2,
    )
    return made


def gradient(policy: Policy, rows: TextRollouts) -> dict[str, torch.Tensor]:
    """Of two passes added up."""
    for index in torch.arange(4).chunk(2):
        scores = policy.forward(rows.rows(index), entropy_grad=True)
        advantage_BT = torch.linspace(-1, 2, scores.logp_BT.numel()).view_as(scores.logp_BT)
        (scores.logp_BT * advantage_BT + 0.1 * scores.entropy_BT).sum().backward()
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def compare(case: dict[str, Any], rank: int) -> dict[str, Any]:
    tokenizer = character_tokenizer()
    model = make(case, tokenizer)
    policies = [
        Policy(m, params=PARAMS, pad_id=0, with_reference=True, packing=case.get("packing", "auto"))
        for m in (model, copy.deepcopy(model))
    ]
    samplers = [NativeSampler(p.model, tokenizer, [1]) for p in policies]
    for policy in policies:  # trained for a while: the reference is the start, with the adapter off
        torch.manual_seed(0)
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    plain, sharded = policies
    FullySharded("cpu", reshard=case.get("reshard", True)).shard(sharded)
    at_rest = sum(p._local_tensor.numel() for p in sharded.model.parameters())
    expected, found = (gradient(p, rollouts(rank)) for p in policies)
    assert expected.keys() == found.keys()
    for value in expected.values():
        dist.all_reduce(value)
    error, norm = 0.0, 0.0
    for name, value in expected.items():
        error += float((whole(found[name]) - value).square().sum())
        norm += float(value.square().sum())
    keys_B = torch.arange(4) + 100 * rank
    completions = []
    for policy, sampler in zip(policies, samplers, strict=True):
        with policy.gathered():
            completions.append(sampler.sample([(4, 5), (6,)], 2, PARAMS, keys_B))
    one, two = completions
    logps = [p.ref_logp(rollouts(rank), 2) for p in policies]
    return {
        "case": case,
        "gradient": (error / norm) ** 0.5,
        "norm": norm**0.5,
        "tokens": bool(torch.equal(one.tokens_BT, two.tokens_BT)),
        "logp": float((one.logp_BT - two.logp_BT).abs().max()),
        "reference": float((logps[0] - logps[1]).abs().max()),
        "share": at_rest / sum(p.numel() for p in plain.model.parameters()),
    }


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    lines = [json.dumps(compare(case, rank)) for case in CASES]
    Path(f"{out}.{rank}").write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
