"""Which prompts a step trains on: a function of (seed, step), so a resume needs a step number and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..config import Config, ConfigError
from .encode import encode
from .prompt import Prompt
from .rows import draft_prompts
from .sources import read_object


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, name: str | int) -> tuple[int, ...]:
    """The order of 0 .. size-1 for this seed and name (an epoch's number, or a word for another purpose).

    Positions are sorted by a hash of (seed, name, position): the same on every machine and in every version of Python,
    torch and numpy.
    """

    def key(position: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{name}/{position}".encode(), digest_size=16).digest()

    return tuple(sorted(range(size), key=key))


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int, per_step: int) -> tuple[int, ...]:
    """The permutation of one epoch, such that the step across its beginning holds nothing twice.

    Where that step begins with places of the epoch before, what it took there is moved behind the step's end; within
    the first `per_step` places, so the end of an epoch of two steps or more is that of its plain permutation.
    """
    first = epoch
    while first * size % per_step and (first == epoch or size < 2 * per_step):
        first -= 1
    order = permutation(size, seed, first)
    for number in range(first + 1, epoch + 1):
        taken_before = number * size % per_step
        taken = set(order[size - taken_before :])
        plain = permutation(size, seed, number)
        head = [place for place in plain if place not in taken][: per_step - taken_before]
        rest = set(plain) - set(head)
        order = (*head, *(place for place in plain if place in rest))
    return order


class Prompts:
    """Which prompts a step trains on: `prompts[step]`, steps counted from 0.

    Step s takes places s·n .. s·n + n-1 of the endless order epoch 0, epoch 1, ...; n = per_step. Each epoch is a
    permutation, a function of (seed, epoch, n), so each prompt comes exactly once an epoch; a step may straddle two
    epochs, and never holds a prompt twice. The number of ranks plays no part; each takes a slice of the step.

    Args:
        dataset: rows with a column `prompt`, a text or a list of messages (a `datasets.Dataset`, or dicts), whose
            other columns reward functions receive; or `Prompt` objects.
        tokenizer: encodes rows, by its chat template where they are conversations; not needed for `Prompt` objects.
        per_step: n, prompts of a step, on all ranks.
        seed: of the order.
        shuffle: False = the dataset's order in every epoch.

    Raises:
        ConfigError: fewer prompts than one step needs, or rows that hold no prompt.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any = None, *, per_step: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.prompts = _encoded(dataset, tokenizer)
        check_enough(len(self.prompts), per_step)
        self.prompts_per_step = per_step
        self.seed = seed
        self.shuffle = shuffle

    def __getitem__(self, step: int) -> list[Prompt]:
        return self.take(step)

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0.

        Args:
            step: counted from 0.
        """
        if step < 0:
            raise ValueError(f"Steps count from 0; got {step}.")
        return [self.prompts[place] for place in self._taken(step)]

    def further(self, step: int, number: int) -> list[Prompt | None]:
        """The prompts that a round of a refill has for each place of the step; None = no more are left.

        A function of (seed, step, round, place): a place that needs none in a round leaves its prompt unused. Over all
        rounds no prompt comes twice, nor one of the step's own. Drawn at random also where the data is not shuffled.

        Args:
            step: counted from 0.
            number: of the round, counted from 1.
        """
        each, size = self.prompts_per_step, len(self.prompts)
        queue = self._queue(step, min(each * number, size - each))[each * (number - 1) :]
        return [*(self.prompts[place] for place in queue), *([None] * (each - len(queue)))]

    def _taken(self, step: int) -> list[int]:
        size, first = len(self.prompts), step * self.prompts_per_step
        places = (divmod(place, size) for place in range(first, first + self.prompts_per_step))
        return [self._order(epoch)[place] for epoch, place in places]

    def _queue(self, step: int, length: int) -> list[int]:
        """The first places of the order in which refills of this step draw from all prompts but its own."""
        seen, queue, draw = set(self._taken(step)), [], 0  # type: set[int], list[int], int
        while len(queue) < length:
            digest = hashlib.blake2b(f"{self.seed}/further/{step}/{draw}".encode(), digest_size=16).digest()
            place, draw = int.from_bytes(digest, "big") % len(self.prompts), draw + 1
            if place not in seen:
                seen.add(place)
                queue.append(place)
        return queue

    # What follows is for streams that choose by results; here they change nothing.
    learns = False

    def observe(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        """Takes in what was sampled in a step; a curriculum draws by it.

        Args:
            attempts: (index of the prompt, passes, scorable completions) of each prompt.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must be saved, beside the step's number, to go on; JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Args:
            state: of `state_dict`.
        """

    def metrics(self) -> dict[str, float]:
        """What the stream knows of its prompts."""
        return {}

    def epoch(self, step: int) -> float:
        """Epochs that are over when this step begins.

        Args:
            step: counted from 0.
        """
        return step * self.prompts_per_step / len(self.prompts)

    def _order(self, epoch: int) -> Sequence[int]:
        size = len(self.prompts)
        return epoch_order(size, self.seed, epoch, self.prompts_per_step) if self.shuffle else range(size)


def _encoded(dataset: Any, tokenizer: Any) -> Sequence[Prompt]:
    if all(isinstance(each, Prompt) for each in dataset):
        prompts: Sequence[Prompt] = dataset
        return prompts
    if tokenizer is None:
        raise ConfigError("Prompts got rows and no tokenizer: give that of the policy, Prompts(rows, tokenizer).")
    config = Config()
    table = read_object(dataset, "dataset", config, len(dataset))
    return encode(draft_prompts(config.data, table), tokenizer, table.where, chat_template_kwargs={})


def check_enough(found: int, prompts_per_step: int) -> None:
    """ConfigError when a step needs more prompts than there are to train on."""
    if found < prompts_per_step:
        raise ConfigError(
            f"One step needs {prompts_per_step} prompts, and {found} {'is' if found == 1 else 'are'} left to train on. "
            "Give more data, or lower prompts_per_step (or per_device_train_batch_size × gradient_accumulation_steps)."
        )
