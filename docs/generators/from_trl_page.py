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

"""

MEANING = """
## What differs

**Defaults.** What you give means the same; what you leave out is our default, not TRL's (the last column where they
differ). The largest differences:

- Without `max_steps` and `num_train_epochs` a run has 100 steps; TRL trains 3 epochs. `num_train_epochs=3` counts as
  TRL's.
- Without any argument of the batch a step has 8 prompts × `num_generations`; TRL has 8 completions.
- Rows are held out of the training data (256; a quarter of a small dataset) and evaluated before and after.
  `eval_strategy="no"` switches that off.
- Dropout is off, gradient checkpointing is off, weights and passes are float32 (`bf16=True` as with TRL), the
  learning rate is constant.
- `output_dir` holds a folder for each run. A second run into the same folder is refused: `overwrite=True`, or another
  `run_name`. The model is in `model/` there; `trainer.save_model(folder)` writes it elsewhere.

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
`trainer.evaluate()` returns them as an `Evaluation`.

**Reward functions** run unchanged: keywords, columns, `trainer_state` (an object with `global_step`, the steps that
are done, and `max_steps`; in an evaluation `global_step` is 0), `log_extra`, `log_metric`, async, `None` for "does
not apply". They run in worker processes with a deadline; one that cannot be found by its name (a lambda, a closure, a
script without `if __name__ == "__main__":`) runs in the trainer. All `None` drops the completion from the batch, as
with TRL, and so does one function that fails (raises, returns NaN, is late), where TRL's sum skips a NaN. More than
`max_unscorable` (a fifth) of a batch stops the run, which `max_unscorable=1.0` allows.

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

`logs` and `trainer.state.log_history` have our names (docs/metrics.md) and, for what TRL measures too, its own:
`loss`, `rewards/<function>/mean`, `completions/mean_length`, `completions/clipped_ratio`, `frac_reward_zero_std`,
`step_time`, and in common `reward`, `kl`, `entropy`, `grad_norm`, `learning_rate`. `reward_std` is over the whole
batch here, over each group in TRL.

## After the construction

Of the trainers' arguments, those after `processing_class` are given by keyword.

| call | here |
| --- | --- |
| `trainer.train(resume_from_checkpoint=True or folder)` | the newest whole checkpoint, or this one; a dict comes back |
| `trainer.save_model(folder)` | the same; without a folder `<run>/model` |
| `trainer.state.log_history`, `.global_step`, `.epoch` | the same |
| `trainer.add_callback`, `remove_callback`, `pop_callback` | the same |
| `trainer.args`, `model`, `processing_class`, `accelerator` | the config, the model, the tokenizer, accelerate's |
| `trainer.evaluate()` | an `Evaluation`; `.metrics()` is a dict |
| `trainer.push_to_hub()` | refused: save, then `huggingface_hub.upload_folder` |
| `trainer.create_model_card()` | refused: `report.html`, `config.yaml` and `summary.json` stand in the run's folder |
| `trainer.save_state()`, `log_metrics`, `save_metrics` | not there: see `metrics.jsonl` and `summary.json` |
| `args.learning_rate`, `args.output_dir`, ... | read by TRL's names; supported ones can be set as well |
| `TrlParser`, `HfArgumentParser` | they read dataclasses: use `llm-pg train settings.yaml key=value` |
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
    told = [f"{number[kind]} {kind}" for kind in ("supported", "mapped", "idle", "refused")]
    return f"{len(WORDS)} arguments of the configs and {len(TRAINER)} of the trainers: {', '.join(told)}."


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


def table(words: Mapping[str, Word]) -> list[str]:
    lines = ["| argument | TRL's default | here | | our default |", "| --- | --- | --- | --- | --- |"]
    for name, word in words.items():
        theirs, ours = _defaults(name, word)
        cells = [f"`{name}`", theirs, word.kind, word.note, ours]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def markdown() -> str:
    """The page."""
    lines = [HEAD + counts(), MEANING]
    for title, words in TABLES.items():
        lines += [f"## {title}", "", *table(words), ""]
    lines += ["## The trainers' own arguments", "", *table(TRAINER)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    publish(markdown())
