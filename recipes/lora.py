"""A LoRA adapter by GRPO, from a peft config of your own, and the merged model at the end.

    python lora.py                                           # model and data from the hub, one GPU of 24 GB
    python lora.py model_name_or_path=my/folder task=sort_letters dataset_name=null prompt_template=null chat=null
    python lora.py learning_rate=2e-5 max_steps=50           # any setting of `llm-pg train --help`

The reference of the KL is the model with the adapter off, so it takes no memory. An adapter wants a learning rate of
about ten times that of full weights. In a YAML `use_peft=true lora_r=32 use_rslora=true merge_adapter=true` does it too
(there is `use_dora` and `load_in_4bit`); a config of your own is for what those settings do not cover.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config.load import parse_override

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dtype": "bfloat16",
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "prompt_template": "{question}\n\nThink step by step. Write the answer, a number, on the last line after ####.",
    "chat": True,
    "reward_funcs": ["number_match"],
    "max_prompt_length": 384,
    "long_prompts": "drop",
    "num_generations": 8,
    "max_completion_length": 512,
    "rollout_batch_size": 256,
    "beta": 0.001,
    "max_steps": 100,
    "prompts_per_step": 32,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-5,
    "warmup_steps": 5,
    "bf16": True,
    "gradient_checkpointing": True,
    "eval_num_samples": 0,
    "run_name": "lora",
}
ADAPTER = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")


def main(words: list[str]) -> Path:
    changes = dict(parse_override(word) for word in words)
    trainer = GRPOTrainer(args=GRPOConfig(**{**SETTINGS, **changes}), peft_config=ADAPTER)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    print(f"trains {trained:,} of {total:,} parameters ({trained / total:.1%})")
    trainer.train()
    adapter = Path(trainer.folder.model)
    merged = adapter.parent / "merged"
    trainer.model.merge_and_unload().save_pretrained(merged)
    trainer.tokenizer.save_pretrained(merged)
    print(f"adapter: {adapter}\nmerged, for AutoModelForCausalLM or vLLM: {merged}")
    return merged


if __name__ == "__main__":
    main(sys.argv[1:])
