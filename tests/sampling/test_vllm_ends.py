"""How vLLM's servers and runs over them end: with the trainer, or before it."""

import contextlib
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.metrics import read_metrics
from llm_pg.sampling.vllm import EngineError
from llm_pg.sampling.vllm import pool as pool_module
from llm_pg.terminal import Terminal
from tests.sampling.fake_vllm import FakeVllm

pytestmark = pytest.mark.fake


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(pool_module.ServerPool.__init__, "__kwdefaults__", {"pause": 0.01})


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_was_started_for_a_trainer_ends_with_its_sigkill(tmp_path: Path) -> None:
    """The command and a child of it; the trainer has no time to run any code of its own."""
    mark = f"{os.getpid()}.5"  # seconds to sleep: a number that no other process has in its command line
    script = (
        "import time\n"
        "from llm_pg.processes.child import Child\n"
        f"child = Child(['sh', '-c', 'sleep 1{mark} & sleep 2{mark}'], grace=10.0)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script])
    _until(lambda: len(_running(f"sleep\0001{mark}", f"sleep\0002{mark}")) == 2)
    trainer.kill()
    trainer.wait()
    _until(lambda: not _running(mark))


def _running(*words: str) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (place / "cmdline").read_text(errors="replace")
            if any(word in line for word in words):
                found.append(int(place.name))
    return found


def _until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def evenness(completion: str, **row: Any) -> float:
    """Differs between almost all completions, so that every step moves the weights."""
    return sum(ord(c) % 2 == 0 for c in completion) + 0.01 * ord(completion[:1] or "a")


def trainer_of(server: FakeVllm, model: Any, tokenizer: Any, folder: Path) -> GRPOTrainer:
    settings = GRPOConfig(
        str(folder),
        **{"run_name": "r", "engine": "vllm", "vllm_urls": [server.url], "max_steps": 3, "prompts_per_step": 4},
        **{"num_generations": 4, "max_completion_length": 4, "num_eval_prompts": 8, "eval_num_samples": 2},
        **{"learning_rate": 1e-2, "use_cpu": True, "reward_in_process": True},
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=evenness,
        args=settings,
        train_dataset=[{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)],
        processing_class=tokenizer,
        terminal=Terminal(quiet=True),
    )


@pytest.mark.faults
def test_a_run_whose_servers_die_saves_its_state_and_goes_on_with_others(
    make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    dying = FakeVllm(copy.deepcopy(make_model()), tokenizer)
    dying.fault = lambda server, path, answer: 503 if server.count("/collective_rpc") > 1 else answer
    with pytest.raises(EngineError, match=r"The vLLM server is dead: .*503"):
        trainer_of(dying, make_model(), tokenizer, tmp_path).train()
    assert [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [1]
    assert (tmp_path / "r" / "checkpoints" / "step-000001").is_dir()
    healthy = FakeVllm(copy.deepcopy(make_model()), tokenizer)
    resumed = trainer_of(healthy, make_model(), tokenizer, tmp_path).train(resume=True)
    whole = trainer_of(healthy, make_model(), tokenizer, tmp_path / "whole")
    assert resumed["steps"] == whole.train()["steps"] == 3
    lines = {folder: read_metrics(folder / "r" / "metrics.jsonl") for folder in (tmp_path, tmp_path / "whole")}
    assert [x["reward"] for x in lines[tmp_path]] == [x["reward"] for x in lines[tmp_path / "whole"]]
    assert max(x["sampler_gap"] for x in lines[tmp_path]) < 1e-5
    dying.stop()
    healthy.stop()
