"""A process of its own for the simulated accelerator, whose import changes torch for good."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def _prepare() -> None:
    from llm_pg.run.logs import throughput
    from tests.device import sim

    sim.accelerate_on_sim()
    throughput.SIDE["sim"] = 256  # the rate of a GPU is measured by products that take a CPU minutes


@pytest.fixture(scope="session")
def on_sim() -> Iterator[Callable[..., Any]]:
    """on_sim(function, ...) calls a function of a module with device="sim:0" there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, device="sim:0", **kwargs).result()
