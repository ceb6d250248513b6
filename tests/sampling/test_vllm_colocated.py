"""vLLM in the trainer's process against a stand-in for it; `test_vllm_colocated_real.py` has the real one."""

import copy
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import Config, ConfigError
from llm_pg.config.load import load_config
from llm_pg.metrics import read_metrics
from llm_pg.run.before.preflight import check_inputs
from llm_pg.run.engines import vllm_settings
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler, colocated
from llm_pg.sampling.vllm.settings import Settings
from llm_pg.terminal import Terminal
from tests.sampling.fake_llm import Module
from tests.sampling.fake_vllm import FakeVllm

pytestmark = pytest.mark.fake

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
G = 3
PARAMS = SamplingParams(max_completion_length=6)

Start = Callable[..., tuple[VllmSampler, Module, Any]]


def install(monkeypatch: pytest.MonkeyPatch, module: Module) -> Module:
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", module.distributed)
    return module


@pytest.fixture
def start(make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(fault, family=, **settings): the engine, the module it runs on, and the model in training."""
    with ExitStack() as stack:

        def make(fault: Any = None, family: str = "llama", **settings: Any) -> tuple[VllmSampler, Module, Any]:
            def untied() -> Any:
                return make_model(family, seed=9, tie_word_embeddings=False)

            module = install(monkeypatch, Module(untied, tokenizer, fault))
            model = make_model(family)
            where = Settings(colocated=True, **settings)
            sampler = VllmSampler(model, tokenizer, [tokenizer.eos_token_id], settings=where, folder=tmp_path)
            return stack.enter_context(sampler), module, model

        yield make


def sample(sampler: VllmSampler, params: SamplingParams = PARAMS, seed: int = 0) -> Any:
    return sampler.sample(PROMPTS, G, params, stream_key(seed, torch.arange(len(PROMPTS) * G)))


def move(model: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * p.std() * torch.randn_like(p))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_completions_are_those_of_a_server_for_the_same_keys(start: Start, tokenizer: Any, family: str) -> None:
    """qwen2 is tied: vLLM's model has a head of its own, which gets the embedding's weights."""
    sampler, module, model = start(family=family)
    server = FakeVllm(copy.deepcopy(model), tokenizer)
    with VllmSampler(model, tokenizer, [1], settings=Settings(urls=[server.url])) as other:
        for params in (PARAMS, SamplingParams(temperature=0.7, top_k=9, max_completion_length=5)):
            here, there = sample(sampler, params), sample(other, params)
            assert torch.equal(here.tokens_BT, there.tokens_BT)
            assert torch.allclose(here.logp_BT, there.logp_BT, atol=1e-6)
            assert torch.equal(here.truncated_B, there.truncated_B)
    server.stop()
    assert "lm_head.weight" in dict(module.calls)["reload_weights"]


def test_weights_are_given_when_they_changed_and_only_then(start: Start) -> None:
    sampler, module, model = start()
    sample(sampler)
    sample(sampler)
    move(model)
    sample(sampler)
    given = ["reload_weights", "reset_prefix_cache", "generate"]
    assert module.names() == ["LLM", *given, "generate", *given]
    assert sampler.syncs == 2
    assert sampler.last_gap is not None
    assert sampler.last_gap < 1e-6


def test_asleep_it_holds_nothing_between_two_batches(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are mapped before they are written, keys and values after, and both are gone before the update."""
    monkeypatch.setattr(colocated, "check_colocated", lambda *_: None)
    monkeypatch.setattr("llm_pg.sampling.vllm.engine.check_colocated", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sampler, module, _ = start(sleep=True)
    assert module.calls[-1] == ("sleep", 2)
    for _ in range(2):
        del module.calls[:]
        sample(sampler)
        assert [c for c in module.calls if c[0] in ("wake_up", "sleep")] == [
            ("wake_up", ["weights"]),
            ("wake_up", ["kv_cache"]),
            ("sleep", 2),
        ]
        assert module.names() == ["wake_up", "reload_weights", "wake_up", "reset_prefix_cache", "generate", "sleep"]
        assert sampler.last_gap is not None
        assert sampler.last_gap < 1e-6


def test_sleep_on_a_cpu_is_refused(start: Start) -> None:
    with pytest.raises(ValueError, match="gives back a GPU's memory, and the model is on cpu"):
        start(sleep=True)


def test_the_processs_generators_and_threads_are_left_alone(start: Start) -> None:
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.set_num_threads
    sampler, module, _ = start()
    sample(sampler)
    assert module.names()[-1] == "generate"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.set_num_threads is threads


def test_the_engine_ends_with_the_sampler(start: Start) -> None:
    sampler, module, _ = start()
    sample(sampler)
    sampler.__exit__()
    assert module.names()[-2:] == ["shutdown", "cleanup"]
    sample(sampler)  # a second one, by itself
    assert module.names().count("LLM") == 2


@pytest.mark.faults
@pytest.mark.parametrize("stale", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_weight_that_it_kept_is_named(start: Start, monkeypatch: pytest.MonkeyPatch, stale: str) -> None:
    sampler, _, model = start()
    sample(sampler)
    real, old = colocated.stream, {name: x.clone() for name, x in model.state_dict().items()}

    def without(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, old[name] if name == stale else x) for name, x in real(model, dtype))

    monkeypatch.setattr(colocated, "stream", without)
    move(model)
    with pytest.raises(
        EngineError, match=rf"vLLM in this process .* after weight sync 2\. It still has the old {stale}"
    ):
        sample(sampler)


@pytest.mark.faults
def test_of_a_model_too_large_to_remember_no_weight_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, _, model = start()
    monkeypatch.setattr(sampler.host.lately, "limit", 10)  # type: ignore[union-attr]
    sample(sampler)
    monkeypatch.setattr(colocated, "stream", lambda *_: iter(()))
    monkeypatch.setattr(type(model), "load_state_dict", lambda *_: None)
    move(model)
    with pytest.raises(EngineError, match=r"differ from the trainer's by .* Its log names the weights"):
        sample(sampler)


@pytest.mark.faults
@pytest.mark.parametrize("call, what", [("reload_weights", "take the weights over"), ("generate", "complete the prom")])
def test_what_vllm_raises_ends_the_run_in_a_paragraph(start: Start, call: str, what: str) -> None:
    def fault(name: str) -> None:
        if name == call:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB\n on a device of 10")

    sampler, _, _ = start(fault)
    with pytest.raises(EngineError, match=rf"could not {what}.*20 GiB on a.* Lower vllm_gpu_memory_util.*engine\.log"):
        sample(sampler)


@pytest.mark.faults
def test_an_engine_that_cannot_be_made_is_told_with_its_log(start: Start) -> None:
    def fault(name: str) -> None:
        if name == "LLM":
            raise RuntimeError("No available memory for the cache blocks")

    threads = torch.set_num_threads
    with pytest.raises(EngineError, match=r"could not be started: No available memory.*engine\.log"):
        start(fault)
    assert torch.set_num_threads is threads


@pytest.mark.faults
def test_an_answer_without_log_probabilities_ends_the_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, module, _ = start()
    real = module.LLM.generate

    def silent(self: Any, *given: Any, **more: Any) -> Any:
        outputs = real(self, *given, **more)
        for output in outputs:
            for one in output.outputs:
                one.logprobs = None
        return outputs

    monkeypatch.setattr(module.LLM, "generate", silent)
    with pytest.raises(EngineError, match="without log-probabilities"):
        sample(sampler)


def quick(*changes: str) -> Config:
    return load_config(ROOT / "configs" / "quickstart.yaml", ["engine=vllm", "vllm_mode=colocate", *changes])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_without_vllm_the_run_ends_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm_mode is colocate, and there is no vllm .*vllm_python.*vllm_urls"):
        check_inputs(quick())
    with pytest.raises(ConfigError, match="vllm_mode is colocate, and there is no vllm"):
        GRPOTrainer("/nowhere", args=GRPOConfig(str(tmp_path), engine="vllm", vllm_mode="colocate"))
    with pytest.raises(ConfigError, match="engine is vllm, and there is no vllm"):
        check_inputs(quick("vllm_mode=server"))


@pytest.mark.parametrize(
    "change, what",
    [
        ("vllm_urls=[http://a:1]", "belong to servers"),
        ("vllm_python=/v/bin/python", "belong to servers"),
        ("vllm_tensor_parallel_size=2", "other devices than the trainer's"),
        ("max_staleness=1", "one process and device"),
        ("vllm_enable_sleep_mode=true", "use_cpu asks for none"),
    ],
)
def test_what_one_process_cannot_do_is_refused_with_what_to_do(change: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"vllm_mode is colocate: .*{what}.*vllm_mode=server"):
        quick("use_cpu=true", change)


def test_sleep_of_a_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="a server is a process of its own"):
        quick("vllm_mode=server", "vllm_enable_sleep_mode=true")


def test_the_settings_reach_vllm_under_its_names(start: Start) -> None:
    config = quick("vllm_max_model_length=64", "vllm_options={no-enable-prefix-caching: true, max-num-seqs: 5}")
    settings = vllm_settings(config)
    assert settings.colocated
    _, module, _ = start(options=settings.options)
    arguments = dict(module.calls)["LLM"]
    expected = {
        **{"max_model_len": 64, "max_num_seqs": 5, "enable_prefix_caching": False, "tensor_parallel_size": 1},
        **{"gpu_memory_utilization": 0.3, "logprobs_mode": "processed_logprobs", "generation_config": "vllm"},
        **{"load_format": "dummy", "enable_sleep_mode": False, "dtype": "float32"},
    }
    assert {name: arguments[name] for name in expected} == expected


def evenness(completion: str, **row: Any) -> float:
    return sum(ord(c) % 2 == 0 for c in completion) + 0.01 * ord(completion[:1] or "a")


def test_a_run_in_one_process_is_that_over_a_server(
    make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Module(lambda: make_model(seed=9), tokenizer))
    server = FakeVllm(copy.deepcopy(make_model()), tokenizer)
    lines = {}
    for name, where in (("colocate", {"vllm_mode": "colocate"}), ("server", {"vllm_urls": [server.url]})):
        settings = GRPOConfig(
            str(tmp_path),
            **{"run_name": name, "engine": "vllm", "max_steps": 3, "prompts_per_step": 2, **where},
            **{"num_generations": 4, "max_completion_length": 4, "num_eval_prompts": 2, "eval_num_samples": 0},
            **{"learning_rate": 1e-2, "use_cpu": True, "reward_in_process": True},
        )
        GRPOTrainer(
            model=make_model(),
            reward_funcs=evenness,
            args=settings,
            train_dataset=[{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)],
            processing_class=tokenizer,
            terminal=Terminal(quiet=True),
        ).train()
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    server.stop()
    for key in ("reward", "policy_loss", "grad_norm"):
        assert [x[key] for x in lines["colocate"]] == [x[key] for x in lines["server"]], key
    assert max(x["sampler_gap"] for x in lines["colocate"]) < 1e-5
    assert (tmp_path / "colocate" / "vllm" / "engine.log").is_file()
