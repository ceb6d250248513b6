"""R5, R6, R7: a save that is killed anywhere, or finds no room, leaves the older checkpoint to go on from."""

import ctypes
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_pg.run.saving import checkpoint_files
from llm_pg.run.saving.checkpoint_files import CheckpointError, RunState

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
TRACEME, PEEKUSER, SYSCALL, SETOPTIONS = 0, 3, 24, 0x4200
EXITKILL, SYSGOOD = 0x100000, 1
ORIG_RAX = 8 * 15
# x86_64: write pwrite64 writev fsync fdatasync truncate ftruncate rename mkdir rmdir creat unlink openat mkdirat
# unlinkat renameat fallocate renameat2
FILE_CALLS = {1, 18, 20, 74, 75, 76, 77, 82, 83, 84, 85, 87, 257, 258, 263, 264, 285, 316}


def state(step: int) -> RunState:
    return RunState(step, {"w": torch.full((40, 30), float(step))}, {"0.exp_avg": torch.zeros(40, 30)}, {"x": 0.1})


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run `work` in a fork under ptrace and SIGKILL it as it enters its n-th file operation; False: it ended before."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    child = os.fork()
    if child == 0:
        if libc.ptrace(TRACEME, 0, None, None) != 0:
            os._exit(77)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77:
        pytest.skip("the kernel forbids ptrace of a child")
    libc.ptrace(SETOPTIONS, child, None, EXITKILL | SYSGOOD)
    seen, entering = 0, True
    while True:
        libc.ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            continue
        if entering and libc.ptrace(PEEKUSER, child, ORIG_RAX, None) in FILE_CALLS:
            seen += 1
            if seen == number:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
        entering = not entering


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86_64 registers by ptrace"
)
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint_and_at_most_one_warning(tmp_path: Path) -> None:
    number, newest = 0, set()
    while True:
        number += 1
        root = tmp_path / str(number)
        for step in (1, 2):
            checkpoint_files.save(root, state(step), {})

        def save(root: Path = root) -> None:
            checkpoint_files.save(root, state(3), {}, keep=2)

        if not killed_at(number, save):
            break
        found, warnings = checkpoint_files.newest(root)
        assert found is not None, number
        step = int(found.name[5:])
        newest.add(step)
        assert torch.equal(checkpoint_files.load(found)[0].weights["w"], state(step).weights["w"])
        assert step in (2, 3)
        assert len(warnings) == (step == 2 and checkpoint_files.folder_of(root, 3).exists())
        assert all("step-000003" in warning for warning in warnings)
        checkpoint_files.save(root, state(3), {}, keep=2)
        assert checkpoint_files.newest(root) == (checkpoint_files.folder_of(root, 3), [])
    assert number > 15
    assert newest == {2, 3}


def in_a_fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", [1000, 3000, 5200])
def test_a_save_that_the_file_size_limit_cuts_is_one_line_and_leaves_nothing(
    limit: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """RLIMIT_FSIZE makes a write fail as a full disk does: in the first file, in its middle, or in the last."""
    old = checkpoint_files.save(tmp_path, state(1), {})

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError) as refused:
            checkpoint_files.save(tmp_path, RunState(2, state(2).weights, state(2).optimizer, {"x": "y" * 6000}), {})
        sys.stderr.write(str(refused.value))

    assert in_a_fork(save) == 0
    text = capfd.readouterr().err
    assert "\n" not in text
    assert "Step 2 was not saved: it needs 9,600 bytes at " in text
    assert "free" in text
    assert checkpoint_files.newest(tmp_path) == (old, [])
    assert not checkpoint_files.folder_of(tmp_path, 2).exists()


FULL_DISK = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from llm_pg.run.saving import checkpoint_files
root = Path(sys.argv[1]) / "c"
state = lambda step, size: checkpoint_files.RunState(step, {"w": torch.zeros(size)}, {"m": torch.zeros(size)}, {})
old = checkpoint_files.save(root, state(1, 40_000), {})
for size in (400_000, 80_000):  # larger than what is free; than what is free when it comes to the second file
    try:
        if size == 80_000:
            checkpoint_files.check_room = lambda *_: None
        checkpoint_files.save(root, state(2, size), {})
    except checkpoint_files.CheckpointError as error:
        print(error)
    assert checkpoint_files.newest(root) == (old, []), checkpoint_files.newest(root)
"""


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=800k none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path} {ROOT}'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, FULL_DISK],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"the kernel gives no mount namespace: {done.stderr.strip()[:80]}")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert "needs 3,200,000 bytes" in first
    assert "free" in second


def header_only(folder: Path, numbers: int) -> None:
    """A model folder whose safetensors header claims so many numbers and holds none."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("save_steps, copies", [(10, 3), (0, 1)])
def test_no_room_for_one_checkpoint_is_refused_before_the_model_loads(
    save_steps: int, copies: int, tmp_path: Path
) -> None:
    header_only(tmp_path / "model", 10**15)
    config = {"model": {"model_name_or_path": str(tmp_path / "model")}, "data": {"task": "sort_letters"}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    code = "import sys; sys.modules['torch'] = None; from llm_pg.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = [f"output_dir={tmp_path}/runs", f"save_steps={save_steps}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "c.yaml"), *settings],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert f"needs about {4 * copies * 10**15:,} bytes at {tmp_path}/runs/" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
