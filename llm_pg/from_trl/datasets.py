"""Datasets between TRL's form and prompts: those that `evaluate` is given, and the training rows as a data loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from ..config import Config, ConfigError
from ..config.check import BatchPlan
from ..config.schema import metric_of_ours
from ..model.loading import context_length
from ..prompts import Prompt, Prompts
from ..prompts.load import load_held_out
from ..trainer import Trainer
from ..words import choices


def evaluation_sets(trainer: Trainer, eval_dataset: Any, own: Any) -> dict[str, Sequence[Prompt]]:
    """Prompts to evaluate on, by the name of their set.

    Args:
        trainer: whose held-out prompts, tokenizer and settings are read.
        eval_dataset: rows, the name of one of the trainer's own sets, or several sets by name; None = the held-out
            prompts.
        own: what the trainer was given as eval_dataset.

    Raises:
        ConfigError: there is no set of that name, or rows cannot be read.
    """
    named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    known = own if isinstance(own, dict) else {}
    return {
        name: trainer.eval_prompts if rows is None else prompts_of(trainer, rows, known) for name, rows in named.items()
    }


def named_sets(config: Config, eval_dataset: Any) -> tuple[Config, dict[str, Any]]:
    """The sets of an `eval_dataset` that is a dict, with the one first that metric_for_best_model names, and the config
    with that metric's name in it; {} where it is none. A DatasetDict is no dict of sets here: its split is a setting.

    Args:
        config: of the run.
        eval_dataset: as the trainer was given it.
    """
    if type(eval_dataset) is not dict or not eval_dataset:
        return config, {}
    metric = config.run.metric_for_best_model or ""
    for name in eval_dataset:
        for prefix in (f"eval_{name}_", f"eval/{name}_", f"{name}_"):
            if metric.startswith(prefix):
                config = config.model_copy(deep=True)
                config.run.metric_for_best_model = metric_of_ours(f"eval_{metric.removeprefix(prefix)}")
                return config, {name: eval_dataset[name], **eval_dataset}
    return config, eval_dataset


def prompts_of(trainer: Trainer, rows: Any, known: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of rows, or of one of the sets that are known by name.

    Args:
        trainer: whose tokenizer and settings are read.
        rows: or the name of a set.
        known: sets by name.
    """
    if isinstance(rows, str):
        if rows not in known:
            raise ConfigError(f"evaluate got the name {rows!r}, and eval_dataset {choices(rows, list(known))}")
        rows = known[rows]
    every = trainer.config.model_copy(deep=True)
    every.data.num_eval_prompts = 10**9
    longest = context_length(trainer.model)
    return load_held_out(every, trainer.tokenizer, eval_dataset=rows, context_length=longest)


def train_dataloader(prompts: Prompts, plan: BatchPlan) -> DataLoader[Any]:
    """An epoch of rows: a batch is the rows of one step, each as often as it is sampled."""
    steps = range(1, max(len(prompts.prompts) // plan.prompts, 1) + 1)
    rows = [prompt.row for step in steps for prompt in prompts[step] for _ in range(plan.num_generations)]
    return DataLoader(rows, batch_size=plan.rows, collate_fn=list)  # type: ignore[arg-type]
