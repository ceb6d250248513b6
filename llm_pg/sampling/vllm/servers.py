"""vLLM in servers: started here or found running, with weights by files or over NCCL."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...model.attention import core_of
from .answers import Answer, Ask
from .client import Client
from .errors import EngineError
from .host import State
from .pool import ServerPool
from .server import LocalServer
from .settings import Settings, name_of
from .transfer import NcclWire, Transfer, TransferError, check_nccl, wants_nccl
from .weights import FILE, Lately, named, tensors, write_model, write_weights

NCCL_DEVICES = ("cuda",)
AFTER_FAILURE = 60.0  # seconds for the files that stand in for a transfer that broke off
PROMPTS_AT_ONCE = 64  # requests in flight per server; each is a whole group


class Servers:
    """A `Host` of servers.

    Args:
        tokenizer: served with the model. folder: for weights and log, seen by the servers too. python: of an
            environment with vllm, to start a server; None = those of `settings`. dtype: of the served weights.
        rows_at_once: completions in flight; None = as many prompts as the servers batch.
    """

    merges = True  # adapters are served as a part of the weights

    def __init__(
        self,
        tokenizer: Any,
        folder: Path,
        settings: Settings,
        *,
        python: str | None,
        dtype: torch.dtype,
        rows_at_once: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.folder, self.settings, self.dtype = tokenizer, folder, settings, dtype
        self.python, self.rows_at_once, self.say = python, rows_at_once, say
        self.served: State | None = None
        self.local: LocalServer | None = None
        self.advice = ""
        if python is None:
            self.advice = (
                f"A server of your own must be started from {folder / 'model'}, where embeddings are untied, with "
                "--logprobs-mode processed_logprobs, must see the run's folder, and must serve this run alone."
            )
        self._written: State | None = None  # of the newest folder
        self._weights: list[Path] = []  # folders of the last two states written, oldest first
        self._ready, self._number = False, 0
        self._one_at_a_time = threading.Lock()
        self._transfers: dict[str, Transfer | None] = {}  # by address; None = as files
        self._left: set[str] = set()  # in the middle of a transfer: such a server may wait for the rest for ever
        self.lately = Lately()
        self._noted: State | None = None

    def start(self, model: Any, present: State) -> None:
        """Write the folder that servers start from, and start one unless some were given, without waiting for it."""
        start = self.folder / "model"
        write_model(start, model, self.tokenizer, tensors(model, self.dtype, merges=self.merges))
        self._written, self._weights = present, [start]
        urls = list(self.settings.urls)
        if self.python is not None:
            # Where a prompt is cut into chunks, vLLM sets a seeded request's generator back, which a CPU's cannot: the
            # worker ends (0.32). A trainer on a CPU starts its server there too.
            on_cpu = core_of(model).device.type == "cpu"
            options = {"no-enable-chunked-prefill": on_cpu, **self._flags(model), **self.settings.options}
            log = self.folder / "server.log"
            self.local = LocalServer(self.python, start, log, name_of(self.dtype), options)
            # The server also ends with this object and with the interpreter, whatever the caller does.
            self._end = weakref.finalize(self, self.local.stop)
            self.served, urls = present, [self.local.url]
        self.pool = ServerPool([Client(url, self.settings.request_timeout) for url in urls], say=self.say)

    def _flags(self, model: Any) -> dict[str, Any]:
        """Of a server that is started here, beside those of the settings."""
        return {}

    def _body(self, ask: Ask) -> dict[str, Any]:
        return ask.body()

    def wait(self) -> None:
        if self._ready:
            return
        if self.local is not None:
            self.local.wait(self.settings.start_timeout)
        else:
            self.pool.wait(self.settings.start_timeout, f"they start from {self.folder / 'model'}")
        self._ready = True

    def load(self, model: Any, present: State) -> None:
        self.pool.tell_all(lambda client: self._bring(client, model, present))
        self.served = present

    def complete(self, asks: Sequence[Ask]) -> list[tuple[list[Answer], str]]:
        def one(ask: Ask) -> tuple[list[Answer], str]:
            answers, url = self.pool.ask("/v1/completions", self._body(ask), ask.read)
            return answers, f"the vLLM server {url}"

        at_once = PROMPTS_AT_ONCE * len(self.pool.members)
        if self.rows_at_once is not None:
            at_once = max(self.rows_at_once // asks[0].count, 1)
        with ThreadPoolExecutor(min(at_once, len(asks))) as threads:
            return list(threads.map(one, asks))

    def older(self) -> dict[str, Tensor] | None:
        if len(self._weights) == 2 or self.lately.states:  # of the first state sent, the folder of the start
            return self.lately.older() or load_file(self._weights[0] / FILE)
        return None

    def explained(self, error: EngineError) -> EngineError:
        return error if self.local is None else EngineError(f"{error} {self.local.reported()}")

    def stop(self) -> None:
        if self.local is not None:
            self._end()
        for transfer in self._transfers.values():
            if transfer is not None:
                transfer.close()
        self._transfers = {}

    def _bring(self, client: Client, model: Any, present: State) -> None:
        """Over NCCL where the server was started for it and the trainer can, otherwise by files."""
        try:
            with self._one_at_a_time:
                sent = self._by_transfer(client, model, present)
        except TransferError as error:
            how = "over NCCL and go to it as files from now on"
            self.say(f"Weights do not reach the vLLM server {client.url} {how}: {error}.")
            self._drop(client.url)
            sent = False
            self._left.add(client.url)
        if sent:
            return
        if client.url in self._left:
            client = Client(client.url, min(client.timeout, AFTER_FAILURE))
        self._by_files(client, model, present)
        self._left.discard(client.url)

    def _by_transfer(self, client: Client, model: Any, present: State) -> bool:
        device = core_of(model).device
        if client.url not in self._transfers:
            wanted = device.type in NCCL_DEVICES and wants_nccl(client)
            self._transfers[client.url] = None
            if wanted:
                check_nccl()
                self._transfers[client.url] = Transfer(client, device, NcclWire)
        transfer = self._transfers[client.url]
        if transfer is None:
            return False
        note = _nothing if present == self._noted else self.lately.begin(model)
        self._noted = present
        transfer.send(named(model), self.dtype, note)
        return True

    def _drop(self, url: str) -> None:
        transfer, self._transfers[url] = self._transfers.get(url), None
        if transfer is not None:
            transfer.close()

    def _by_files(self, client: Client, model: Any, present: State) -> None:
        """Two folders in turns: the one before stays, to tell which of its weights a server kept."""
        with self._one_at_a_time:
            if present != self._written:
                folder = self.folder / f"weights-{self._number % 2}"
                write_weights(folder, tensors(model, self.dtype))
                self._number += 1
                self._written, self._weights = present, [*self._weights, folder][-2:]
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights[-1])}}
        client.post("/collective_rpc", body)


def _nothing(name: str, x: Tensor) -> None:
    """Of a state that is remembered already."""
