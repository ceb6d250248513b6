"""E5: a disk that is full, or fails, at any write, flush or fsync of a run."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.run.guard import RunStopped
from llm_pg.run.saving.checkpoint_files import CheckpointError
from tests.faults.conftest import lines
from tests.faults.failing_disk import FailingDisk
from tests.faults.tiny_run import LIGHT, make

pytestmark = pytest.mark.faults
CHANGES = {
    "reward_in_process": True,
    "max_steps": 2,
    "noise_steps": 0,
    "save_steps": 1,
    "num_eval_prompts": 2,
    "eval_on_start": True,
    "eval_steps": 1,
    "log_completions": 1,
    "metric_for_best_model": "eval/greedy",
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"lora": True, "changes": {**CHANGES, "merge_adapter": True}},
    "critic": {"algorithm": "ppo"},
    "resumed": {},
}
MOST = 400  # operations of such a run, at the most


def every_code() -> Iterator[Any]:
    """Of the plain run a tenth of the operations, and the slow rest."""
    yield pytest.param("plain", errno.ENOSPC, True, 10)
    for kind, code, lasting in (
        ("plain", errno.ENOSPC, True),
        ("plain", errno.EIO, False),
        ("plain", errno.EROFS, True),
        ("adapter", errno.EIO, False),
        ("critic", errno.ENOSPC, True),
        ("resumed", errno.ENOSPC, True),
        ("resumed", errno.EIO, False),
    ):
        yield pytest.param(kind, code, lasting, 1, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind, code, lasting, stride", every_code())
def test_a_disk_that_fails_at_any_operation_costs_no_step_and_shows_no_traceback(
    kind: str, code: int, lasting: bool, stride: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"out": str(tmp_path), "changes": CHANGES, **KINDS[kind]}
    make({**options, "name": "whole"}).train()
    expected, resumes = lines(tmp_path / "whole"), kind == "resumed"
    if resumes:
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-000002")
    for number in range(1, MOST, stride):
        folder = tmp_path / f"r{number}"
        if resumes:
            shutil.copytree(tmp_path / "whole", folder)
        trainer = make({**options, "name": folder.name})
        disk, ended = FailingDisk(folder, number, code, lasting=lasting), ""
        capsys.readouterr()
        with disk.open():
            try:
                trainer.train(resume=resumes)
            except (RunStopped, ConfigError, CheckpointError) as error:
                ended = str(error)
        if not disk.hit:
            break
        printed = capsys.readouterr()
        assert "\n" not in ended, (disk.hit, ended)
        assert "Traceback" not in printed.out + printed.err, disk.hit
        if not ended:  # it was said, and what matters is there
            assert list((folder / "model").glob("*model.safetensors")), disk.hit
        again = make({**options, "name": folder.name})
        again.train(resume=True)  # from the newest whole checkpoint, or from the beginning
        assert lines(folder) == expected, disk.hit
        assert json.loads((folder / "summary.json").read_text())["steps"] == 2
        shutil.rmtree(folder)
    else:
        pytest.fail("the run never ended its writes")
    assert number > 25


@pytest.mark.slow
@pytest.mark.parametrize("in_process", [True, False], ids=["quiet", "workers that print"])
def test_a_run_in_a_file_system_of_any_size_ends_with_a_line_or_whole_and_then_goes_on(
    in_process: bool, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """A real file system: all that writes meets its end, by whatever code."""
    changes = {**CHANGES, "reward_in_process": in_process}
    reward = f"{LIGHT}:{'digits' if in_process else 'prints'}"
    make({"out": str(tmp_path), "name": "whole", "changes": changes, "reward": reward}).train()
    expected = lines(tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()) // 1024
    ends = []
    for kilobytes in range(8, 3 * size, 3 * size // 16):
        ended = tiny(f"r{kilobytes}", changes=changes, reward=reward, kilobytes=kilobytes)
        if ended.status == 3:
            pytest.skip("no file system can be mounted here")
        assert ended.status == 0, ended.output
        assert "Traceback" not in ended.output, ended.output
        found = [json.loads(line) for line in (tmp_path / f"r{kilobytes}.jsonl").read_text().splitlines()]
        assert [{k: v for k, v in line.items() if k in expected[0]} for line in found] == expected, kilobytes
        ends += [line for line in ended.output.splitlines() if line == "whole" or line.startswith("ended: ")]
    assert ends[0].startswith("ended: ")
    assert ends[-1] == "whole"
    assert len(ends) > 10
