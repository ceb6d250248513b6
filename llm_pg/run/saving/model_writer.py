"""The model of a run on the disk: checked before it is written, replaced as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import ConfigError
from ...model.merging import PROMPTS, save_merged
from ...model.policy import Policy
from ...prompts import Prompt
from ..context import RunContext
from .checkpoint_files import CheckpointError
from .folder import replaced
from .other_parts import other_parts


class ModelWriter:
    """Saves the policy as `AutoModelForCausalLM.from_pretrained` reads it (a PEFT model: its adapter).

    Args:
        context: of the run. policy: whose weights. tokenizer: saved beside them.
        prompts: held out, or else to train on: the first of them are where a merged model is compared.
        newest_checkpoint: step of the newest whole one, for the message where weights are lost; None = there is none.
    """

    def __init__(
        self,
        context: RunContext,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        newest_checkpoint: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.context, self.policy, self.tokenizer = context, policy, tokenizer
        self.newest_checkpoint = newest_checkpoint
        self.beside = other_parts(policy.model)
        self.compared = [prompt.ids for prompt in prompts[:PROMPTS]]

    def save(self, path: str | Path | None = None) -> None:
        """On several ranks all must call it.

        Args:
            path: a folder; None = `model/` in the run's folder. A critic is saved beside the model, in
                `critic.safetensors`.

        Raises:
            CheckpointError: on every rank, where a weight is NaN or inf; what was saved before stays.
        """
        folder, writes = self.context.folder, self.context.ranks.is_main
        collected = self.policy.strategy.state_dict(self.policy.model)
        self._check_finite(collected)
        if path is None or Path(path) == folder.model:
            place: Any = replaced(folder.model, writes=writes)
        else:
            place = contextlib.nullcontext(Path(path))
        with place as target:
            self.policy.save_pretrained(target, weights=collected, writes=writes)
        if self.beside is not None and (path is None or Path(path) == folder.model):
            self.context.terminal.warn(self.beside.at_the_save(folder.model))
            self.beside = None

    def save_merged(self) -> None:
        """Where the config asks for it, the adapter merged into its model, in `merged/`: only where that computes what
        was trained. The adapter is saved in any case."""
        folder, terminal = self.context.folder, self.context.terminal
        if not (self.context.config.run.merge_adapter and self.context.ranks.is_main):
            return
        try:
            with replaced(folder.merged) as target:
                done = save_merged(self.policy.model, self.tokenizer, target, self.compared)
        except ConfigError as error:
            terminal.warn(f"{folder.merged} was not written. {error} The adapter is in {folder.model}.")
        else:
            terminal.say(done)

    def _check_finite(self, collected: Mapping[str, Any] | None) -> None:
        """collected: whole weights of a model in parts, which the first rank has."""
        weights = dict(self.policy.model.named_parameters()) if collected is None else collected
        bad = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
        if collected is not None:
            bad = self.context.ranks.gather(bad)[0]
        if not bad:
            return
        good, checkpoints = self.newest_checkpoint(), self.context.folder.checkpoints
        last = "" if good is None else f" The last good weights are those of checkpoint {good} in {checkpoints}."
        raise CheckpointError(
            f"The model was not saved: {len(bad)} of {len(weights)} weights hold NaN or inf ({bad[0]} first).{last} "
            "Lower train.learning_rate, or look for the step in metrics.jsonl where grad_norm grew."
        )
