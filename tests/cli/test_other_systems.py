"""What works where Python has no fork, no limits of resources and no locks of files, as on Windows: tried by taking
them away on this machine, before anything of ours is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

# What Windows lacks of the standard library. Other packages are imported first: they choose by the platform's name.
WITHOUT = """
import ctypes, importlib, os, pkgutil, signal, sys
import datasets, peft, psutil, torch, transformers, trl
from accelerate import Accelerator
from trl import SFTTrainer

for name in ("resource", "fcntl", "termios", "pty", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "setsid", "killpg", "getpgid", "geteuid", "getuid", "getgid", "fchdir", "wait",
             "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGCHLD", "SIGSTOP", "SIGCONT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT",
             "setitimer", "alarm", "pthread_sigmask", "SIG_UNBLOCK"):
    if hasattr(signal, name):
        delattr(signal, name)
_library = ctypes.CDLL.__init__
def _no_library_of_the_process(self, name, *given, **more):
    if name is None:
        raise TypeError("no library without a name")
    _library(self, name, *given, **more)
ctypes.CDLL.__init__ = _no_library_of_the_process
"""
# Programs of their own, which the trainer's process never imports.
CHILDREN = ("llm_pg.__main__", "llm_pg.rewards.worker", "llm_pg.sandbox._supervisor", "llm_pg.sandbox.inside.")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(WITHOUT + code)
    return subprocess.run(
        [sys.executable, "program.py"], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
def test_every_module_of_the_trainer_s_process_is_imported_without_them(tmp_path: Path) -> None:
    code = f"""
import llm_pg, reward_fns
failed = {{}}
for package in (llm_pg, reward_fns):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.startswith({CHILDREN!r}):
            try:
                importlib.import_module(found.name)
            except ImportError as error:
                failed[found.name] = str(error)
needed = {{name: text for name, text in failed.items() if "gymnasium" not in text and "vllm" not in text}}
sys.exit(str(needed) if needed else 0)
"""
    found = run(code, tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_a_run_trains_with_rewards_in_its_own_process_and_says_so(tmp_path: Path) -> None:
    reward = "def ordered(completion, answer, **row):\n    return float(completion == answer)\n"
    (tmp_path / "mine.py").write_text(reward)
    small = ["max_steps=2", "prompts_per_step=2", "num_generations=4", "num_eval_prompts=4", "eval_num_samples=0"]
    words = ["quickstart", *small, "num_train_prompts=32", "warm_start_steps=2", "reward_funcs=[mine.py:ordered]"]
    found = run(f"from llm_pg.cli import main\nsys.exit(main({words!r}))\n", tmp_path)
    assert found.returncode == 0, found.stderr
    assert "reward functions run in this process, without deadlines" in found.stdout + found.stderr
    assert list(tmp_path.glob("runs/*/model/model.safetensors"))


@pytest.mark.slow
def test_model_written_code_is_refused_by_name(tmp_path: Path) -> None:
    code = """
from llm_pg import sandbox
from llm_pg.sandbox import levels
levels.sys = type("System", (), {"platform": "win32"})
try:
    sandbox.run("print(1)")
except sandbox.SandboxRefused as error:
    print(error)
"""
    found = run(code, tmp_path)
    assert "cannot contain code that a model wrote: win32 has no Landlock" in found.stdout, found.stderr
