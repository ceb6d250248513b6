"""Every shipped config is checked and trained by the real command as it ships: only the model, the place of the dataset
and sizes are replaced."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from llm_pg import shipped
from llm_pg.cli import main
from llm_pg.metrics import read_metrics

CONFIGS = sorted(p.name for p in shipped.folder("configs").glob("*.yaml"))
SIZES = [
    "max_steps=2",
    "prompts_per_step=2",
    "per_device_train_batch_size=4",
    "num_generations=4",
    "max_completion_length=6",
    "num_eval_prompts=4",
    "eval_num_samples=2",
    "eval_steps=1",
    "save_steps=1",
]


def gsm8k_row(i: int) -> dict[str, Any]:
    return {
        "question": f"Ann has {i} apples and buys {i + 1}. How many?",
        "answer": f"{i}+{i + 1}=<<{2 * i + 1}>>\n#### {2 * i + 1}",
    }


def countdown_row(i: int) -> dict[str, Any]:
    return {"nums": [i + 1, i + 2, 3], "target": 2 * i + 6}


def hub_folder(folder: Path, data: dict[str, Any], kind: str) -> Path:
    """A dataset laid out as on the hub: a card that names configurations, splits and files."""
    make = gsm8k_row if "gsm8k" in data["dataset_name"] else countdown_row
    splits = {data.get("dataset_split", "train").split("[")[0]: 24, data.get("dataset_eval_split") or "test": 6}
    config = data.get("dataset_config") or "default"
    (folder / config).mkdir(parents=True)
    files = []
    for split, n in splits.items():
        rows = datasets.Dataset.from_list([make(i) for i in range(n)])
        path = folder / config / f"{split}.{kind}"
        rows.to_parquet(path) if kind == "parquet" else rows.to_json(path)
        files.append({"split": split, "path": f"{config}/{path.name}"})
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n# Rows\n", encoding="utf-8")
    return folder


def changes(name: str, make_model: Callable[..., Any], tokenizer: Any, folder: Path, kind: str) -> list[str]:
    """Model, place of the dataset and sizes."""
    shipped_settings = yaml.safe_load(shipped.find(name).read_text())
    given = [*SIZES, f"output_dir={folder}/runs", "run_name=one"]
    if shipped_settings.get("model", {}).get("model_name_or_path"):
        make_model("qwen2", max_position_embeddings=2048).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        given.append(f"model_name_or_path={folder}/model")
        if shipped_settings["model"].get("teacher_model_name_or_path"):
            given.append(f"teacher_model_name_or_path={folder}/model")
    else:
        given += ["warm_start_steps=2", "warm_start_batch_size=4"]
    data = shipped_settings.get("data", {})
    if data.get("dataset_name"):
        given.append(f"dataset_name={hub_folder(folder / 'dataset', data, kind)}")
    else:
        given.append("num_train_prompts=24")
    return given


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_checked_trained_and_evaluated_by_the_command(
    name: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = changes(name, make_model, tokenizer, tmp_path, "parquet")
    assert main(["check", name, *given]) == 0, capsys.readouterr()
    assert main(["train", name, *given]) == 0, capsys.readouterr()
    run = tmp_path / "runs" / "one"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] >= 0 and line["unscorable"] == 0 for line in lines if "grad_norm" in line)
    assert (run / "checkpoints" / "step-000002" / "manifest.json").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_eval_prompts"] == 4
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["eval/greedy"] == summary["pass_rate_after"]
    assert again["eval/sampled"] == pytest.approx(summary["sampled_after"])


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_readme_s_command_reads_jsonl_from_the_hub_s_layout(
    own_process: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    name = "gsm8k_qwen2.5-0.5b_grpo.yaml"
    given = changes(name, make_model, tokenizer, tmp_path, "jsonl")
    command = ["train", name, *given]
    if own_process:
        done = subprocess.run([sys.executable, "-m", "llm_pg", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert main(command) == 0
    assert len(read_metrics(tmp_path / "runs" / "one" / "metrics.jsonl")) == 2
