"""A server that speaks vLLM's protocol from the weights it is given: what it says is recorded from vLLM 0.32, what it
computes comes from a transformers model, and what goes wrong with it is planned by the test."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from tests.sampling.fake_wire import TRANSFER, Receiver

Fault = Callable[["FakeVllm", str, dict[str, Any]], Any]


class FakeVllm:
    """Args: model, tokenizer: what it samples with. fault: (server, path, answer) -> the answer to send instead, an
    int for an HTTP status, or "cut" to close the connection in the middle. receiver: of weights over a wire. address:
    of this host, and a port; 0 = a free one."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        fault: Fault | None = None,
        receiver: Receiver | None = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.model, self.fault, self.receiver = model, fault, receiver
        self.sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id])
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, NativeSampler] = {}
        self.skips: set[str] = set()  # weights that a reload leaves as they are
        self.lock = threading.Lock()
        self.http = _Quiet(address, _handler(self))
        self.url = f"http://{address[0]}:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def count(self, path: str) -> int:
        return sum(p == path for p, _ in self.requests)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            self.requests.append((path, body))
            if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                return self._adapter(path, body)
            if path == "/v1/completions":
                return self._complete(body) if "prompt_logprobs" not in body else self._score(body["prompt"])
            if self.receiver is not None and path in TRANSFER:
                return self.receiver.answer(self.model, path, body)
            if path == "/collective_rpc":
                return self._reload(Path(body["kwargs"]["weights_path"]))
            return {}

    def told(self, path: str) -> Any:
        """The answer to a GET."""
        if self.receiver is None or path == "/health":
            return {}
        with self.lock:
            self.requests.append((path, {}))
        config = {"weight_transfer_config": {"backend": self.receiver.backend}}
        return {"world_size": self.receiver.workers} if path == "/get_world_size" else {"vllm_config": config}

    def _adapter(self, path: str, body: dict[str, Any]) -> Any:
        """vLLM answers 404 to the name of an adapter that it does not have."""
        name = body["lora_name"]
        if path == "/v1/load_lora_adapter":
            model = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"])
            self.adapters[name] = NativeSampler(model, self.sampler.tokenizer, self.sampler.eos_ids)
            return f"Success: LoRA adapter '{name}' added successfully."
        return 404 if self.adapters.pop(name, None) is None else f"Success: LoRA adapter '{name}' removed successfully."

    def _reload(self, folder: Path) -> Any:
        weights = load_file(folder / "model.safetensors")
        state = self.model.state_dict()
        for name in self.skips:
            weights[name] = state[name].clone()
        self.model.load_state_dict(weights)
        return {"results": [None]}

    @torch.no_grad()
    def _score(self, prompt: list[int]) -> Any:
        """As vLLM answers prompt_logprobs=0: nothing of the first token, then each token's own number."""
        logp = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        known = [{str(token): {"logprob": float(logp[i, token]), "rank": 1}} for i, token in enumerate(prompt[1:])]
        return {"object": "text_completion", "choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *known]}]}

    def _complete(self, body: dict[str, Any]) -> Any:
        params = SamplingParams(
            temperature=body["temperature"] or 1.0,
            top_k=body["top_k"],
            top_p=body["top_p"],
            min_p=body["min_p"],
            greedy=body["temperature"] == 0.0,
            max_completion_length=body["max_tokens"],
        )
        keys = stream_key(body["seed"], torch.arange(body["n"]))
        sampler = self.adapters[body["model"]] if "model" in body else self.sampler
        done = sampler.sample([body["prompt"]], body["n"], params, keys)
        choices = []
        for i in range(body["n"]):
            mask = done.mask_BT[i]
            ids, logp = done.tokens_BT[i][mask].tolist(), done.logp_BT[i][mask].tolist()
            choices.append(
                {
                    "index": i,
                    "text": "",
                    "logprobs": {"token_logprobs": logp, "tokens": [""] * len(ids)},
                    "finish_reason": "length" if done.truncated_B[i] else "stop",
                    "token_ids": ids,
                    "prompt_token_ids": body["prompt"],
                }
            )
        return {"object": "text_completion", "choices": choices}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is part of some tests."""


def _handler(server: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, server.told(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = server.answer(self.path, body)
            if server.fault is not None:
                answer = server.fault(server, self.path, answer)
            if isinstance(answer, int):
                self._send(answer, {"error": {"message": "planned"}})
            elif answer == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            else:
                self._send(200, answer)

        def _send(self, status: int, answer: Any) -> None:
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def slow(seconds: float, times: int = 10**9) -> Fault:
    """Completions that come `seconds` late, the first `times` of them."""
    left = [times]

    def fault(server: FakeVllm, path: str, answer: Any) -> Any:
        if path == "/v1/completions" and left[0] > 0:
            left[0] -= 1
            time.sleep(seconds)
        return answer

    return fault


def instead(value: Any, times: int = 10**9, path: str = "/v1/completions") -> Fault:
    """`value` (or its result on the answer) in place of the first `times` answers."""
    left = [times]

    def fault(server: FakeVllm, at: str, answer: Any) -> Any:
        if at != path or left[0] <= 0:
            return answer
        left[0] -= 1
        return value(answer) if callable(value) else value

    return fault
