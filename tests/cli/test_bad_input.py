"""Each bad input gets one paragraph on standard error, exit code 2, and nothing expensive before it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

GOOD = {
    "model": {"make": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "data": {"task": "sort_letters", "num_train_prompts": 64, "num_eval_prompts": 8},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(GOOD))  # JSON is YAML
    (tmp_path / "data.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 20)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "mine.py").write_text("def scores(completion, target, **row):\n    return 1.0\n")
    return path


BAD = {
    "unknown key": (["train.learning_rat=1"], ["learning_rat", "Did you mean 'learning_rate'"]),
    "unknown word": (["loss_type=dapper"], ["dapper", "sequence_sum", "Did you mean 'dapo'"]),
    "unknown algorithm": (["algorithm=gropo"], ["gropo", "Did you mean 'grpo'"]),
    "a bootstrap without a critic": (["truncated=bootstrap"], ["grpo", "no critic", "a2c, ppo"]),
    "two fates of one completion": (
        ["mask_truncated_completions=true", "truncated=penalize"],
        ["truncated is penalize", "Give one"],
    ),
    "a critic's warm-up without end": (
        ["algorithm=ppo", "critic_warmup_steps=100", "max_steps=100"],
        ["critic_warmup_steps is 100", "never be trained"],
    ),
    "a critic's gradient to a body it does not share": (
        ["algorithm=ppo", "critic_kind=model", "critic_trunk_gradient=true"],
        ["critic_trunk_gradient", "critic_kind head"],
    ),
    "the best of a whole group": (["algorithm=pass_at_k", "pass_k=8"], ["pass_k is 8", "at least 9"]),
    "the best of k with weights of another row": (["pass_k=2"], ["baseline group_mean", "algorithm=pass_at_k"]),
    "a likelihood over fined rewards": (
        ["algorithm=maxrl", "truncated=penalize", "truncation_penalty=0.5"],
        ["truncation_penalty 0.5", "below 0"],
    ),
    "a likelihood over negative weights": (["algorithm=maxrl", "reward_weights=[-1]"], ["weight -1", "algorithm=rloo"]),
    "a likelihood without its baseline": (["algorithm=maxrl", "baseline=none"], ["baseline none", "algorithm=maxrl"]),
    "verdicts less a KL": (
        ["algorithm=pass_at_k", "beta=0.1", "kl_placement=reward"],
        ["kl_placement reward", "kl_placement=loss"],
    ),
    "OPO on reused data": (["algorithm=opo", "num_iterations=2"], ["importance ratio"]),
    "bounds of a correction that cross": (
        [
            "vllm_importance_sampling_correction=true",
            "vllm_importance_sampling_clip_min=4",
        ],
        ["clip_min is 4", "clip_max 3"],
    ),
    "unknown correction": (["vllm_importance_sampling_mode=sequence_trunc"], ["sequence_truncate"]),
    "a trust region around data used once": (["kl_target=0.01"], ["no gradient", "num_iterations"]),
    "a refresh of no reference": (["sync_ref_model=true"], ["beta is 0", "no reference"]),
    "an algorithm of no file": (["algorithm=nowhere.py:mine"], ["no file", "nowhere.py"]),
    "an algorithm that is no function": (["algorithm=json:__name__"], ["holds a str", "advantages"]),
    "wrong section": (["data.num_generations=4"], ["belongs to section 'rollout'"]),
    "negative number": (["temperature=-1"], ["temperature", "-1", "greater than 0"]),
    "not a number": (["learning_rate=.nan"], ["learning_rate", "finite"]),
    "group of one": (["num_generations=1"], ["num_generations is 1", "at least 2", "reinforce"]),
    "indivisible batch": (
        ["per_device_train_batch_size=3", "gradient_accumulation_steps=5"],
        ["3 ×", "5 ×", "= 15 completions", "num_generations 8"],
    ),
    "reuse without a ratio": (["algorithm=reinforce", "num_iterations=2"], ["importance ratio", "surrogate=clip"]),
    "k1 in the loss": (["kl_estimator=k1", "beta=0.1", "use_bias_correction_kl=false"], ["no penalty", "k3"]),
    "no model": (["model.make=null"], ["model_name_or_path"]),
    "model folder that is none": (
        ["model.make=null", "model_name_or_path={tmp}/not_a_model"],
        ["not_a_model", "holds no config.json"],
    ),
    "two models": (["model_name_or_path=x/y"], ["model.make", "give one"]),
    "unknown task": (["data.task=sort_leters"], ["sort_leters", "sort_letters"]),
    "missing file": (["data.task=null", "data_files={tmp}/dta.jsonl"], ["dta.jsonl", "data.jsonl"]),
    "empty dataset": (
        ["data.task=null", "data_files={tmp}/empty.jsonl", "reward_funcs=[exact_match]"],
        ["empty.jsonl"],
    ),
    "missing column": (
        ["data.task=null", "data_files={tmp}/data.jsonl", "reward_funcs=[exact_match]", "num_eval_prompts=2"],
        ["'prompt'", "question", "answer"],
    ),
    "too few prompts": (["prompts_per_step=100"], ["64", "100"]),
    "reward that does not exist": (["reward_funcs=[exact_macth]"], ["exact_macth", "exact_match"]),
    "reward file that does not exist": (["reward_funcs=['{tmp}/nine.py:scores']"], ["nine.py"]),
    "reward that needs a missing column": (["reward_funcs=['{tmp}/mine.py:scores']"], ["target", "letters"]),
    "two sources of prompts": (["data_files={tmp}/data.jsonl"], ["task", "data_files", "one source"]),
    "weights without functions": (
        ["reward_funcs=[sort_letters]", "reward_weights=[1, 2]"],
        ["2 numbers", "1 function"],
    ),
}


# An interpreter where importing torch is an error, which forks for each line of arguments that it reads.
FORKS = """
import json, os, sys
sys.modules["torch"] = None
from llm_pg.cli import main
from llm_pg.config import arguments, load_config
from llm_pg.run.before import preflight
for line in sys.stdin:
    words, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """A command that ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], Done]]:
    """The command in an interpreter of its own where importing torch is an error."""
    files = [tmp_path_factory.mktemp("run") / name for name in ("stdout", "stderr")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as server:  # type: ignore[call-overload]

        def command(words: list[str]) -> Done:
            for file in files:
                file.unlink(missing_ok=True)
            server.stdin.write(json.dumps([words, *map(str, files)]) + "\n")
            server.stdin.flush()
            return Done(int(server.stdout.readline()), *(file.read_text() for file in files))

        yield command


@pytest.mark.faults
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_paragraph_before_torch_is_imported(
    case: str, config: Path, run: Callable[..., Done]
) -> None:
    settings, words = BAD[case]
    settings = [s.format(tmp=config.parent) for s in settings]
    done = run(["train", str(config), f"output_dir={config.parent}/runs", *settings])
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"(llm-pg .*\nChecking settings, data and rewards \.\.\.\n)?", done.stdout)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "quickstrat.yaml"], ["quickstrat.yaml", "quickstart.yaml"]),
        (["train", "quickstart.yaml", "nonsense"], ["key=value"]),
        (["quickstart", "--algorithm", "gropo"], ["gropo", "Did you mean 'grpo'"]),
        (["quickstart", "--task", "sort_leters"], ["sort_leters"]),
        (["eval", "somewhere/model"], ["--task", "--data"]),
        (["cp", "quickstrat"], ["quickstart.yaml"]),
        (["cp", "quickstart", "/proc/nowhere/x"], ["cannot be copied", "/proc/nowhere"]),
        (["check", "quickstart.yaml", "data=5", "task=countdown"], ["'data' is a section", "5"]),
        (["check", "{tmp}/number.yaml"], ["Unknown setting 7", "words"]),
        (["check", "{tmp}/bytes.yaml"], ["bytes.yaml is not plain YAML"]),
        (["report", "{tmp}/torn"], ["torn", "is not plain YAML"]),
        (["report", "{tmp}/flat"], ["is no run's", "'data' holds 3"]),
        (["report", "{tmp}/run", "--out", "/proc/nowhere/page.html"], ["cannot be written", "--out"]),
    ],
)
def test_bad_words_of_the_other_commands(
    arguments: list[str], words: list[str], tmp_path: Path, run: Callable[..., Done]
) -> None:
    (tmp_path / "number.yaml").write_text("7: x\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, text in (("torn", "a: [1"), ("flat", "data: 3"), ("run", "data: {task: sort_letters}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    done = run([word.format(tmp=tmp_path) for word in arguments])
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.faults
def test_a_hub_name_without_a_network_is_one_paragraph(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_pg.cli import main

    monkeypatch.setenv("HF_HOME", str(config.parent))
    settings = ["model.make=null", "model_name_or_path=nobody/no-such-model", f"output_dir={config.parent}/runs"]
    assert main(["train", str(config), *settings]) == 2
    printed = capsys.readouterr().err
    assert "nobody/no-such-model" in printed
    assert "Traceback" not in printed


def test_help_comes_without_torch(run: Callable[..., Done]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["quickstart", "--help"], ["prove", "--help"]):
        done = run(arguments)
        assert done.returncode == 0, done.stderr
        assert "usage: llm-pg" in done.stdout
    assert "num_generations" in run(["train", "--help"]).stdout


def test_a_good_config_passes_all_that_is_checked_before_torch(config: Path) -> None:
    from llm_pg.config import load_config
    from llm_pg.run.before.preflight import preflight

    preflight(load_config(config, [f"output_dir={config.parent}/runs"]))


def test_cp_brings_the_module_that_a_recipe_imports_from_beside_it(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run(["cp", "control_entropy_sweep", str(tmp_path)]).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"control_entropy_sweep.py", "curves.py"}


def test_cp_copies_a_shipped_config_and_never_overwrites(tmp_path: Path, run: Callable[..., Done]) -> None:
    assert run(["cp", "quickstart", str(tmp_path)]).returncode == 0
    assert (tmp_path / "quickstart.yaml").read_text().startswith("# llm-pg quickstart")
    again = run(["cp", "quickstart", str(tmp_path)])
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.faults
def test_checkpoint_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from llm_pg.cli import main
    from llm_pg.run.saving import checkpoint_files

    for step in (1, 2):
        state = checkpoint_files.RunState(step, {"w": torch.ones(3)}, {"0.step": torch.ones(())}, {"step": 0})
        checkpoint_files.save(tmp_path / "checkpoints", state, {})
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    (tmp_path / "checkpoints" / "step-000002" / "weights.safetensors").write_bytes(b"short")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "step-000002: DAMAGED: weights.safetensors has 5 bytes" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2
