"""Prompts: from a task, a hub name, local files or Python objects, through the chat template, to token ids.

`check_data` finds what can be found without a tokenizer; `load_prompts` makes the prompts; `Prompts` says which of
them a step trains on. Importing this package imports neither torch nor datasets.
"""

from .load import check_data, load_held_out, load_prompts
from .prompt import Prompt, fingerprint
from .sources import task_demonstrations
from .stream import Prompts, permutation

__all__ = [
    "Prompt",
    "Prompts",
    "check_data",
    "fingerprint",
    "load_held_out",
    "load_prompts",
    "permutation",
    "task_demonstrations",
]
