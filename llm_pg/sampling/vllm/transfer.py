"""Weights to a server's GPUs over NCCL, by vLLM's own calls (`--weight-transfer-config '{"backend": "nccl"}'`).

The trainer is rank 0 of a group that it opens with each server. The server is asked to join it
(/init_weight_transfer_engine); for each state of the weights it is told which tensors come (/start_weight_update,
/update_weights), they are broadcast in that order while it answers, and it is told that all have come
(/finish_weight_update). Tensors travel in buffers of bytes, which both sides cut by the same rule: a buffer ends with
the tensor that takes it over the limit.

A call and the broadcast beside it wait for one another inside NCCL, so neither is waited for once the other has failed.

Departures: a group for each server, one after the other, where one group of all would send once: a server that dies
breaks its own group alone. It has not been run on a GPU; see docs/scaling.md.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .client import Client
from .errors import EngineError
from .settings import name_of
from .weights import cast

BUFFER_BYTES = 2**28
BUFFERS = 2  # under way at once
GRACE = 1.0  # seconds in which a server may refuse to join
SLICE = 0.002  # seconds between looks at what is under way


class TransferError(Exception):
    """Weights do not get there this way; the text says why."""


class Wire(Protocol):
    """Rank 0 of a group with a server's workers."""

    def send(self, x: Tensor, stop: threading.Event) -> None:
        """Broadcast `x`; it may still be under way afterwards. TransferError when `stop` is set meanwhile."""

    def flush(self, stop: threading.Event) -> None:
        """Until all has arrived."""

    def close(self) -> None:
        """Break off whatever is under way."""


OpenWire = Callable[[str, int, int, torch.device], Wire]  # of address, port, size of the group, device


def check_nccl() -> None:
    """TransferError where this process cannot take part."""
    if importlib.util.find_spec("vllm") is None:
        raise TransferError("the trainer's environment has no vllm, whose NCCL communicator joins the group")


class NcclWire:
    """vLLM's communicator. Args: of the store where the group meets; size: of the group; device: of the weights."""

    def __init__(self, address: str, port: int, size: int, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.device = device
        self._under_way: collections.deque[tuple[Tensor, Any]] = collections.deque()
        with torch.cuda.device(device):
            self._group = trainer_init({"master_address": address, "master_port": port, "world_size": size})

    def send(self, x: Tensor, stop: threading.Event) -> None:
        with torch.cuda.device(self.device):
            self._group.broadcast(x, src=0, stream=torch.cuda.current_stream())
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((x, event))  # the tensor lives until it has been read
        while len(self._under_way) > BUFFERS:
            self._first(stop)

    def flush(self, stop: threading.Event) -> None:
        while self._under_way:
            self._first(stop)

    def close(self) -> None:
        self._group.destroy()  # vLLM aborts the communicator
        self._under_way.clear()

    def _first(self, stop: threading.Event) -> None:
        _, event = self._under_way[0]
        while not event.query():
            if stop.wait(SLICE):
                raise TransferError("the broadcast was broken off")
        self._under_way.popleft()


class Transfer:
    """Weights to one server. TransferError, at any call, where they cannot go this way (any more).

    Args:
        client: of the server. device: of the weights. open_wire: joins the group as its rank 0.
    """

    def __init__(self, client: Client, device: torch.device, open_wire: OpenWire = NcclWire) -> None:
        self.client = client
        with _told():
            size = int(client.get("/get_world_size")["world_size"]) + 1
            address = address_towards(client.url)
            port = _free_port(address)
            info = {
                **{"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size},
                **{"packed": True, "packed_buffer_size_bytes": BUFFER_BYTES, "packed_num_buffers": BUFFERS},
            }
            self.wire: Wire = beside(
                lambda: client.post("/init_weight_transfer_engine", {"init_info": info}),
                # A server that refuses does so at once; the store would wait minutes for it.
                lambda stop: None if stop.wait(GRACE) else open_wire(address, port, size, device),
                client.timeout,
            )

    def send(self, weights: Mapping[str, Tensor], dtype: torch.dtype, note: Callable[[str, Tensor], None]) -> None:
        """All weights, floating ones as `dtype`. note: is given each as it is sent."""
        kinds = [dtype if x.is_floating_point() else x.dtype for x in weights.values()]
        info = {
            "names": list(weights),
            "dtype_names": [name_of(kind) for kind in kinds],
            "shapes": [list(x.shape) for x in weights.values()],
        }

        def broadcast(stop: threading.Event) -> None:
            for buffer in buffers(_noted(weights, dtype, note), BUFFER_BYTES):
                self.wire.send(buffer, stop)
            self.wire.flush(stop)

        with _told():
            self.client.post("/start_weight_update", {})
            beside(lambda: self.client.post("/update_weights", {"update_info": info}), broadcast, self.client.timeout)
            self.client.post("/finish_weight_update", {})

    def close(self) -> None:
        self.wire.close()


def wants_nccl(client: Client) -> bool:
    """Whether the server was started to get its weights over NCCL."""
    try:
        reported = client.get("/server_info?config_format=json")
    except EngineError:  # it has no such call
        return False
    config = reported.get("vllm_config") if isinstance(reported, dict) else None
    asked = config.get("weight_transfer_config") if isinstance(config, dict) else None
    return isinstance(asked, dict) and asked.get("backend") == "nccl"


def buffers(tensors: Iterator[Tensor], limit: int) -> Iterator[Tensor]:
    """Their bytes in order, cut behind each tensor that takes a buffer over `limit` bytes."""
    parts: list[Tensor] = []
    size = 0
    for x in tensors:
        parts.append(x.reshape(-1).view(torch.uint8))
        size += parts[-1].numel()
        if size > limit:
            yield torch.cat(parts)
            parts, size = [], 0
    if parts:
        yield torch.cat(parts)


@torch.no_grad()
def _noted(weights: Mapping[str, Tensor], dtype: torch.dtype, note: Callable[[str, Tensor], None]) -> Iterator[Tensor]:
    for name, x in weights.items():
        sent = cast(x, dtype)
        note(name, sent)
        yield sent


def beside(call: Callable[[], Any], work: Callable[[threading.Event], Any], seconds: float) -> Any:
    """The result of `work`, done while `call` is answered. The first error of either, without waiting for the other."""
    news, stop = threading.Condition(), threading.Event()
    done: dict[str, Any] = {}
    failed: list[Exception] = []

    def run(name: str, part: Callable[[], Any]) -> None:
        try:
            result = part()
        except Exception as error:  # noqa: BLE001 - raised again by the caller's thread
            with news:
                failed.append(error)
                news.notify()
        else:
            with news:
                done[name] = result
                news.notify()

    # Daemons: one that is stuck in NCCL must not keep the process from ending.
    for name, part in (("call", call), ("work", lambda: work(stop))):
        threading.Thread(target=run, args=(name, part), daemon=True).start()
    with news:
        news.wait_for(lambda: failed or len(done) == 2, timeout=seconds)
        if not failed and len(done) == 2:
            return done["work"]
    stop.set()
    if failed:
        raise failed[0]
    raise TransferError(f"it did not end within {seconds:g} s")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the server, of sockets, or of NCCL: the files are left
        cause = " ".join(str(error).split())[:500]
        raise TransferError(cause or type(error).__name__) from error


def address_towards(url: str) -> str:
    """This machine's address in the network of the server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "", port), timeout=10.0) as s:
        return str(s.getsockname()[0])


def _free_port(address: str) -> int:
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        return int(s.getsockname()[1])
