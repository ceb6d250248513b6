"""The vllm engine against a small server with planned faults; `test_vllm_real.py` has the real one."""

import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler
from llm_pg.sampling.vllm import pool as pool_module
from llm_pg.sampling.vllm.engine import Settings
from llm_pg.sampling.vllm.errors import Unreachable
from llm_pg.sampling.vllm.weights import fingerprint, tensors
from tests.sampling.fake_vllm import FakeVllm, instead, slow

pytestmark = pytest.mark.fake

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18]]
PARAMS = SamplingParams(max_completion_length=6)
G = 3

Start = Callable[..., tuple[VllmSampler, list[FakeVllm], Any]]


@pytest.fixture
def start(make_model: Any, tokenizer: Any, tmp_path: Path) -> Iterator[Start]:
    """start(fault, ..., family=, **settings): the engine, a server with each fault, and the model in training."""
    with ExitStack() as stack:

        def make(*faults: Any, family: str = "llama", **settings: Any) -> tuple[VllmSampler, list[FakeVllm], Any]:
            model = make_model(family)
            servers = [FakeVllm(copy.deepcopy(model), tokenizer, fault) for fault in faults]
            for server in servers:
                stack.callback(server.stop)
            sampler = VllmSampler(
                model,
                tokenizer,
                [tokenizer.eos_token_id],
                settings=Settings(urls=[s.url for s in servers], start_timeout=1.0, **settings),
                folder=tmp_path,
                say=lambda line: said.append(line),
            )
            return stack.enter_context(sampler), servers, model

        said: list[str] = []
        make.said = said  # type: ignore[attr-defined]
        yield make


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(pool_module.ServerPool.__init__, "__kwdefaults__", {"pause": 0.01})


def sample(sampler: VllmSampler, params: SamplingParams = PARAMS, seed: int = 0) -> Any:
    return sampler.sample(PROMPTS, G, params, stream_key(seed, torch.arange(len(PROMPTS) * G)))


def move(model: Any, scale: float = 0.5) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * p.std() * torch.randn_like(p))


def test_completions_are_in_the_order_of_the_prompts_whichever_server_gave_them(start: Start) -> None:
    sampler, servers, _ = start(slow(0.05), None, None)
    many = sample(sampler)
    alone, _, _ = start(None)
    one = sample(alone)
    assert torch.equal(many.tokens_BT, one.tokens_BT)
    assert torch.allclose(many.logp_BT, one.logp_BT, atol=1e-6)
    assert sum(s.count("/v1/completions") for s in servers) == len(PROMPTS)
    assert all(s.count("/v1/completions") for s in servers)


def test_equal_keys_give_equal_completions_and_other_keys_others(start: Start) -> None:
    sampler, _, _ = start(None)
    first = sample(sampler)
    assert torch.equal(first.tokens_BT, sample(sampler).tokens_BT)
    assert not torch.equal(first.tokens_BT, sample(sampler, seed=1).tokens_BT)


def test_every_setting_of_the_distribution_is_sent_with_each_prompt(start: Start) -> None:
    sampler, (server,), _ = start(None)
    sample(sampler, SamplingParams(temperature=0.7, top_k=9, max_completion_length=5))
    body = next(b for path, b in server.requests if path == "/v1/completions")
    told = {k: body[k] for k in ("temperature", "top_k", "top_p", "min_p", "max_tokens", "n", "repetition_penalty")}
    assert told == {
        **{"temperature": 0.7, "top_k": 9, "top_p": 1.0, "min_p": 0.0, "max_tokens": 5, "n": G},
        "repetition_penalty": 1.0,
    }


def test_a_greedy_group_is_one_completion_repeated(start: Start) -> None:
    sampler, (server,), _ = start(None)
    done = sample(sampler, SamplingParams(greedy=True, max_completion_length=6))
    rows = done.tokens_BT.view(len(PROMPTS), G, -1)
    assert (rows == rows[:, :1]).all()
    assert {b["n"] for path, b in server.requests if path == "/v1/completions"} == {1}


def test_weights_travel_when_they_changed_and_only_then(start: Start) -> None:
    sampler, (server,), model = start(None)
    sample(sampler)
    sample(sampler)
    assert (sampler.syncs, server.count("/collective_rpc")) == (1, 1)
    move(model)
    sample(sampler)
    assert (sampler.syncs, server.count("/collective_rpc")) == (2, 2)
    assert sampler.last_gap is not None
    assert sampler.last_gap < 1e-6
    for name, value in model.state_dict().items():
        assert torch.equal(server.model.state_dict()[name], value), name


def test_prefixes_of_other_weights_have_another_name_in_the_cache(start: Start) -> None:
    sampler, (server,), model = start(None)
    for _ in range(2):
        sample(sampler)
        sample(sampler)
        move(model)
    salts = [b["cache_salt"] for path, b in server.requests if path == "/v1/completions"]
    assert len(set(salts[: 2 * len(PROMPTS)])) == 1
    assert len(set(salts)) == 2


def test_one_flipped_bit_changes_the_fingerprint(make_model: Any) -> None:
    model = make_model("qwen2")
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model))
    parameter = list(model.parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[5:6].view(torch.int32).bitwise_xor_(1)
    assert sum(a != b for a, b in zip(before, fingerprint(model), strict=True)) == 1


@pytest.mark.faults
@pytest.mark.parametrize("stale", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_weight_that_the_server_kept_is_named(start: Start, stale: str) -> None:
    sampler, (server,), model = start(None)
    sample(sampler)
    server.skips = {stale}
    move(model)
    with pytest.raises(EngineError, match=rf"after weight sync 2\. It still has the old {stale}"):
        sample(sampler)


@pytest.mark.faults
def test_the_old_head_of_a_tied_model_is_named(start: Start) -> None:
    """As vLLM 0.32 does it: the embedding is new and the head tied to it is the old one."""
    sampler, (server,), model = start(None, family="qwen2")
    server.model.lm_head.weight = torch.nn.Parameter(server.model.lm_head.weight.detach().clone())
    sample(sampler)
    server.skips = {"lm_head.weight"}
    move(model)
    with pytest.raises(EngineError, match=r"It still has the old lm_head\.weight"):
        sample(sampler)


@pytest.mark.faults
def test_a_reload_that_loads_nothing_is_told_as_such(start: Start) -> None:
    sampler, (server,), model = start(None)
    sample(sampler)
    server.skips = set(server.model.state_dict())
    move(model)
    with pytest.raises(EngineError, match="all 16 weights that changed: the call loaded nothing"):
        sample(sampler)


@pytest.mark.faults
def test_log_probabilities_of_another_distribution_end_the_run(start: Start) -> None:
    def raw(answer: Any) -> Any:
        for choice in answer["choices"]:
            choice["logprobs"]["token_logprobs"] = [x - 0.3 for x in choice["logprobs"]["token_logprobs"]]
        return answer

    sampler, _, _ = start(instead(raw))
    with pytest.raises(EngineError, match=r"differ from the trainer's by 0\.3 nats.*processed_logprobs"):
        sample(sampler)


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, seconds", [(instead(500, 2), 60), (instead("cut", 2), 60), (instead([], 2), 60), (slow(3.0, 1), 1.5)]
)
def test_a_server_that_fails_for_a_moment_is_asked_again(start: Start, fault: Any, seconds: float) -> None:
    sampler, _, _ = start(fault, request_timeout=seconds)
    assert sample(sampler).tokens_BT.shape[0] == len(PROMPTS) * G


@pytest.mark.faults
def test_requests_that_a_server_refuses_together_are_one_failure() -> None:
    """All of a step's prompts meet the one server while it is overloaded; it is well when they come again."""
    together = threading.Barrier(len(PROMPTS))

    class Overloaded:
        url = "http://one"
        refusals = len(PROMPTS)
        lock = threading.Lock()

        def post(self, *_: Any) -> str:
            with self.lock:
                self.refusals -= 1
                refuses = self.refusals >= 0
            if refuses:
                together.wait(timeout=10)
                raise Unreachable("answered 503")
            return "well"

    said: list[str] = []
    pool = pool_module.ServerPool([Overloaded()], say=said.append)  # type: ignore[list-item]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        answers = list(threads.map(lambda _: pool.ask("/v1/completions", {}, lambda answer: answer)[0], PROMPTS))
    assert answers == ["well"] * len(PROMPTS)
    assert said == []


@pytest.mark.faults
@pytest.mark.parametrize("fault, seconds", [(instead(500), 60), (instead("cut"), 60), (slow(4.0), 1.5)])
def test_the_prompts_of_a_dead_server_go_to_the_others(start: Start, fault: Any, seconds: float) -> None:
    sampler, servers, _ = start(fault, None, request_timeout=seconds)
    healthy, _, _ = start(None)
    expected = sample(healthy)
    for _ in range(20):
        done = sample(sampler)
        assert torch.equal(done.tokens_BT, expected.tokens_BT)
        if start.said:  # type: ignore[attr-defined]
            break
    assert "is left out (1 of 2 left)" in start.said[0]  # type: ignore[attr-defined]
    asked = servers[0].count("/v1/completions")
    sample(sampler)
    assert servers[0].count("/v1/completions") == asked


class Frozen:
    """A server whose connections are taken and never answered, as a stopped process's are."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"


@pytest.mark.faults
def test_a_server_that_hangs_is_left_out_after_one_timeout(
    make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three timeouts of a request, ten minutes each unless set, would be half an hour."""
    monkeypatch.setattr("llm_pg.sampling.vllm.client.HEALTH_TIMEOUT", 0.2)
    frozen, model, said = Frozen(), make_model(), []
    server = FakeVllm(copy.deepcopy(model), tokenizer)
    settings = Settings(urls=[frozen.url, server.url], request_timeout=2.0)
    with VllmSampler(model, tokenizer, [1], settings=settings, folder=tmp_path, say=said.append) as sampler:
        begin = time.perf_counter()
        assert sample(sampler).tokens_BT.shape[0] == len(PROMPTS) * G
        assert time.perf_counter() - begin < 4.0  # two timeouts
    assert f"{frozen.url} no longer says that it is well and is left out (1 of 2 left)" in said[0]
    server.stop()
    frozen.socket.close()


@pytest.mark.faults
def test_a_server_that_is_back_at_the_next_sync_gets_the_new_weights(start: Start) -> None:
    sampler, servers, model = start(instead(500), None)
    while not start.said:  # type: ignore[attr-defined]
        sample(sampler)
    servers[0].fault = None
    move(model)
    before = servers[0].count("/v1/completions")
    sample(sampler)
    assert any("is back" in line for line in start.said)  # type: ignore[attr-defined]
    assert servers[0].count("/v1/completions") > before
    assert torch.equal(servers[0].model.lm_head.weight, model.lm_head.weight)


@pytest.mark.faults
def test_all_servers_dead_is_an_error_that_names_each_cause(start: Start) -> None:
    sampler, servers, _ = start(instead(503), None)
    sample(sampler)
    servers[1].stop()
    begin = time.perf_counter()
    with pytest.raises(EngineError, match=r"All 2 vLLM servers are dead: .*503.*; .*--resume"):
        sample(sampler)
    assert time.perf_counter() - begin < 5


@pytest.mark.faults
def test_servers_that_never_answer_are_told_after_the_timeout(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings = Settings(urls=["http://127.0.0.1:9"], start_timeout=0.2)
    lines: list[str] = []
    sampler = VllmSampler(make_model(), tokenizer, [1], settings=settings, folder=tmp_path, say=lines.append)
    with pytest.raises(EngineError, match=r"server is dead: .*refused"), sampler:
        sample(sampler)
    assert "they start from" in lines[0]


def _choice(**changes: Any) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        answer["choices"][0].update(changes)
        return answer

    return change


@pytest.mark.faults
@pytest.mark.parametrize(
    "change, what",
    [
        (_choice(logprobs=None), "without log-probabilities"),
        (_choice(token_ids=None), "without token ids"),
        (_choice(token_ids=[5, 10**6], logprobs={"token_logprobs": [-1.0, -1.0]}), "ids that this model has not"),
        (_choice(token_ids=[5, -1], logprobs={"token_logprobs": [-1.0, -1.0]}), "ids that this model has not"),
        (_choice(token_ids=[5] * 7, logprobs={"token_logprobs": [-1.0] * 7}), "max_completion_length is 6"),
        (_choice(token_ids=[1, 5], logprobs={"token_logprobs": [-1.0, -1.0]}), "after an end token"),
        (_choice(token_ids=[5, 6], logprobs={"token_logprobs": [-1.0]}), "1 log-probabilities for 2 tokens"),
        (_choice(token_ids=[5], logprobs={"token_logprobs": [float("nan")]}), "no number"),
        (_choice(token_ids=[5], logprobs={"token_logprobs": [None]}), "no number"),
        (_choice(prompt_token_ids=[99]), "another prompt"),
        (lambda answer: {"choices": answer["choices"][:1]}, "1 completions of a prompt where 3"),
        (400, "refuses the request itself"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_ends_the_run(start: Start, change: Any, what: str) -> None:
    sampler, _, _ = start(instead(change))
    with pytest.raises(EngineError, match=what):
        sample(sampler)


@pytest.mark.faults
def test_a_server_without_the_call_that_loads_weights_is_told_how_to_start(start: Start) -> None:
    sampler, _, _ = start(instead(404, path="/collective_rpc"))
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        sample(sampler)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(start: Start, tokenizer: Any) -> None:
    sampler, _, _ = start(None)
    plain = sample(sampler, SamplingParams(max_completion_length=20))
    row = plain.tokens_BT[0][plain.mask_BT[0]]
    word = tokenizer.decode(row[3:5])
    done = sample(sampler, SamplingParams(max_completion_length=20, stop=(word,)))
    text = tokenizer.decode(done.tokens_BT[0][done.mask_BT[0]])
    assert text.endswith(word)
    assert text.count(word) == 1
    assert not done.truncated_B[0]


def test_an_adapter_is_served_as_the_model_it_makes(make_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    plain = make_model()
    values = tensors(adapted, torch.float32)
    assert set(values) == set(plain.state_dict())
    plain.load_state_dict(values)
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, plain(ids).logits, atol=1e-5)
        assert not torch.allclose(make_model()(ids).logits, plain(ids).logits, atol=1e-2)


def test_a_tied_model_is_written_with_a_head_of_its_own(start: Start, tmp_path: Path) -> None:
    _, _, model = start(None, family="qwen2")
    values = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(values["lm_head.weight"], model.get_input_embeddings().weight)
    assert '"tie_word_embeddings": false' in (tmp_path / "model" / "config.json").read_text()


def test_settings_that_vllm_would_sample_otherwise_are_refused(start: Start) -> None:
    sampler, _, _ = start(None)
    with pytest.raises(ValueError, match="min_p before top_p"):
        sample(sampler, SamplingParams(top_p=0.9, min_p=0.1))
