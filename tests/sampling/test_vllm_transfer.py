"""Weights to servers by vLLM's weight-transfer calls, with gloo in NCCL's place; no GPU takes part."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler, servers, transfer
from llm_pg.sampling.vllm import pool as pool_module
from llm_pg.sampling.vllm.settings import Settings
from llm_pg.sampling.vllm.transfer import TransferError, buffers
from llm_pg.sampling.vllm.weights import tensors
from tests.sampling.fake_vllm import FakeVllm, instead
from tests.sampling.fake_wire import TRANSFER, GlooWire, Receiver

pytestmark = pytest.mark.fake

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
G = 2
PARAMS = SamplingParams(max_completion_length=6)
INIT, BEGIN, UPDATE, FINISH = TRANSFER

Start = Callable[..., tuple[VllmSampler, list[FakeVllm], Any]]


@pytest.fixture(autouse=True)
def wires(monkeypatch: pytest.MonkeyPatch) -> list[GlooWire]:
    """The trainer's ends, in the order of their making."""
    made: list[GlooWire] = []

    def open_wire(*given: Any) -> GlooWire:
        made.append(GlooWire(*given))
        return made[-1]

    monkeypatch.setattr(servers, "NcclWire", open_wire)
    monkeypatch.setattr(servers, "check_nccl", lambda: None)
    monkeypatch.setattr(transfer, "GRACE", 0.1)
    monkeypatch.setattr(servers, "NCCL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(pool_module.ServerPool.__init__, "__kwdefaults__", {"pause": 0.01})
    return made


@pytest.fixture
def start(make_model: Any, tokenizer: Any, tmp_path: Path) -> Iterator[Start]:
    """start(receiver, ..., family=, adapter=): the engine, a server with each receiver, and the model in training."""
    with ExitStack() as stack:

        def make(
            *receivers: Receiver | None, family: str = "llama", adapter: bool = False, **settings: Any
        ) -> tuple[VllmSampler, list[FakeVllm], Any]:
            model = make_model(family)
            if adapter:
                model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
            running = [FakeVllm(make_model(family, seed=3, tie_word_embeddings=False), tokenizer) for _ in receivers]
            for server, receiver in zip(running, receivers, strict=True):
                server.receiver = receiver
                stack.callback(server.stop)
            found = Settings(urls=[s.url for s in running], start_timeout=5.0, **settings)
            sampler = VllmSampler(model, tokenizer, [1], settings=found, folder=tmp_path, say=said.append)
            return stack.enter_context(sampler), running, model

        said: list[str] = []
        make.said = said  # type: ignore[attr-defined]
        yield make


def sample(sampler: VllmSampler) -> Any:
    return sampler.sample(PROMPTS, G, PARAMS, stream_key(0, torch.arange(len(PROMPTS) * G)))


def move(model: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def paths(server: FakeVllm) -> list[str]:
    return [path for path, _ in server.requests if path != "/v1/completions"]


@pytest.mark.parametrize("settings", [{}, {"adapter": True}, {"family": "qwen2"}])
def test_each_state_is_announced_and_arrives_bit_for_bit(
    start: Start, wires: list[GlooWire], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Merged adapters, and a tied model with the head of its own that vLLM is told to expect. Many buffers."""
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 20_000)
    receiver = Receiver()
    sampler, (server,), model = start(receiver, **settings)
    for number in range(3):
        sample(sampler)
        expected = tensors(model, torch.float32)
        told = [body["update_info"] for path, body in server.requests if path == UPDATE]
        assert len(told) == number + 1
        assert told[-1]["names"] == list(expected)
        assert told[-1]["dtype_names"] == ["float32"] * len(expected)
        assert told[-1]["shapes"] == [list(x.shape) for x in expected.values()]
        sent = torch.cat(wires[0].sent)
        assert torch.equal(sent, torch.cat([x.reshape(-1).view(torch.uint8) for x in expected.values()]))
        assert torch.equal(server.model.lm_head.weight, expected["lm_head.weight"])
        assert sampler.last_gap is not None
        assert sampler.last_gap < 1e-5
        wires[0].sent.clear()
        move(model)
    asked = ["/server_info?config_format=json", "/get_world_size", INIT]
    assert paths(server) == asked + [BEGIN, UPDATE, FINISH] * 3
    assert receiver.buffers > 3 * 3
    info = next(body["init_info"] for path, body in server.requests if path == INIT)
    assert info["rank_offset"] == 1
    assert info["world_size"] == 2
    assert not list(sampler.folder.glob("weights-*"))


def test_half_precision_is_announced_and_sent_as_such(start: Start) -> None:
    sampler, (server,), model = start(Receiver(), dtype=torch.bfloat16)
    sample(sampler)
    info = next(body["update_info"] for path, body in server.requests if path == UPDATE)
    assert set(info["dtype_names"]) == {"bfloat16"}
    assert torch.equal(server.model.lm_head.weight, model.lm_head.weight.bfloat16().float())


def test_each_server_has_a_group_with_all_of_its_workers(start: Start, wires: list[GlooWire]) -> None:
    """The second has two, as with tensor parallelism of two; the third takes files."""
    receivers = [Receiver(), Receiver(workers=2), Receiver(backend="ipc")]
    sampler, running, model = start(*receivers)
    # gloo's broadcast is entered by both workers at once
    receivers[1].receive = lambda info: _both(receivers[1], info)  # type: ignore[method-assign]
    sample(sampler)
    assert [wire.group.size() for wire in wires] == [2, 3]
    assert [UPDATE in paths(server) for server in running] == [True, True, False]
    assert ["/collective_rpc" in paths(server) for server in running] == [False, False, True]
    for server in running:
        for name, value in model.state_dict().items():
            assert torch.equal(server.model.state_dict()[name], value), name


def _both(receiver: Receiver, info: dict[str, Any]) -> None:
    parts = [Receiver() for _ in receiver.groups]
    for part, group in zip(parts, receiver.groups, strict=True):
        part.groups, part.limit = [group], receiver.limit
    threads = [threading.Thread(target=part.receive, args=(info,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, parts[1].arrived[name]) for name, x in parts[0].arrived.items())
    receiver.arrived = parts[0].arrived


def test_a_trainer_on_a_cpu_sends_files_without_asking(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "NCCL_DEVICES", ("cuda",))
    sampler, (server,), _ = start(Receiver())
    sample(sampler)
    assert paths(server) == ["/collective_rpc"]
    assert start.said == []  # type: ignore[attr-defined]


def test_a_trainer_without_vllm_sends_files_and_says_why(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(servers, "NCCL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(transfer.importlib.util, "find_spec", lambda name: None)
    sampler, (server,), _ = start(Receiver())
    sample(sampler)
    assert paths(server) == ["/server_info?config_format=json", "/collective_rpc"]
    (line,) = start.said  # type: ignore[attr-defined]
    assert "go to it as files from now on: the trainer's environment has no vllm" in line


@pytest.mark.faults
@pytest.mark.parametrize(
    "path, answer", [(INIT, 500), (INIT, 400), (BEGIN, 500), (UPDATE, 500), (UPDATE, "cut"), (FINISH, "cut")]
)
def test_a_call_that_fails_sends_the_run_on_by_files(
    start: Start, wires: list[GlooWire], monkeypatch: pytest.MonkeyPatch, path: str, answer: Any
) -> None:
    """At the second state, for the calls that come with each; the server does not take part in what follows."""
    sampler, (server,), model = start(Receiver(), request_timeout=10.0)
    if path != INIT:
        sample(sampler)
    real = Receiver.answer
    monkeypatch.setattr(Receiver, "answer", lambda *given: {} if given[2] == path else real(*given))
    server.fault = instead(answer, path=path)
    move(model)
    begin = time.perf_counter()
    sample(sampler)
    move(model)
    sample(sampler)
    assert time.perf_counter() - begin < 8.0
    (line,) = start.said  # type: ignore[attr-defined]
    assert f"{server.url} over NCCL and go to it as files from now on: " in line
    assert path in line
    assert all(wire.closed for wire in wires)
    assert len(wires) == (path != INIT)
    assert server.count("/collective_rpc") == 2
    assert sampler.last_gap is not None
    assert sampler.last_gap < 1e-5


@pytest.mark.faults
def test_a_transfer_that_takes_too_long_is_broken_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker waits for a tensor that never comes, or the broadcast for a worker: neither ends by itself."""
    sampler, (server,), _ = start(Receiver(), request_timeout=1.0)
    monkeypatch.setattr(Receiver, "receive", lambda self, info: time.sleep(2.5))
    server.lock = contextlib.nullcontext()  # type: ignore[assignment]
    begin = time.perf_counter()
    sample(sampler)
    assert time.perf_counter() - begin < 2.5
    (line,) = start.said  # type: ignore[attr-defined]
    assert "over NCCL and go to it as files from now on: " in line
    assert "within 1 s" in line
    assert server.count("/collective_rpc") == 1


@pytest.mark.faults
def test_a_server_left_in_the_middle_of_a_transfer_is_not_waited_for_as_long(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is well while its engine waits for the rest, so that three attempts are made."""
    monkeypatch.setattr(servers, "AFTER_FAILURE", 0.2)
    sampler, (server, _), _ = start(Receiver(), None, request_timeout=30.0)

    def stuck(server: FakeVllm, path: str, answer: Any) -> Any:
        if path == "/collective_rpc":
            time.sleep(0.6)
        return 500 if path == BEGIN else answer

    server.fault = stuck
    begin = time.perf_counter()
    sample(sampler)
    assert time.perf_counter() - begin < 8.0
    assert server.count("/collective_rpc") == 3
    assert "failed 3 times in a row and is left out (1 of 2 left)" in start.said[-1]  # type: ignore[attr-defined]


@pytest.mark.faults
def test_a_server_that_dies_in_the_middle_of_a_transfer_leaves_the_others(start: Start) -> None:
    sampler, running, model = start(Receiver(), Receiver(), request_timeout=5.0)
    sample(sampler)

    def die(server: FakeVllm, path: str, answer: Any) -> Any:
        if path == UPDATE:
            threading.Thread(target=server.stop).start()
            return "cut"
        return answer

    running[0].fault = die
    move(model)
    sample(sampler)
    said = start.said  # type: ignore[attr-defined]
    assert "over NCCL and go to it as files from now on" in said[0]
    assert f"{running[0].url} failed 3 times in a row and is left out (1 of 2 left)" in said[1]
    assert paths(running[1])[-3:] == [BEGIN, UPDATE, FINISH]
    assert torch.equal(running[1].model.lm_head.weight, model.lm_head.weight)


@pytest.mark.faults
def test_a_weight_that_did_not_arrive_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first state sent, the folder that servers start from is what came before."""
    sampler, (server,), model = start(Receiver())
    stale = "model.layers.1.mlp.down_proj.weight"
    sample(sampler)
    real = Receiver.receive

    def forgets(self: Receiver, info: Any) -> None:
        real(self, info)
        self.arrived[stale] = server.model.state_dict()[stale].clone()

    monkeypatch.setattr(Receiver, "receive", forgets)
    move(model)
    with pytest.raises(EngineError, match=f"after weight sync 2. It still has the old {stale}"):
        sample(sampler)


def test_buffers_end_with_the_tensor_that_takes_them_over_the_limit() -> None:
    xs = [torch.arange(n, dtype=torch.uint8) for n in (3, 4, 1, 9, 2)] + [torch.tensor(1.5)]
    assert [len(x) for x in buffers(iter(xs), 6)] == [7, 10, 6]
    assert [len(x) for x in buffers(iter(xs), 7)] == [8, 9, 6]
    assert torch.equal(torch.cat(list(buffers(iter(xs), 2))), torch.cat([x.reshape(-1).view(torch.uint8) for x in xs]))


def test_the_first_error_of_either_side_is_raised_without_waiting_for_the_other() -> None:
    def fails() -> None:
        raise TransferError("first")

    for call, work in ((fails, lambda stop: time.sleep(30)), (lambda: time.sleep(30), lambda stop: fails())):
        begin = time.perf_counter()
        with pytest.raises(TransferError, match="first"):
            transfer.beside(call, work, 20.0)
        assert time.perf_counter() - begin < 5.0
    with pytest.raises(TransferError, match=r"did not end within 0\.1 s"):
        transfer.beside(lambda: None, lambda stop: time.sleep(30), 0.1)


@pytest.mark.slow
def test_what_another_process_receives_is_the_model(start: Start, tmp_path: Path, make_model: Any) -> None:
    """Two processes: the server's writes what arrived into a file."""
    script = tmp_path / "server.py"
    script.write_text(
        "import sys, time\n"
        "from safetensors.torch import save_file\n"
        "from llm_pg.config.schema import ModelConfig\n"
        "from llm_pg.model.loading import character_tokenizer, load_model\n"
        "from tests.conftest import FAMILIES\n"
        "from tests.sampling.fake_vllm import FakeVllm\n"
        "from tests.sampling.fake_wire import Receiver\n"
        "tokenizer = character_tokenizer()\n"
        "model = load_model(ModelConfig(make=FAMILIES['llama']), tokenizer, seed=5)\n"
        "receiver = Receiver()\n"
        "server = FakeVllm(model, tokenizer, receiver=receiver)\n"
        "print(server.url, flush=True)\n"
        "sys.stdin.readline()\n"
        "save_file(receiver.arrived, sys.argv[1])\n"
        "print('written', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path / "arrived")], **pipes) as process:  # type: ignore[call-overload]
        try:
            url = process.stdout.readline().strip()
            model = make_model()
            move(model)
            tokenizer = start(None)[0].tokenizer
            found = Settings(urls=[url])
            with VllmSampler(model, tokenizer, [1], settings=found, folder=tmp_path / "run") as sampler:
                sample(sampler)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "written\n"
        finally:
            process.kill()
    arrived, expected = load_file(tmp_path / "arrived"), tensors(model, torch.float32)
    assert set(arrived) == set(expected)
    assert all(torch.equal(arrived[name], x) for name, x in expected.items())
