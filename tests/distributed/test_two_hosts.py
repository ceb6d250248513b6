"""Two hosts, each a network namespace with an address and a name of its own, joined by a wire that can be cut.

    pytest -m slow -n 0 -s tests/distributed/test_two_hosts.py

What the delay costs is printed (-s).
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hosts import TwoHosts, refusal
from tests.distributed.test_four_ranks import same
from tests.faults.conftest import lines, weights
from tests.faults.tiny_run import SIZES, make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
FILES = {"ddp": "ddp_two_nodes.yaml", "fsdp2": "fsdp2_two_nodes.yaml"}
CHANGES = {
    **{"max_steps": 4, "save_steps": 2, "reward_in_process": True, "engine": "native", "adam_epsilon": 1e-3},
    **{"beta": 0.1, "num_iterations": 2, "surrogate": "clip", "per_device_train_batch_size": 3},
}
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SILENCE = 12  # seconds that a machine may be unreachable in these tests
PORT = 8123


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., TwoHosts]]:
    """hosts(delay): two of them, until the test ends."""
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    made: list[TwoHosts] = []

    def enter(delay: float = 0.0) -> TwoHosts:
        made.append(TwoHosts(tmp_path, delay).__enter__())
        return made[-1]

    yield enter
    for each in made:
        each.__exit__()


def launched(hosts: TwoHosts, kind: str, name: str, **options: Any) -> list["subprocess.Popen[bytes]"]:
    """`accelerate launch` on each host, one process each, with the file that users are given."""
    given = json.dumps({"out": str(hosts.folder), "name": name, **options})
    file = ROOT / "configs" / "accelerate" / FILES[kind]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    address = ["--main_process_ip", hosts.addresses[0]]
    script = [str(ROOT / "tests" / "faults" / "tiny_run.py"), given]
    return [
        hosts.start(number, [*launch, "--machine_rank", str(number), *address, *script], QUIET) for number in (0, 1)
    ]


def ended(hosts: TwoHosts, processes: list["subprocess.Popen[bytes]"], seconds: float = 200) -> list[int]:
    """Exit statuses, within so many seconds of all together."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"a host did not end within {seconds} s:\n{hosts.output(0)}\n{hosts.output(1)}")


def after_steps(run: Path, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Returns once the run has done so many steps."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < number:
        assert process.poll() is None, f"it ended before step {number}"
        assert time.monotonic() < deadline, f"no step {number}"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", FILES)
def test_two_hosts_train_as_one_process(kind: str, hosts: Callable[..., TwoHosts], tmp_path: Path) -> None:
    """Each host's own name is a loopback address in its file of names, which no other host reaches."""
    make({"out": str(tmp_path), "name": "one", "changes": CHANGES}).train()
    two = hosts()
    assert ended(two, launched(two, kind, "two", changes=CHANGES)) == [0, 0], two.output(0) + two.output(1)
    assert ("in shards over 2 ranks" in two.output(0)) == (kind == "fsdp2")
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.faults
@pytest.mark.parametrize("kind", FILES)
def test_a_cut_wire_ends_both_hosts_with_the_cause_and_a_resume_goes_on(
    kind: str, hosts: Callable[..., TwoHosts], tmp_path: Path
) -> None:
    two = hosts()
    slow = {"fault": "slow steps", "at": 0, "changes": {**CHANGES, "max_steps": 6, "save_steps": 1}}
    processes = launched(two, kind, "cut", unreachable_seconds=SILENCE, **slow)
    after_steps(tmp_path / "cut", 3, processes[0])
    two.cut()
    began = time.monotonic()
    assert all(ended(two, processes, SILENCE + 40)), two.output(0)
    print(f"\n{kind}: both ended {time.monotonic() - began:.0f} s after the cut, at {SILENCE} s of silence")
    for number in (0, 1):
        other = two.addresses[1 - number]
        assert f"Rank {number} of 2 lost its connection to another rank ({other}: " in two.output(number)
        assert "start all of them again with --resume" in two.output(number)
    two.mend()
    assert ended(two, launched(two, kind, "cut", resume=True, **slow)) == [0, 0], two.output(0)
    assert re.search(r"Going on from .*: [345] steps are done", two.output(0))
    assert ended(two, launched(two, kind, "straight", **slow)) == [0, 0], two.output(0)
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    assert weights(tmp_path / "cut") == weights(tmp_path / "straight")


@pytest.mark.faults
def test_a_host_that_is_only_slow_keeps_its_run(hosts: Callable[..., TwoHosts], tmp_path: Path) -> None:
    """Its processes stand still for longer than a machine may be unreachable."""
    two = hosts()
    processes = launched(two, "ddp", "r", unreachable_seconds=4, fault="slow steps", at=0, changes=CHANGES)
    after_steps(tmp_path / "r", 2, processes[0])
    for signals in (signal.SIGSTOP, signal.SIGCONT):
        two.signal(1, signals)
        time.sleep(12)
    assert ended(two, processes) == [0, 0], two.output(0)


@pytest.mark.fake
@pytest.mark.faults
def test_a_server_on_another_host_serves_until_the_wire_is_cut_and_after(
    hosts: Callable[..., TwoHosts], tmp_path: Path
) -> None:
    """The trainer on one host, the stand-in for vLLM on the other; weights go by the folder that both see."""
    two = hosts()
    two.start(
        1, [sys.executable, str(ROOT / "tests" / "distributed" / "host_server.py"), two.addresses[1], str(PORT)], QUIET
    )
    changes = {**CHANGES, "engine": "vllm", "vllm_urls": [f"http://{two.addresses[1]}:{PORT}"], "save_steps": 1}
    given = {"out": str(tmp_path), "changes": {**changes, "max_steps": 6}, "fault": "slow steps", "at": 0}

    def run(name: str, **more: Any) -> "subprocess.Popen[bytes]":
        options = json.dumps({**given, "name": name, "unreachable_seconds": SILENCE, **more})
        return two.start(0, [sys.executable, str(ROOT / "tests" / "faults" / "tiny_run.py"), options], QUIET)

    assert ended(two, [run("straight")]) == [0], two.output(0)
    assert max(line["sampler_gap"] for line in lines(tmp_path / "straight")) < 1e-5
    process = run("cut")
    after_steps(tmp_path / "cut", 2, process)
    two.cut()
    assert ended(two, [process], 150) != [0]
    assert f"The vLLM server is dead: http://{two.addresses[1]}:{PORT}" in two.output(0)
    two.mend()
    assert ended(two, [run("cut", resume=True)]) == [0], two.output(0)
    assert weights(tmp_path / "cut") == weights(tmp_path / "straight")


def test_a_message_that_takes_50_ms_is_paid_a_few_times_a_step(hosts: Callable[..., TwoHosts], tmp_path: Path) -> None:
    """Beside it the same steps with a message for each of the 111 gradients, as they were before there were buckets."""
    changes = {
        **CHANGES,
        "max_steps": 3,
        "save_steps": 0,
        "num_iterations": 1,
        "num_eval_prompts": 0,
    }
    changes |= {"per_device_train_batch_size": 8, "noise_steps": 0}
    deep = {"sizes": {**SIZES, "num_hidden_layers": 12}, "count_collectives": True, "changes": changes}
    seconds: dict[tuple[float, bool], float] = {}
    for delay in (0.0, 0.05):
        two = hosts(delay)
        for single in (False, True):
            name = f"{delay:g}-{single}"
            assert ended(two, launched(two, "ddp", name, single_messages=single, **deep)) == [0, 0], two.output(0)
            metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            seconds[delay, single] = metrics[-1]["seconds"]
            messages = re.findall(r"collectives (\d+)", two.output(0))[-1]
            how = "a message a gradient" if single else "buckets"
            print(f"\n{delay * 1e3:.0f} ms, {how}: {messages} messages a step, {seconds[delay, single]:.2f} s")
    assert seconds[0.05, False] < 2.5
    assert seconds[0.05, True] > 4 * seconds[0.05, False]
    assert weights(tmp_path / "0.05-True") == weights(tmp_path / "0-False")
