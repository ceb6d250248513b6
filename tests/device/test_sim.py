"""The simulation itself: it counts what a host waits for, knows whose line asked, and refuses mixed devices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.device import to_device


def mixed(*, device: str) -> str:
    try:
        torch.ones(3, device=device) + torch.ones(3)
    except RuntimeError as error:
        return str(error)
    return ""


def kinds(*, device: str) -> dict[str, list[str]]:
    from tests.device import sim

    x, index = torch.arange(6, device=device), torch.tensor([1, 2])
    there = to_device(index, device)
    works: dict[str, Callable[[], Any]] = {
        "a number": lambda: x.sum().item(),
        "a branch": lambda: bool(x[0] > 1),
        "a list": x.tolist,
        "places of what is true": lambda: (x > 2).nonzero(),
        "a mask": lambda: x[x > 2],
        "a copy back": x.cpu,
        "a list there": lambda: torch.tensor([1, 2], device=device),
        "a copy there": lambda: index.to(device),
        "an index of the host": lambda: x[index],
        "an index that is there": lambda: x[there],
        "a copy that does not wait": lambda: to_device(index, device),
        "a filled mask": lambda: x.clone().masked_fill_(x > 2, 0),
        "a product": lambda: x * 2 + torch.zeros(6, device=device).long(),
    }
    found = {}
    for name, work in works.items():
        with sim.waits() as waits:
            work()
        found[name] = [kind for kind, _ in waits]
    with sim.waits() as waits:
        to_device([1, 2], "cpu")
        to_device(torch.ones(2, device=device), "cpu")
    found["line"] = [line for _, line in waits]
    return found


def test_what_waits_is_counted_and_nothing_else(on_sim: Callable[..., Any]) -> None:
    found = on_sim(kinds)
    assert found.pop("line")[0].startswith("llm_pg/device.py:")
    silent = {"an index that is there", "a copy that does not wait", "a filled mask", "a product"}
    assert {name for name, kinds in found.items() if not kinds} == silent
    assert all(len(kinds) <= 1 for kinds in found.values())


def test_tensors_of_two_devices_do_not_meet(on_sim: Callable[..., Any]) -> None:
    assert "meet in aten.add.Tensor" in on_sim(mixed)


def test_this_process_has_no_simulated_device() -> None:
    with pytest.raises(RuntimeError):
        torch.ones(1, device="sim:0")
