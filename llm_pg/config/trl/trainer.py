"""The arguments of TRL's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from .words import Word, mapped, refused, same

TRAINER: dict[str, Word] = {
    "model": same(..., "a hub id, a folder, a transformers model or a PEFT model"),
    "reward_funcs": mapped(
        None,
        "functions in TRL's form run unchanged. A string is the name of a shipped function, `module:function`, "
        "`file.py:function`, or the id or folder of a reward model; a module is taken as one",
    ),
    "args": same(None),
    "train_dataset": mapped(
        None,
        "standard and conversational prompts; a column `tools`, `image` or `images` is refused. "
        "Of an IterableDataset the first `num_train_prompts` rows are read",
    ),
    "eval_dataset": mapped(
        None,
        "the same; of a DatasetDict the split `dataset_eval_split`; a dict of several is refused: give one of them",
    ),
    "processing_class": same(None, "the tokenizer; a processor of images is refused by the data it would need"),
    "reward_processing_classes": same(None, "one for each of reward_funcs, None for functions"),
    "callbacks": same(None, "transformers' TrainerCallbacks; see below"),
    "optimizers": same((None, None), "an optimiser over the parameters of `model`, given as an object, and a schedule"),
    "quantization_config": refused(
        None, "load the quantised model yourself and give the object as `model`, with a `peft_config`"
    ),
    "peft_config": same(None),
    "tools": same(
        None,
        "functions, or their addresses; see [tools](tools.md). One that a worker process can load runs there, and one "
        "that takes longer than `tool_timeout` is ended; pictures are refused",
    ),
    "rollout_func": refused(
        None, "completions come from `engine`; a function of your own can be a sampler of `llm_pg.sampling.protocol`"
    ),
    "environment_factory": same(
        None,
        "a class with `reset`, `get_reward` and tools, or a dict of several, among which the column `environment` "
        "chooses",
    ),
}
