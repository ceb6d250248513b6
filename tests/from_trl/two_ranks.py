"""A run of two ranks with callbacks, for test_trl_two_ranks: each rank writes what its callback saw."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import character_tokenizer, load_model

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = state.global_step == 1 and not state.is_world_process_zero
        control.should_save = state.global_step == 2 and state.is_world_process_zero

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3 and not state.is_world_process_zero
        self.events.append([state.global_step, logs["reward"], logs["grad_norm"]])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.events.append(["evaluate", metrics["eval_greedy"]])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(["save"])


def main(folder: Path) -> None:
    tokenizer, seen = character_tokenizer(), Seen()
    make = {"model_type": "llama", **SIZE, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = GRPOConfig(
        str(folder),
        run_name="r",
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=4,
        num_eval_prompts=4,
        eval_num_samples=1,
        use_cpu=True,
        reward_in_process=True,
    )
    trainer = GRPOTrainer(
        load_model(ModelConfig(make=make), tokenizer, seed=0),
        digits,
        config,
        [{"prompt": f"{i}+1="} for i in range(32)],
        processing_class=tokenizer,
        callbacks=[seen],
    )
    summary = trainer.train()
    told = {"events": seen.events, "steps": summary["steps"], "rows": trainer.context.plan.rows}
    told["is_first"] = trainer.state.is_world_process_zero
    (folder / f"rank{trainer.context.ranks.number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
