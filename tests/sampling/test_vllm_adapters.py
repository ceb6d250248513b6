"""Servers that are brought an adapter alone: a stand-in that answers as vLLM 0.32 did, and (-m vllm) a real server.

LLM_PG_TEST_VLLM=1 pytest -m vllm -n 0 tests/sampling/test_vllm_adapters.py
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import load_model
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler
from llm_pg.sampling.vllm.engine import Settings
from tests.distributed.sameness import distance
from tests.faults.tiny_run import SIZES, make
from tests.sampling.fake_vllm import FakeVllm
from tests.sampling.test_vllm_real import pytestmark as real
from tests.sampling.test_vllm_real import vllm_python

__all__ = ["vllm_python"]
PROMPTS, G = [[5, 6, 7], [8, 9, 10, 11]], 3
PARAMS = SamplingParams(max_completion_length=6)


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **changes))


def sample(sampler: VllmSampler, seed: int) -> Any:
    return sampler.sample(PROMPTS, G, PARAMS, stream_key(seed, torch.arange(len(PROMPTS) * G)))


def move(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn_like(p))


@pytest.fixture
def served(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Iterator[Any]:
    """(engine, server, model with an adapter)."""
    base = make_model("qwen2")
    server, model = FakeVllm(copy.deepcopy(base), tokenizer), adapted(base)
    settings = Settings(urls=[server.url], adapters=True)
    with VllmSampler(model, tokenizer, [tokenizer.eos_token_id], settings=settings, folder=tmp_path) as sampler:
        yield sampler, server, model
    server.stop()


@pytest.mark.fake
def test_adapters_reach_a_server_alone_and_its_weights_never_move(served: Any, tmp_path: Path) -> None:
    sampler, server, model = served
    base = {name: x.clone() for name, x in server.model.state_dict().items()}
    for step in range(3):
        sample(sampler, step)
        assert sampler.last_gap < 1e-6
        (name,) = server.adapters
        assert name.endswith(f"-{step + 1}")
        move(model)
    sample(sampler, 3)
    sample(sampler, 4)  # nothing moved between these two
    assert (server.count("/v1/load_lora_adapter"), server.count("/collective_rpc"), sampler.syncs) == (4, 0, 4)
    assert all(torch.equal(base[name], x) for name, x in server.model.state_dict().items())
    written = load_file(tmp_path / "model" / "model.safetensors")  # what a server of one's own starts from
    for name, x in written.items():
        assert torch.equal(x, base[name if name in base else "model.embed_tokens.weight"]), name
    sent = (tmp_path / "adapter-0" / "adapter_model.safetensors").stat().st_size
    assert sent < (tmp_path / "model" / "model.safetensors").stat().st_size


@pytest.mark.fake
@pytest.mark.faults
def test_a_server_that_samples_with_the_adapter_before_is_refused(served: Any) -> None:
    sampler, server, model = served
    sample(sampler, 0)
    (kept,) = server.adapters.values()
    move(model)
    server.fault = lambda server, path, answer: server.adapters.update(dict.fromkeys(server.adapters, kept)) or answer
    with pytest.raises(EngineError, match=r"differ from the trainer's by .* after weight sync 2"):
        sample(sampler, 1)


@pytest.mark.fake
@pytest.mark.slow
def test_a_run_with_adapters_alone_ends_in_the_weights_of_one_that_merges_them(tokenizer: Any, tmp_path: Path) -> None:
    ends = []
    for alone in (False, True):
        server = FakeVllm(load_model(ModelConfig(make=SIZES), tokenizer, seed=0), tokenizer)
        changes = {"engine": "vllm", "vllm_urls": [server.url], "vllm_enable_lora": alone, "adam_epsilon": 1e-3}
        changes |= {"max_steps": 3, "reward_in_process": True, "num_eval_prompts": 2}
        make({"out": str(tmp_path), "name": f"r{alone}", "lora": True, "changes": changes}).train()
        server.stop()
        assert (server.count("/v1/load_lora_adapter"), server.count("/collective_rpc")) == ((4, 0) if alone else (0, 4))
        ends.append(tmp_path / f"r{alone}" / "model" / "adapter_model.safetensors")
    assert distance(*ends) < 1e-6


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_that_a_server_would_read_otherwise_are_refused(
    changes: dict[str, Any], what: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    settings = Settings(urls=["http://127.0.0.1:1"], adapters=True)
    with pytest.raises(ValueError, match=f"this adapter has {what}"):
        VllmSampler(adapted(make_model("llama"), **changes), tokenizer, [1], settings=settings)
    with pytest.raises(ValueError, match="the model has none"):
        VllmSampler(make_model("llama"), tokenizer, [1], settings=settings)


@pytest.mark.parametrize("changes", [{"vllm_mode": "colocate"}, {"max_staleness": 1}])
def test_where_adapters_alone_cannot_be_brought_the_settings_say_so(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="vllm_enable_lora brings adapters to servers"):
        check_values({"engine": "vllm", "vllm_enable_lora": True, **changes})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mark", [pytest.param(None, marks=real)], ids=["real"])
def test_a_real_server_follows_the_adapter(
    mark: None, family: str, vllm_python: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = adapted(make_model(family, **sizes))
    settings = Settings(python=vllm_python, options={"enforce-eager": True, "max-model-len": 64}, adapters=True)
    with VllmSampler(model, tokenizer, [1], settings=settings, folder=tmp_path) as sampler:
        gaps = []
        for step in range(4):
            sample(sampler, step)
            gaps.append(sampler.last_gap)
            move(model)
        print(f"\n{family}: mean |Δ log-probability| {max(gaps):.1e} at most over {sampler.syncs} adapters")
        assert max(gaps) < 1e-5
