"""The engines that keep weights of their own: a process for the native one, a copy of the model for vllm."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import load_model
from llm_pg.rollout.ahead.engines import Frozen
from llm_pg.rollout.ahead.sampler_process import SamplerProcess
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.terminal import Terminal
from tests.conftest import FAMILIES
from tests.faults.conftest import lines
from tests.faults.tiny_run import ahead_by_nothing
from tests.sampling.fake_vllm import FakeVllm


def digit(completion: str, answer: str) -> float:
    return float(completion[:1] == answer) + 0.01 * ord(completion[:1] or "a")


def test_a_frozen_engine_samples_with_the_version_asked_for_and_evaluates_with_the_present_weights(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, params = make_model(), SamplingParams(max_completion_length=4)
    keys_B = torch.arange(8)

    def drawn(sampler: Any) -> list[Any]:
        done = sampler.sample([(5, 6, 7)], 8, params, keys_B)
        return [done.tokens_BT.tolist(), done.logp_BT.tolist()]

    seen = []
    with Frozen(NativeSampler(model, tokenizer, [1]), 2) as engine:  # type: ignore[arg-type]
        for version in range(3):
            engine.keep(version)
            seen.append(drawn(NativeSampler(model, tokenizer, [1])))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
        for version in (1, 2, 1):
            engine.use(version)
            assert drawn(engine) == seen[version]
        engine.use_present()
        assert drawn(engine) == drawn(NativeSampler(model, tokenizer, [1]))
    assert seen[0] != seen[1] != seen[2]


def vllm_run(folder: Path, model: Any, tokenizer: Any, ahead_by: int | None, **changes: Any) -> Any:
    """Three steps over a stand-in for the server; ahead_by 0 = the machinery of sampling ahead, without a lag."""
    server = FakeVllm(copy.deepcopy(model), tokenizer)
    settings = {"run_name": "r", "engine": "vllm", "vllm_urls": [server.url], "max_steps": 3, "prompts_per_step": 4}
    settings |= {"num_generations": 4, "max_completion_length": 4, "num_eval_prompts": 8, "eval_num_samples": 2}
    settings |= {"learning_rate": 1e-2, "use_cpu": True, "reward_in_process": True, "eval_steps": 1, **changes}
    run = GRPOTrainer(
        model=model,
        reward_funcs=digit,
        args=GRPOConfig(str(folder), **settings),
        train_dataset=[{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)],
        processing_class=tokenizer,
        terminal=Terminal(quiet=True),
    )
    with ahead_by_nothing(run) if ahead_by == 0 else contextlib.nullcontext():
        run.train()
    server.stop()
    return run


@pytest.mark.fake
def test_servers_get_the_weights_of_the_batch_and_at_evaluations_the_present_ones(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Every batch and evaluation is checked by the engine against the copy that it follows. With no lag metrics and
    evaluations are those of the synchronous run; with one, the first evaluation is still the same: it follows the same
    first update."""
    told = {}
    for name, ahead_by, k in (("synchronous", None, 0), ("no lag", 0, 0), ("one", None, 1)):
        vllm_run(tmp_path / name, make_model(), tokenizer, ahead_by, max_staleness=k)
        told[name] = lines(tmp_path / name / "r")
    assert [line.pop("staleness") for line in told["no lag"]] == [0, 0, 0]
    assert told["no lag"] == told["synchronous"]
    assert [line.pop("staleness") for line in told["one"]] == [0, 1, 1]
    evaluations = [{k: v for k, v in told[name][0].items() if k.startswith("eval/")} for name in ("synchronous", "one")]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0]
    assert told["one"][1]["sampler_gap"] > 1e-3 > told["synchronous"][1]["sampler_gap"]


@pytest.mark.parametrize("family, dtype", [("qwen2", "bfloat16"), ("gpt2", "float32")])
def test_the_other_process_samples_what_this_one_would(family: str, dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    """Tied embeddings, stop strings, and buffers that a cast of the whole model has rounded."""
    model = load_model(ModelConfig(make=FAMILIES[family], dtype=dtype), tokenizer, seed=0)  # type: ignore[arg-type]
    prompts, params, keys_B = [(5, 6, 7), (8, 9)], SamplingParams(max_completion_length=6, stop=("a",)), torch.arange(8)
    with SamplerProcess(model, tokenizer, [1], None, count=2, log=tmp_path / "log") as apart:
        for version in range(3):
            apart.keep(version)
            apart.use(version)
            here = NativeSampler(model, tokenizer, [1]).sample(prompts, 4, params, keys_B)
            there = apart.sample(prompts, 4, params, keys_B)
            assert all(torch.equal(a, b) for a, b in zip(vars(here).values(), vars(there).values(), strict=True))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.3)


def test_a_model_that_cannot_be_made_from_its_config_is_refused(
    make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model()
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"cannot make LlamaForCausalLM anew .*mlp\.extra"):
        SamplerProcess(model, tokenizer, [1], None, count=2, log=tmp_path / "log")
