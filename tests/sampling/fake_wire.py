"""Both ends of a transfer of weights with gloo in NCCL's place: what the trainer opens, and what a server of vLLM 0.32
does on the calls of its weight-transfer API (`NCCLWeightTransferEngine`, packed)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from llm_pg.sampling.vllm.transfer import TransferError

TRANSFER = tuple(
    f"/{name}"
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
)
PATIENCE = timedelta(seconds=6)


class GlooWire:
    """The trainer's end, made as `transfer.NcclWire` is."""

    def __init__(self, address: str, port: int, size: int, device: torch.device) -> None:
        self.group = joined(address, port, 0, size)
        self.sent: list[Tensor] = []
        self.closed = False
        self._under_way: list[Any] = []

    def send(self, x: Tensor, stop: threading.Event) -> None:
        assert x.dtype == torch.uint8
        self.sent.append(x)
        self._under_way.append(self.group.broadcast([x], root()))

    def flush(self, stop: threading.Event) -> None:
        for work in self._under_way:
            while not work.is_completed():
                if stop.wait(0.002):
                    raise TransferError("broken off")
            work.wait()
        self._under_way = []

    def close(self) -> None:
        self.closed = True


def joined(address: str, port: int, rank: int, size: int) -> ProcessGroupGloo:
    store = TCPStore(address, port, size, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False)
    return ProcessGroupGloo(store, rank, size, PATIENCE)


def root() -> BroadcastOptions:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


class Receiver:
    """The server's workers. workers: how many there are, each of which gets all weights."""

    def __init__(self, backend: str = "nccl", workers: int = 1) -> None:
        self.backend, self.workers = backend, workers
        self.groups: list[ProcessGroupGloo] = []
        self.limit = 0
        self.active = False
        self.arrived: dict[str, Tensor] = {}
        self.buffers = 0

    def answer(self, model: Any, path: str, body: dict[str, Any]) -> Any:
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            assert info["packed"]
            self.limit = info["packed_buffer_size_bytes"]
            threads = [
                threading.Thread(target=self._join, args=(info, info["rank_offset"] + i)) for i in range(self.workers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        elif path == "/start_weight_update":
            assert not self.active
            self.active, self.arrived = True, {}
        elif path == "/update_weights":
            assert self.active
            self.receive(body["update_info"])
        else:
            assert self.active
            self.active = False
            model.load_state_dict(self.arrived)
        return {"message": "done"}

    def _join(self, info: dict[str, Any], rank: int) -> None:
        self.groups.append(joined(info["master_address"], info["master_port"], rank, info["world_size"]))

    def receive(self, info: dict[str, Any]) -> None:
        for group in self.groups:
            for metas in self._cut(info):
                sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in metas]
                packed = torch.empty(sum(sizes), dtype=torch.uint8)
                group.broadcast([packed], root()).wait()
                self.buffers += 1
                for (name, dtype, shape), x in zip(metas, packed.split(sizes), strict=True):
                    self.arrived[name] = x.clone().view(dtype).view(shape)

    def _cut(self, info: dict[str, Any]) -> Iterator[list[tuple[str, torch.dtype, list[int]]]]:
        metas, size = [], 0
        for name, dtype_name, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, dtype_name)
            metas.append((name, dtype, shape))
            size += math.prod(shape) * dtype.itemsize
            if size > self.limit:
                yield metas
                metas, size = [], 0
        if metas:
            yield metas
