"""Supervised steps before reinforcement, by trl's SFTTrainer, on demonstrations of the prompt-completion form."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ...config import Config, ConfigError
from ...prompts import task_demonstrations
from ...prompts.files import read_files


def demonstrations(config: Config, held_out: Collection[str]) -> list[dict[str, Any]]:
    """Prompt-completion rows of the config's task or files, without any held-out prompt."""
    settings = config.warm_start
    if settings.warm_start_data_files:
        table = read_files(settings.warm_start_data_files, "warm_start_data_files")
        rows = table.rows
        missing = {"prompt", "completion"} - set(table.columns)
        if missing:
            raise ConfigError(
                f"warm_start_data_files needs the columns prompt and completion; missing: {', '.join(sorted(missing))}."
            )
    else:
        rows = task_demonstrations(config)
    kept = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows if row["prompt"] not in held_out]
    if not kept:
        raise ConfigError("Every demonstration's prompt is held out; nothing is left for the warm start.")
    return kept


def warm_start(
    model: Any,
    tokenizer: Any,
    config: Config,
    held_out: Collection[str],
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Train `model` in place; returns the mean loss of the last tenth of the steps, in nats per completion token.

    progress: called with the steps done and all of them.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = config.warm_start
    rows = demonstrations(config, held_out)
    logging.getLogger("trl").setLevel(logging.ERROR)
    # transformers has called it activation_checkpointing since 5.20, and vLLM 0.32 wants an older one beside it.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in SFTConfig.__dataclass_fields__)
    with tempfile.TemporaryDirectory() as folder, _own_forwards(model):
        args = SFTConfig(
            output_dir=folder,
            max_steps=settings.warm_start_steps,
            learning_rate=settings.warm_start_learning_rate,
            per_device_train_batch_size=settings.warm_start_batch_size,
            lr_scheduler_type="linear",
            warmup_steps=min(10, settings.warm_start_steps // 10),
            optim="adamw_torch",
            completion_only_loss=True,
            **{checkpointing: config.train.gradient_checkpointing},
            bf16=config.train.bf16,
            fp16=config.train.fp16,
            use_cpu=config.train.use_cpu,
            seed=config.run.seed,
            logging_steps=max(settings.warm_start_steps // 10, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        _be_quiet(trainer)
        if progress is not None:
            trainer.add_callback(_reporting(progress))
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    model.config.use_cache = True
    return losses[-1] if losses else float("nan")


@contextlib.contextmanager
def _own_forwards(model: Any) -> Iterator[None]:
    """Takes back what the block put in place of a module's `forward`.

    trl leaves a function there that calls the module it was made for. A copy of the model, such as the reference or the
    one that servers follow while sampling runs ahead, would go on computing with the weights of the original.
    """
    before = {module: vars(module).get("forward") for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            if vars(module).pop("forward", None) is not None and before.get(module) is not None:
                module.forward = before[module]


def _reporting(progress: Callable[[int, int], None]) -> Any:
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Reporting()


def _be_quiet(trainer: Any) -> None:
    """The run prints its own lines; transformers' printing callback would put dicts between them."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
