"""A loop of one's own on two ranks, each with its share of a step's prompts, is that of one process."""

import multiprocessing
import socket
from pathlib import Path

from tests.distributed.own_loop_worker import train, train_on_rank
from tests.distributed.sameness import distance


def test_two_ranks_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.tiny_run"])
    children = [context.Process(target=train_on_rank, args=(two, rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    train(one)
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0, 0]
    assert distance(two, one) < 1e-6
