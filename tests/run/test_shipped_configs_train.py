"""Every shipped config trains whole, with a tiny model of the same architecture and data in the same format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg import shipped
from llm_pg.config import load_config
from llm_pg.metrics import read_metrics
from llm_pg.run.preflight import preflight
from llm_pg.terminal import Terminal
from llm_pg.trainer import PolicyGradientTrainer

CONFIGS = sorted(p.name for p in shipped.folder("configs").glob("*.yaml"))
SMALL = [
    "max_steps=2",
    "prompts_per_step=2",
    "per_device_train_batch_size=4",
    "num_generations=4",
    "max_completion_length=6",
    "num_eval_prompts=4",
    "eval_num_samples=2",
    "eval_steps=1",
    "save_steps=1",
    "use_cpu=true",
    "dtype=float32",
    "bf16=false",
    "attn_implementation=null",
    "reward_workers=1",
]


def gsm8k_rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "question": f"Ann has {i} apples and buys {i + 1}. How many?",
            "answer": f"{i}+{i + 1}=<<{2 * i + 1}>>\n#### {2 * i + 1}",
        }
        for i in range(n)
    ]


def countdown_rows(n: int) -> list[dict[str, Any]]:
    return [{"nums": [i + 1, i + 2, 3], "target": 2 * i + 6} for i in range(n)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_trains_on_a_stand_in(
    name: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    text = shipped.find(name).read_text()
    changes = [*SMALL, f"output_dir={tmp_path}/runs"]
    if "model_name_or_path" in text:
        make_model("qwen2", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        changes.append(f"model_name_or_path={tmp_path}/model")
    else:
        changes += ["warm_start_steps=2", "warm_start_batch_size=4"]
    if "dataset_name" in text:
        for part, n in (("train", 12), ("test", 4)):
            rows = gsm8k_rows(n) if "gsm8k" in name else countdown_rows(n)
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes += ["dataset_name=null", f"data_files={tmp_path}/train.jsonl", f"eval_data_files={tmp_path}/test.jsonl"]
    else:
        changes.append("num_train_prompts=24")
    config = load_config(shipped.find(name), changes)
    preflight(config)
    trainer = PolicyGradientTrainer(args=config, terminal=Terminal(quiet=True))
    summary = trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] >= 0 and line["unscorable"] == 0 for line in lines)
    assert summary["num_eval_prompts"] == 4
    assert (trainer.folder.checkpoints / "step-000002" / "manifest.json").exists()
