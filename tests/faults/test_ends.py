"""E1, E3, E4, E5, E6: whatever ends a run, its model is there or the reason is said; and a run can be made longer."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from llm_pg.cli import main
from llm_pg.config import ConfigError
from llm_pg.rewards import RewardError
from llm_pg.run.before import rehearsal
from llm_pg.run.guard import RunStopped
from llm_pg.run.saving import checkpoint_files, lock
from llm_pg.run.saving.checkpoint_files import CheckpointError, RunState
from llm_pg.run.saving.lock import FolderLock
from tests.faults.conftest import lines
from tests.faults.tiny_run import ROWS, make

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
SHORT = {"reward_in_process": True, "max_steps": 2, "noise_steps": 0}
JUDGE = """
import os, signal
def judge(completion, answer, held, **row):
    if held and os.environ.get("JUDGE") == "raises":
        raise OSError("the judge is down")
    if held and os.environ.get("JUDGE") in ("SIGTERM", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, os.environ.pop("JUDGE")))
    return float(completion[:1] == answer)
"""


def judged(folder: Path, **changes: Any) -> Any:
    """A trainer whose judge can fail on the held-out rows alone."""
    (folder / "judge.py").write_text(JUDGE)
    trained = [{**row, "held": 0} for row in ROWS]
    given = {**SHORT, "strict": True, "num_eval_prompts": 0, **changes}
    trainer = make(
        {"out": str(folder), "name": "r", "changes": given, "rows": trained, "reward": f"{folder}/judge.py:judge"}
    )
    prompts = trainer.train_prompts[:3]
    trainer.evaluator.prompts = [type(p)(p.index, p.text, p.messages, p.ids, {**p.row, "held": 1}) for p in prompts]
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "r" / "model").state_dict()


def test_a_judge_that_fails_in_the_last_evaluation_costs_the_evaluation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE", "raises")
    trainer = judged(tmp_path)
    with pytest.raises((RewardError, RunStopped)):
        trainer.train()
    out = capsys.readouterr().out
    assert "The evaluation after step 2 failed" in out
    assert (tmp_path / "r" / "crash" / "after-step-000002" / "error.txt").exists()
    saved = weights(tmp_path)
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())
    assert not (tmp_path / "r" / "summary.json").exists()

    monkeypatch.delenv("JUDGE")
    judged(tmp_path).train(resume=True)
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["num_eval_prompts"] == 3
    assert all(torch.equal(saved[name], value) for name, value in weights(tmp_path).items())
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2]


def train_judged(folder: Path, signal_name: str) -> None:
    os.environ["JUDGE"] = signal_name
    judged(folder).train()


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGKILL", -signal.SIGKILL)])
def test_a_signal_in_the_last_evaluation_leaves_model_and_checkpoint(name: str, code: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.tiny_run"])
    child = context.Process(target=train_judged, args=(tmp_path, name))
    child.start()
    child.join(200)
    assert child.exitcode == code
    assert weights(tmp_path)
    assert checkpoint_files.newest(tmp_path / "r" / "checkpoints")[0] == tmp_path / "r" / "checkpoints" / "step-000002"


class Spoil(TrainerCallback):
    """Makes a weight not a number after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(iter(model.parameters())).view(-1)[0] = float("nan")


def test_a_weight_that_is_no_number_after_the_last_step_is_not_saved_and_the_last_good_one_is_named(
    tmp_path: Path,
) -> None:
    trainer = make({"out": str(tmp_path), "name": "r", "changes": {**SHORT, "save_steps": 1}})
    trainer.add_callback(Spoil(2))
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights hold NaN or inf .*checkpoint 1 in"):
        trainer.train()
    assert not (tmp_path / "r" / "model").exists()
    assert checkpoint_files.newest(tmp_path / "r" / "checkpoints")[0] == tmp_path / "r" / "checkpoints" / "step-000001"


def test_a_learning_rate_that_destroys_the_weights_ends_the_command_with_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "quickstart.yaml",
        "learning_rate=1e38",
        "max_steps=1",
        "warm_start_steps=0",
        "entropy_coef=1",
        "beta=0",
    ]
    sizes = [
        "num_train_prompts=16",
        "num_eval_prompts=2",
        "prompts_per_step=2",
        "eval_on_start=false",
        "warmup_steps=0",
    ]
    assert main(["train", *given, *sizes, f"output_dir={tmp_path}", "run_name=r"]) == 1
    assert "weights hold NaN or inf" in capsys.readouterr().err
    assert not (tmp_path / "r" / "model").exists()


def test_a_checkpoint_of_the_last_step_is_written_unless_that_is_declined(tmp_path: Path) -> None:
    for name, wanted in (("kept", True), ("none", False)):
        make({"out": str(tmp_path), "name": name, "changes": {**SHORT, "save_at_end": wanted}}).train()
        assert (tmp_path / name / "checkpoints" / "step-000002" / "manifest.json").exists() == wanted


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_that_long(tmp_path: Path) -> None:
    changes = {**SHORT, "lr_scheduler_type": "constant"}
    make({"out": str(tmp_path), "name": "r", "changes": changes}).train()
    longer = {**changes, "max_steps": 4}
    make({"out": str(tmp_path), "name": "r", "changes": longer}).train(resume=True)
    make({"out": str(tmp_path), "name": "whole", "changes": longer}).train()
    assert lines(tmp_path / "r") == lines(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path).items())
    assert "max_steps: 4" in (tmp_path / "r" / "config.yaml").read_text()


def test_a_longer_run_says_what_becomes_of_a_schedule_that_is_spread_over_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**SHORT, "lr_scheduler_type": "linear", "learning_rate": 0.01}
    make({"out": str(tmp_path), "name": "r", "changes": changes}).train()
    make({"out": str(tmp_path), "name": "r", "changes": {**changes, "max_steps": 4}}).train(resume=True)
    assert "max_steps was 2 and is 4 now" in capsys.readouterr().out
    assert [line["learning_rate"] for line in lines(tmp_path / "r")] == [0.01, 0.005, 0.005, 0.0025]
    with pytest.raises(ConfigError, match="is of step 4, and max_steps is 3"):
        make({"out": str(tmp_path), "name": "r", "changes": {**changes, "max_steps": 3}}).train(resume=True)


HOLD = "import sys, time; from pathlib import Path; from llm_pg.run.saving.lock import FolderLock\n"
HOLD += "with FolderLock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that writes the run's folder."""
    (tmp_path / "r").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "r")], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("resume", [False, True])
def test_a_live_run_s_folder_is_refused_by_number_and_taken_over_once_it_is_killed(
    resume: bool, holder: Any, tmp_path: Path
) -> None:
    trainer = make({"out": str(tmp_path), "name": "r", "changes": SHORT})
    with pytest.raises(ConfigError, match=rf"process {holder.pid} on .*run_name"):
        trainer.train(resume=resume)
    holder.kill()
    holder.wait()
    make({"out": str(tmp_path), "name": "r", "changes": SHORT}).train()
    with FolderLock(tmp_path / "r"), pytest.raises(ConfigError, match="Another run of this process"):
        make({"out": str(tmp_path), "name": "r", "changes": {**SHORT, "overwrite": True}}).train()


def test_without_locks_of_the_file_system_the_process_named_in_the_file_decides(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    import fcntl

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        lock.check_free(tmp_path / "r")
    holder.kill()
    holder.wait()
    lock.check_free(tmp_path / "r")
    facts = json.loads((tmp_path / "r" / lock.NAME).read_text())
    (tmp_path / "r" / lock.NAME).write_text(json.dumps({**facts, "pid": os.getpid()}))
    lock.check_free(tmp_path / "r")  # the number was given to a process that began later
    (tmp_path / "r" / lock.NAME).write_text(json.dumps({**facts, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match=r"on elsewhere.*If that process is gone, delete"):
        lock.check_free(tmp_path / "r")


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_seen(tmp_path: Path) -> None:
    state = RunState(1, {"w": torch.ones(3)}, {"w.exp_avg": torch.zeros(3)}, {"x": 0.1})
    folder = checkpoint_files.save(tmp_path, state, {"config": {"seed": 1}, "versions": {"torch": "é"}})
    assert checkpoint_files.problem(folder) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            path.write_bytes(bytes(spoiled))
            assert checkpoint_files.problem(folder) is not None, (path.name, place)
        path.write_bytes(whole)
    assert checkpoint_files.problem(folder) is None


def test_a_checkpoint_whose_manifest_has_no_checksum_of_its_own_still_loads(tmp_path: Path) -> None:
    folder = checkpoint_files.save(tmp_path, RunState(1, {"w": torch.ones(3)}, {}, {}), {"config": {}})
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}, indent=1))
    assert checkpoint_files.load(folder)[0].step == 1
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert checkpoint_files.problem(folder) == "its manifest is not what was written"


class FullDisk:
    """The n-th opening for writing of a file in a folder fails, and all after it, as on a full or read-only disk."""

    def __init__(self, folder: Path, number: int, code: int) -> None:
        self.folder, self.left, self.code, self.hit = str(folder), number, code, ""
        self.open = io.open

    def __call__(self, file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        inside = str(file).startswith(self.folder)
        if inside and set(mode) & set("wax+") and Path(str(file)).name != lock.NAME:
            self.left -= 1
            if self.left <= 0:
                self.hit = self.hit or str(file)
                raise OSError(self.code, os.strerror(self.code), str(file))
        return self.open(file, mode, *given, **named)


@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_any_write_ends_the_run_with_a_line_or_not_at_all(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**SHORT, "save_steps": 1, "num_eval_prompts": 2, "eval_on_start": True, "log_completions": 1}
    make({"out": str(tmp_path), "name": "whole", "changes": changes}).train()
    expected = lines(tmp_path / "whole")
    for number in range(1, 100):
        trainer = make({"out": str(tmp_path), "name": f"r{number}", "changes": changes})
        disk, ended = FullDisk(tmp_path / f"r{number}", number, code), "whole"
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", disk)
            patched.setattr(io, "open", disk)
            try:
                trainer.train()
            except (RunStopped, ConfigError, CheckpointError) as error:
                ended = str(error)
        if not disk.hit:
            break
        assert "\n" not in ended, (disk.hit, ended)
        again = make({"out": str(tmp_path), "name": f"r{number}", "changes": changes})
        again.train(resume=True)  # from the newest whole checkpoint, or from the beginning
        assert lines(tmp_path / f"r{number}") == expected, disk.hit
    else:
        pytest.fail("the run never ended its writes")
    assert number > 8


def test_a_generation_config_that_cannot_be_saved_is_found_before_the_first_step(tmp_path: Path) -> None:
    trainer = make({"out": str(tmp_path), "name": "r", "changes": SHORT})
    trainer.model.generation_config.temperature = 0.7
    with pytest.raises(ConfigError, match=r"its generation_config refuses .*temperature.*do_sample = True"):
        trainer.train()
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    assert [path.name for path in (tmp_path / "r").iterdir()] in ([], [lock.NAME])
    trainer = make({"out": str(tmp_path), "name": "r", "changes": SHORT})
    trainer.model.generation_config.update(temperature=0.7, do_sample=True)
    trainer.train()
    assert weights(tmp_path)


def test_a_tokenizer_that_cannot_be_saved_and_a_disk_without_room_are_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this tokenizer has no files")

    trainer = make({"out": str(tmp_path), "name": "r", "changes": SHORT})
    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", refuses)
    with pytest.raises(ConfigError, match=r"its tokenizer refuses .NotImplementedError: this tokenizer has no files"):
        trainer.train()
    trainer = make({"out": str(tmp_path), "name": "r", "changes": SHORT})
    monkeypatch.setattr(rehearsal, "model_bytes", lambda model, merges: 10**18)
    with pytest.raises(ConfigError, match=r"no room for the trained model: it needs 1,000,000,000,000,000,000 bytes"):
        trainer.train()
