"""Which network device messages take, and how the loss of another machine is reported."""

import socket
from collections.abc import Iterator

import psutil
import pytest

from llm_pg.distributed.network import INTERFACE, choose_interface, end_with_the_machine, lost_connection

SEVERAL = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        yield one


def test_the_device_is_the_one_by_which_the_first_machine_is_reached() -> None:
    loopback = [name for name, own in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in own)]
    assert [choose_interface(SEVERAL)] == loopback


@pytest.mark.parametrize("changes", [{"LOCAL_WORLD_SIZE": "4"}, {INTERFACE: "eth7"}, {"MASTER_ADDR": ""}])
def test_one_machine_and_a_device_that_was_named_are_left_alone(changes: dict[str, str]) -> None:
    assert choose_interface({**SEVERAL, **changes}) is None


def test_the_system_asks_the_other_end_of_every_connection_and_ends_a_silent_one(connection: socket.socket) -> None:
    assert not connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert end_with_the_machine(60) >= 1
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, between, times = (
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert idle + between * times == 60
    connection.getpeername()  # it is still open


@pytest.mark.parametrize(
    "text, cause",
    [
        (
            "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:14507: No route to host. This "
            "is typically caused by a remote worker hanging",
            "10.77.0.2: no route to host",
        ),
        (
            "[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:1234. This is typically",
            "10.0.0.7: connection closed by the other end",
        ),
        ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800ms", "Timed out waiting 1800ms"),
        ("CUDA error: an illegal memory access", None),
    ],
)
def test_what_gloo_says_of_a_lost_connection_is_told_from_other_errors(text: str, cause: str | None) -> None:
    """The first two as torch 2.13 raised them."""
    told = lost_connection(RuntimeError(text))
    assert (told or "").endswith(cause or "")
    assert (told is None) == (cause is None)
    assert lost_connection(ValueError(text)) is None
