"""FSDP2 on two gloo ranks: weights in shards train, sample, save and resume as whole ones do."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_pg.config import ConfigError
from llm_pg.config.schema import ModelConfig
from llm_pg.distributed.data_parallel import DataParallel
from llm_pg.distributed.fully_sharded import FullySharded
from llm_pg.distributed.strategy import Outcome
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.model.policy import Policy
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.vllm import EngineError, VllmSampler
from llm_pg.sampling.vllm.engine import Settings
from tests.distributed.sameness import CHANGES, OF_CRITIC, bits, distance, forget_the_last, same_ends, same_steps
from tests.faults.conftest import lines
from tests.faults.tiny_run import SIZES, make
from tests.sampling.fake_vllm import FakeVllm

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_shards_train_save_and_resume_as_whole_weights_do(
    lora: bool, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Four runs on two ranks: whole; sharded; sharded again from its own step 2 and from that of the whole one."""
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    # An adapter's reference cannot move. Without adapters some gradients are 0 but for rounding, which AdamW's division
    # makes whole steps of; this epsilon keeps them small.
    changes = CHANGES if lora else {**CHANGES, **moving, "adam_epsilon": 1e-3}
    for run, env in (("whole", {}), ("shards", FSDP)):
        ended = two_ranks(run, changes=changes, lora=lora, env=env)
        assert ended.status == 0, ended.output
    assert "FSDP2: weights, gradients and moments in shards over 2 ranks" in ended.output
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    same_steps(whole, shards)
    assert distance(shards / "model" / name, whole / "model" / name) < 1e-6
    for file in ("weights.safetensors", "optimizer.safetensors"):
        step = Path("checkpoints") / "step-000004" / file
        assert distance(shards / step, whole / step) < 1e-6
    first = {n: x.clone() for n, x in load_file(shards / "model" / name).items()}
    for run in ("shards", "whole"):
        forget_the_last(tmp_path / run)
        ended = two_ranks(run, changes=changes, lora=lora, env=FSDP, resume=True)
        assert ended.status == 0, ended.output
    again = load_file(shards / "model" / name)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert distance(whole / "model" / name, shards / "model" / name) < 1e-6
    if not lora:
        assert [p.name for p in (shards / "model").glob("*.safetensors")] == [name]
        loaded = AutoModelForCausalLM.from_pretrained(shards / "model").state_dict()
        assert all(torch.equal(loaded[n], x) for n, x in again.items())


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_shards(two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    ended = two_ranks("shards", changes=CHANGES, env=FSDP)
    assert ended.status == 0, ended.output
    make({"out": str(tmp_path), "name": "one", "changes": CHANGES}).train()
    same_steps(tmp_path / "one", tmp_path / "shards")
    forget_the_last(tmp_path / "shards")
    make({"out": str(tmp_path), "name": "shards", "changes": CHANGES}).train(resume=True)
    same_steps(tmp_path / "one", tmp_path / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sigterm", "raise"])
def test_shards_that_are_stopped_go_on_to_the_same_weights(
    fault: str, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """A signal saves the state of its step; an error leaves the newest checkpoint."""
    for run in ("straight", "broken"):
        extra = {"fault": fault, "at": 3} if run == "broken" else {}
        ended = two_ranks(run, changes=CHANGES, env=FSDP, **extra)
        assert (ended.status == 0) == (run == "straight"), ended.output
    kept = sorted(p.parent.name for p in (tmp_path / "broken" / "checkpoints").glob("*/manifest.json"))
    assert kept == (["step-000002", "step-000003"] if fault == "sigterm" else ["step-000002"])
    ended = two_ranks("broken", changes=CHANGES, env=FSDP, resume=True)
    assert ended.status == 0, ended.output
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("straight", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_sharded_models_of_every_family_have_the_gradient_samples_and_reference_of_whole_ones(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("shard_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(worker), str(tmp_path / "out")], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for rank in (0, 1) for line in (tmp_path / f"out.{rank}").read_text().splitlines()]
    assert len(found) == 20
    for line in found:
        assert line["gradient"] < 1e-6, line
        assert line["norm"] > 1, line
        assert line["tokens"], line
        assert max(line["logp"], line["reference"]) < 1e-6, line
        assert line["share"] < 0.51, line


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("has_rows", [False, True])
def test_ranks_without_a_row_that_counts_have_no_gradient_as_one_process_has_none(
    has_rows: bool, group_of_one: None
) -> None:
    """Zeros in its place would let AdamW's moments move the weights of two ranks and not those of one."""
    parameter = torch.nn.Parameter(torch.ones(2))
    strategy = DataParallel("cpu")
    strategy.optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    done = strategy.step([parameter], None, has_rows=has_rows, is_finite=True, spoil=lambda: None)
    assert done == Outcome(grad_norm=0.0, critic_grad_norm=None, stepped=True)
    assert (parameter.tolist() == [1.0, 1.0]) != has_rows


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_run_ends_with_its_best_model(lora: bool, two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing is passed before or after, and a tie keeps the earlier: the first model is the best."""
    best = {
        "eval_steps": 1,
        "eval_on_start": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval/greedy",
    }
    ended = two_ranks("r", changes={**CHANGES, **best, "max_steps": 2}, lora=lora, env=FSDP)
    assert ended.status == 0, ended.output
    assert json.loads((tmp_path / "r" / "best" / "best.json").read_text())["step"] == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert distance(tmp_path / "r" / "model" / name, tmp_path / "r" / "best" / name) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, lora",
    [
        *(({}, False), ({"critic_trunk_gradient": True}, False)),
        *(({"critic_kind": "model"}, False), ({"critic_kind": "model"}, True)),
    ],
    ids=["head", "head and trunk", "model", "model with adapters"],
)
def test_a_critic_in_shards_learns_saves_and_resumes_as_a_whole_one(
    kind: dict[str, Any], lora: bool, two_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """PPO: a step of the critic alone, then both, with rows cut at the limit valued by the critic."""
    changes = {**CHANGES, "beta": 0.0, "critic_warmup_steps": 1, "truncated": "bootstrap", **kind}
    changes["adam_epsilon"] = 1e-3  # else AdamW makes a step of a gradient that is rounding, as an adapter's first are
    for run, env in (("whole", {}), ("shards", FSDP)):
        ended = two_ranks(run, algorithm="ppo", changes=changes, lora=lora, env=env)
        assert ended.status == 0, ended.output
    assert "FSDP2: weights, gradients and moments in shards over 2 ranks" in ended.output
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    same_steps(whole, shards, OF_CRITIC)
    critic = Path("model") / "critic.safetensors"
    same_ends(shards, whole, str(critic), f"model/{'adapter_model' if lora else 'model'}.safetensors")
    first = bits(shards / critic)
    assert len(first) > 2
    forget_the_last(shards)
    ended = two_ranks("shards", algorithm="ppo", changes=changes, lora=lora, env=FSDP, resume=True)
    assert ended.status == 0, ended.output
    assert bits(shards / critic) == first


@pytest.mark.slow
def test_a_warm_start_comes_before_the_cut(two_ranks: Callable[..., Any], demonstrations: str, tmp_path: Path) -> None:
    """The same supervised steps as under DDP, bit for bit, kept as the reference; then shards, and a resume of them."""
    changes = {**CHANGES, "warm_start_steps": 3, "warm_start_data_files": demonstrations}
    for run, env in (("whole", {}), ("shards", FSDP)):
        ended = two_ranks(run, changes=changes, env=env)
        assert ended.status == 0, ended.output
    assert "FSDP2: weights, gradients and moments in shards over 2 ranks" in ended.output
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    start, model = Path("start") / "model.safetensors", Path("model") / "model.safetensors"
    assert bits(whole / start) == bits(shards / start)
    same_steps(whole, shards)
    same_ends(shards, whole, str(model))
    first = bits(shards / model)
    forget_the_last(shards)
    ended = two_ranks("shards", changes=changes, env=FSDP, resume=True)
    assert ended.status == 0, ended.output
    assert bits(shards / model) == first


@pytest.mark.fake
@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_servers_follow_weights_in_shards(lora: bool, two_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """A stand-in for vLLM at each rank: every batch is checked there against the weights gathered for it."""
    tokenizer = character_tokenizer()
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for run, env in (("whole", {}), ("shards", FSDP)):
        model = load_model(ModelConfig(make=SIZES), tokenizer, seed=0)  # type: ignore[call-arg]
        servers = [FakeVllm(copy.deepcopy(model), tokenizer) for _ in range(2)]
        changes = {**CHANGES, "engine": "vllm", "vllm_urls": [server.url for server in servers]}
        ended = two_ranks(run, changes=changes, lora=lora, env=env)
        assert ended.status == 0, ended.output
        assert [server.count("/collective_rpc") for server in servers] == [5, 5]  # the start, updates 1 to 4
        for server in servers:
            server.stop()
    assert "FSDP2: weights, gradients and moments in shards over 2 ranks" in ended.output
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    same_steps(whole, shards)
    same_ends(shards, whole, f"model/{name}")
    assert max(line["sampler_gap"] for line in lines(shards)) < 1e-5


@pytest.mark.fake
@pytest.mark.faults
@pytest.mark.parametrize("lora", [False, True])
def test_a_weight_that_a_server_kept_is_named_under_shards_too(
    lora: bool, group_of_one: None, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """One rank: gathered weights are served, and the model that an explanation needs is made without copying shards."""
    model, stale = make_model(), "model.layers.1.mlp.down_proj.weight"
    server = FakeVllm(copy.deepcopy(model), tokenizer)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    params = SamplingParams(max_completion_length=6)
    policy = Policy(model, params=params, pad_id=0)
    try:
        with VllmSampler(model, tokenizer, [1], settings=Settings(urls=[server.url]), folder=tmp_path) as sampler:
            FullySharded("cpu").shard(policy)
            for skipped in (set(), {stale}):
                server.skips = skipped
                stops = pytest.raises(EngineError, match=f"It still has the old {stale}") if skipped else nullcontext()
                with policy.gathered(), stops:
                    sampler.sample([(4, 5, 6), (7, 8)], 2, params, torch.arange(4))
                assert skipped or sampler.last_gap < 1e-6  # type: ignore[operator]
                with torch.no_grad():
                    for p in policy.parameters():
                        p.mul_(1.5)
    finally:
        server.stop()


def test_parts_of_another_optimiser_than_adamw_are_refused(make_model: Callable[..., Any], group_of_one: None) -> None:
    policy = Policy(make_model(), params=SamplingParams(), pad_id=0)
    strategy = FullySharded("cpu")
    strategy.shard(policy)
    with pytest.raises(ConfigError, match=r"Moments in parts .* those of AdamW, and SGD has others"):
        strategy.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.1), 1.0)
