"""The transfer of weights against the real vLLM on a CPU: what its server answers there, and its receiver over gloo.

    LLM_PG_TEST_VLLM=1 PYTHON -m pytest -m vllm -n 0 tests/sampling/test_vllm_transfer_real.py

PYTHON is of an environment that has vLLM beside this package.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import load_model
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import VllmSampler, colocated, servers, transfer
from llm_pg.sampling.vllm.compare import gap
from llm_pg.sampling.vllm.settings import Settings
from llm_pg.sampling.vllm.transfer import Transfer
from llm_pg.sampling.vllm.weights import named
from tests.sampling.fake_wire import GlooWire, joined, root
from tests.sampling.vllm_cases import EXACT, MODELS, PROMPTS, G, move, rows_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("LLM_PG_TEST_VLLM") != "1", reason="set LLM_PG_TEST_VLLM=1"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not in this environment"),
]
PARAMS = SamplingParams(max_completion_length=16)


def sample(sampler: VllmSampler) -> Any:
    return sampler.sample(PROMPTS, G, PARAMS, stream_key(0, torch.arange(len(PROMPTS) * G)))


class Direct:
    """A `Client` of an `LLM` in this process."""

    url, timeout = "http://127.0.0.1:1", 60.0

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def get(self, path: str) -> Any:
        assert path == "/get_world_size"
        return {"world_size": self.llm.llm_engine.vllm_config.parallel_config.world_size}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        method = path.removeprefix("/")
        return self.llm.collective_rpc(method, kwargs=body)


class Group:
    def __init__(self, info: Any) -> None:
        self.group = joined(info.master_address, info.master_port, info.rank_offset, info.world_size)

    def broadcast(self, x: torch.Tensor, src: int, stream: Any = None) -> None:
        self.group.broadcast([x], root()).wait()

    def destroy(self) -> None:
        pass


class Stream:
    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("kind", list(MODELS))
def test_vllms_own_receiver_loads_what_is_sent(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its NCCL engine with a gloo group and without streams: its calls, its cut of the buffers, its loading."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda info, parallel: Group(info))
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(transfer, "address_towards", lambda url: "127.0.0.1")
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 100_000)
    model = load_model(ModelConfig(make=MODELS[kind]), tokenizer, seed=0)  # type: ignore[call-arg]
    options = {"enforce-eager": True, "gpu-memory-utilization": 0.2, "weight-transfer-config": {"backend": "nccl"}}
    settings = Settings(colocated=True, options=options)
    with VllmSampler(model, tokenizer, [1], settings=settings, folder=tmp_path) as sampler:
        host = sampler.host
        assert isinstance(host, colocated.Colocated)
        way = Transfer(Direct(host.llm), torch.device("cpu"), GlooWire)  # type: ignore[arg-type]

        def load(model: Any, present: Any) -> None:
            way.send(named(model), torch.float32, lambda name, x: None)
            assert host.llm.reset_prefix_cache()
            host.served = present

        monkeypatch.setattr(host, "load", load)
        gaps = []
        for _ in range(3):
            gaps.append(gap(model, rows_of(sample(sampler)), PARAMS))
            move(model)
        print(kind, "mean |Δ log-probability| after each transfer:", gaps)
        assert max(gaps) < EXACT
        assert len(way.wire.sent) > 3 * 3  # type: ignore[attr-defined]


def test_a_server_on_a_cpu_refuses_to_join_and_the_run_goes_on_by_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells its setting and its size, and answers 500 to the call that joins."""
    monkeypatch.setattr(servers, "NcclWire", GlooWire)
    monkeypatch.setattr(servers, "NCCL_DEVICES", ("cuda", "cpu"))
    model = load_model(ModelConfig(make=MODELS["tied"]), tokenizer, seed=0)  # type: ignore[call-arg]
    options = {"enforce-eager": True, "weight-transfer-config": '{"backend": "nccl"}'}
    settings = Settings(python=os.environ.get("LLM_PG_VLLM_PYTHON", sys.executable), options=options)
    said: list[str] = []
    with VllmSampler(model, tokenizer, [1], settings=settings, folder=tmp_path, say=said.append) as sampler:
        for _ in range(2):
            move(model)
            assert gap(model, rows_of(sample(sampler)), PARAMS) < EXACT
    (line,) = said
    print(line)
    assert "over NCCL and go to it as files from now on" in line
    assert "answered 500 to /init_weight_transfer_engine" in line
    assert "\n" not in line
