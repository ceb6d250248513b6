"""A loop of one's own, alone or on two ranks; the first rank saves the weights."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from llm_pg import Algorithm, Learner, Policy, Prompts, Sampler, Scorer
from llm_pg.config.schema import ModelConfig
from llm_pg.distributed.data_parallel import DataParallel
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.sampling.protocol import SamplingParams
from tests.faults.light_rewards import digits
from tests.faults.tiny_run import ROWS, SIZES

PER_STEP, NUM_STEPS = 4, 4


def train(out: Path, rank: int = 0, count: int = 1) -> None:
    tokenizer = character_tokenizer()
    model = load_model(ModelConfig(make=SIZES), tokenizer, seed=0)  # type: ignore[call-arg]
    policy = Policy(model, params=SamplingParams(max_completion_length=4), tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, eps=1e-3)
    strategy = DataParallel("cpu") if count > 1 else None
    learner = Learner(policy, Algorithm("grpo", beta=0.1), optimizer, strategy=strategy)
    prompts, sampler = Prompts(ROWS, tokenizer, per_step=PER_STEP, seed=0), Sampler(policy)
    own = range(PER_STEP)[rank * PER_STEP // count : (rank + 1) * PER_STEP // count]  # whole groups
    with Scorer([digits], in_process=True) as scorer:
        for step in range(NUM_STEPS):
            mine = [prompts[step][place] for place in own]
            learner.update(scorer.score(sampler.sample(mine, 4, seed=(0, step), first_place=own[0])))
    if rank == 0:
        save_file(dict(policy.model.named_parameters()), out)


def train_on_rank(out: Path, rank: int, port: int) -> None:
    """`train` as one of two gloo ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train(out, rank, 2)
    dist.destroy_process_group()
