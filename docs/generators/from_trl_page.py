"""Prints `docs/from-trl.md`, or writes it to a file that is named, from the table of TRL's arguments in
`llm_pg/config/trl/`. TRL is not imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from publish import publish

from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config.schema import LEAVES, Config
from llm_pg.config.trl import TRAINER, WORDS, Word
from llm_pg.config.trl.policy import LOGGING, MODEL, OBJECTIVE, SAMPLING, VLLM
from llm_pg.config.trl.training import BATCH, EVALUATION, MACHINE, OPTIMISER, PRECISION, SAVING
from llm_pg.config.trl.training import LOGGING as TRACKING

HEAD = """# From TRL

Made from the table in `llm_pg/config/trl/` by `python docs/generators/from_trl_page.py docs/from-trl.md`.

```python
from llm_pg import GRPOConfig, GRPOTrainer  # instead of: from trl import GRPOConfig, GRPOTrainer
```

`GRPOConfig`, `GRPOTrainer`, `RLOOConfig` and `RLOOTrainer` take the arguments of TRL 1.16. Each is one of

- **supported**: the setting has the same name and meaning here;
- **mapped**: it is translated into settings of ours;
- **idle**: it is accepted, and what it governs does not exist here;
- **refused**: a value that asks for something is an error, which says what to do instead; TRL's default is accepted.

A test compares the table with the signatures of the TRL that is installed and fails at an argument we do not know.
Nothing is ignored without a word: a name that neither knows is an error with the nearest known one.

`TrlParser`, `ModelConfig`, `ScriptArguments`, `get_dataset`, `get_peft_config` and `get_quantization_config` are
imported from `llm_pg` too.

"""

DIFFERENT = """
## Defaults that differ

What you give means the same; what you leave out is our default, not TRL's. These are all that are accepted and differ:

| argument | TRL's default | ours | |
| --- | --- | --- | --- |
"""
# What a default of TRL's becomes that is no default of a setting of the same name.
CONSEQUENCES: dict[str, tuple[str, str]] = {
    "num_train_epochs": ("100 steps", "`num_train_epochs=3` counts as TRL's"),
    "max_steps": ("`100`", "where neither it nor `num_train_epochs` is given"),
    "per_device_train_batch_size": (
        "8 prompts",
        "× `num_generations` completions, where nothing of a batch is given",
    ),
    "bf16": ("`False`", "TRL computes in bfloat16; a model in bfloat16 is computed in it here too"),
    "eval_strategy": ("before and after", "on rows held out of the training data (256; a quarter of a small dataset)"),
    "save_strategy": ("at the end", "`save_steps` between checkpoints"),
    "logging_steps": ("`1`", "lines in the terminal and entries of `log_history`; metrics.jsonl has every step"),
    "log_completions": ("`8`", "groups a step in `completions/`"),
    "seed": ("`0`", ""),
}
MEANING = """
## What differs

**Folders.** `output_dir` holds a folder for each run, `<output_dir>/<run_name>`. A second run into the same folder is
refused: `overwrite=True`, or another `run_name`; a second `train()` of one trainer goes into `<run_name>-2`. The
model is in `model/` there; `trainer.save_model(folder)` writes it elsewhere. `<output_dir>/checkpoint-100` is a link
to the checkpoint of step 100, which `get_last_checkpoint(output_dir)` finds, `AutoModelForCausalLM` loads and
`train(resume_from_checkpoint=...)` goes on from.

**The batch.** As in TRL: a pass has `per_device_train_batch_size` completions (8 where not given) on each rank, an
optimiser step `gradient_accumulation_steps` passes (1), a batch of rollouts `steps_per_generation` passes
(`gradient_accumulation_steps`), or `generation_batch_size` completions on all ranks. Only what follows differs:
several batches of rollouts for one optimiser step are sampled as one, and a number that would let a step straddle two
batches is refused. With `prompts_per_step`, a word of ours, a step is that many prompts × `num_generations`,
`steps_per_generation` cuts it into minibatches, and `per_device_train_batch_size` changes memory and speed alone.

**Steps.** One line of metrics, and one step of `state.global_step`, is a batch of rollouts with all its updates. TRL
counts updates. They are the same unless `num_iterations` or `steps_per_generation` make several updates of a batch;
then `max_steps`, `logging_steps`, `save_steps`, `eval_steps` and `warmup_steps` are divided by their number, rounded
up.

**Evaluation** gives pass rates, greedy and sampled, with intervals (`eval/greedy`, `eval/pass@4`), and mean rewards:
`eval/reward` of the greedy completions, `eval/sampled_reward` of sampled ones, which TRL calls `eval_reward`.
By TRL's names, in `trainer.evaluate()`, `log_history` and `on_evaluate`, they are `eval_greedy_reward` and, as TRL
samples its evaluation, `eval_reward`. `metric_for_best_model="eval_reward"` reads what is logged by
that name, `eval_greedy_reward` the other. An `eval_dataset` that is a dict of sets is evaluated set by set
(`eval_<name>_reward`); the first of them, or the one that `metric_for_best_model` names, is the held-out set of page,
summary and metrics file.

**Reward functions** run unchanged: keywords, columns, `trainer_state` (an object with `global_step`, the steps that
are done, and `max_steps`; in an evaluation `global_step` is 0), `log_extra`, `log_metric`, async, `None` for "does
not apply". They run in worker processes with a deadline; one that cannot be found by its name (a lambda, a closure, a
script without `if __name__ == "__main__":`) runs in the trainer. All `None` drops the completion from the batch, as
with TRL, with one warning; a batch of nothing else stops the run, where TRL goes on with a step of zeros. One function
that fails (raises, returns NaN, is late) drops it too, where TRL's sum skips a NaN; more than `max_unscorable` (a
fifth) of a batch stops the run, which `max_unscorable=1.0` allows.

## Callbacks

`callbacks=[...]` takes transformers' `TrainerCallback`s. They get `on_init_end`, `on_train_begin`, `on_epoch_begin`,
`on_step_begin`, `on_pre_optimizer_step` and `on_optimizer_step` (each update), `on_step_end`, `on_log` with `logs`,
`on_evaluate` with `metrics` (evaluations between steps), `on_save`, `on_epoch_end`, `on_train_end`; with `state`,
`control`, `model`, `processing_class`, `optimizer` and `lr_scheduler`. `args` is the run's config, whose settings are
read by TRL's names. Of `control`, `should_training_stop` ends the run after the step (the final evaluation and the
model follow), `should_save`, `should_evaluate` and `should_log` act after the step; an epoch cannot be left early, so
`should_epoch_stop` ends the run. On several ranks what one asks for is done by all. `EarlyStoppingCallback` reads the
held-out evaluations by `metric_for_best_model` (`eval_reward`, `eval/greedy`). An exception ends the run and
propagates.

`logs` and `trainer.state.log_history` have every name that TRL logs, with its meaning: means over the steps since the
entry before, `num_tokens`, `completions/...`, `rewards/<function>/mean` and `/std`, `clip_ratio/...` (of `low_min`
and `high_max`, the extremes of the ranks' own shares), what `log_metric` was given by its own name, `loss` with the
entropy bonus and `policy_loss` without; beside them our names (docs/metrics.md) with the numbers of the step. The last
entry has `train_loss`, `train_runtime`, `train_samples_per_second` (completions) and `train_steps_per_second`, as in
transformers.

## After the construction

Of the trainers' arguments, those after `processing_class` are given by keyword.

| call | here |
| --- | --- |
| `trainer.train(resume_from_checkpoint=True or folder)` | the newest whole checkpoint, or this one |
| `result.global_step`, `.training_loss`, `.metrics` | the same; the result is our summary, a dict |
| `trainer.evaluate(eval_dataset=...)` | the same, of one set or several by name; also our `Evaluation` |
| `trainer.save_model(folder)` | the same; without a folder `<run>/model` |
| `trainer.save_state()`, `log_metrics`, `save_metrics` | the same, into `output_dir` |
| `trainer.state.log_history`, `.global_step`, `.epoch` | the same |
| `trainer.add_callback`, `remove_callback`, `pop_callback`, `callback_handler` | the same |
| `trainer.args`, `model`, `ref_model`, `processing_class`, `accelerator`, `optimizer`, `lr_scheduler` | the same |
| `trainer.reward_funcs`, `train_dataset`, `eval_dataset`, `get_train_dataloader()` | the same |
| `args.learning_rate`, `args.beta`, `args.device`, `args.to_dict()`, ... | read by TRL's names, and set as if given |
| `@dataclass class Mine(GRPOConfig)` | the same: fields of its own belong to the script |
| `TrlParser((ScriptArguments, GRPOConfig, ModelConfig))` | the same; options that are left out keep our default |
| a subclass with `log`, `create_optimizer`, `create_scheduler` | called |
| a subclass with `compute_loss`, `training_step`, `_generate...` | refused by name, with what to do instead |
| `trainer.push_to_hub()`, `push_to_hub=True` | the same, of the run's model with its card |
| `trainer.create_model_card()` | the same: data, algorithm, before and after with intervals, how to reproduce |
"""
TABLES = {
    "The batch and the length of a run": BATCH,
    "The optimiser": OPTIMISER,
    "Precision and memory": PRECISION,
    "The model": MODEL,
    "Sampling": SAMPLING,
    "vLLM": VLLM,
    "The objective": OBJECTIVE,
    "Logging": {**TRACKING, **LOGGING},
    "Evaluation": EVALUATION,
    "Saving": SAVING,
    "The machine and the data": MACHINE,
}


def counts() -> str:
    """How many arguments there are of each kind."""
    number = Counter(word.kind for word in [*WORDS.values(), *TRAINER.values()])
    counted = [f"{number[kind]} {kind}" for kind in ("supported", "mapped", "idle", "refused")]
    return f"{len(WORDS)} arguments of the configs and {len(TRAINER)} of the trainers: {', '.join(counted)}."


def own_default(name: str, algorithm: str) -> Any:
    """Of the setting of this name here: the algorithm's row where the setting leaves it to the row."""
    section = Config.model_fields[LEAVES[name]].annotation
    value = section.model_fields[name].default  # type: ignore[union-attr]
    if value is None and LEAVES[name] == "algorithm":
        return getattr(ALGORITHMS[algorithm], name, None)
    return value


def _defaults(name: str, word: Word) -> tuple[str, str]:
    """TRL's default(s), and ours where the setting has the same name and another one."""
    theirs = {"grpo": word.default, "rloo": word.default if word.rloo is ... else word.rloo}
    if word.default is ...:
        return "", ""
    shown = " / ".join(dict.fromkeys(f"`{value!r}`" for value in theirs.values()))
    if word.kind != "supported" or name not in LEAVES:
        return shown, ""
    ours = {algorithm: own_default(name, algorithm) for algorithm in theirs}
    if all(ours[a] == theirs[a] for a in theirs):
        return shown, ""
    return shown, " / ".join(dict.fromkeys(f"`{value!r}`" for value in ours.values()))


def different() -> list[str]:
    """A line for each default that is accepted and differs."""
    lines = []
    for name, word in WORDS.items():
        theirs, ours = _defaults(name, word)
        if name in CONSEQUENCES or ours:
            ours, note = CONSEQUENCES.get(name, (ours, word.note if word.kind == "supported" else ""))
            lines.append(f"| `{name}` | {theirs} | {ours} | {note} |")
    return lines


def table(words: Mapping[str, Word]) -> list[str]:
    lines = ["| argument | TRL's default | here | | our default |", "| --- | --- | --- | --- | --- |"]
    for name, word in words.items():
        theirs, ours = _defaults(name, word)
        cells = [f"`{name}`", theirs, word.kind, word.note, ours]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def markdown() -> str:
    """The page."""
    lines = [HEAD + counts(), DIFFERENT + "\n".join(different()), MEANING]
    for title, words in TABLES.items():
        lines += [f"## {title}", "", *table(words), ""]
    lines += ["## The trainers' own arguments", "", *table(TRAINER)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    publish(markdown())
