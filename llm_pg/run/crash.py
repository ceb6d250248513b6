"""When a step fails: the state before it and the batch that failed are kept, so that it can be looked at and gone on
from. `<run>/crash/step-000007/` holds error.txt, completions.jsonl and batch.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..algorithms.algorithm import Batch
from ..collect.collector import Experience
from . import checkpoint
from .guard import RunStopped
from .ranks import Ranks
from .redact import Redactor
from .resume import Saver


class Keeper:
    """Remembers what a step begins from.

    The weights are not copied. Where the step fails before its first optimiser step they still are those of the step
    before, which are saved; where it fails later, a resume repeats the steps from the newest checkpoint, bit for bit.

    Args:
        root: folder of the crash bundles. saver: of the run. optimizer: torch's, whose steps are watched.
        clean: hides secrets. say: prints one line.
    """

    def __init__(
        self,
        root: Path,
        saver: Saver,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        clean: Redactor,
        say: Callable[[str], None],
    ) -> None:
        self.root, self.saver, self.ranks, self.clean, self.say = root, saver, ranks, clean, say
        self.step = 0
        self.experience: Experience | None = None
        self.batch: Batch | None = None
        self._numbers: dict[str, Any] = {}
        self._moved = False
        optimizer.register_step_pre_hook(self._note_move)

    def _note_move(self, *_: Any) -> None:
        self._moved = True

    def begin(self, step: int) -> None:
        self.step, self.experience, self.batch, self._moved = step, None, None, False
        self._numbers = self.saver.numbers()

    def keep(self, error: Exception) -> None:
        """Write the bundle, and the state before the step. What cannot be written is said: `error` goes on anyway."""
        folder = self.root / f"step-{self.step:06d}"
        try:
            self._write_bundle(folder, error)
            self.say(f"Step {self.step} failed; its batch and the error are in {folder}.")
        except OSError as problem:
            self.say(f"Step {self.step} failed, and {folder} could not be written: {problem}.")
        if self.ranks.is_main:
            self.say(self._keep_state())

    def keep_evaluation(self, error: Exception, step: int, model: Path) -> None:
        """The same for the evaluation after the last step, when the model is already saved."""
        folder, self.experience, self.batch = self.root / f"after-step-{step:06d}", None, None
        try:
            self._write_bundle(folder, error)
            where = f"the error is in {folder}"
        except OSError as problem:
            where = f"{folder} could not be written: {problem}"
        self.say(
            f"The evaluation after step {step} failed; {where}. The model is in {model}; --resume makes the evaluation "
            "again."
        )

    def _keep_state(self) -> str:
        before, newest = self.step - 1, self.saver.newest_step()
        if self._moved and newest is None:
            return "Its weights had moved already and no checkpoint was written before (run.save_steps is 0 or larger)."
        if self.saver.sharded:  # whoever failed alone, the others are not here to bring their parts
            return f"Its state stands in parts over the ranks: --resume repeats the steps from checkpoint {newest}."
        if self._moved:
            return f"Its weights had moved already: --resume repeats the steps from the checkpoint of step {newest}."
        try:
            self.saver.save(before, self._numbers, alone=True)
        except checkpoint.CheckpointError as problem:
            return str(problem)
        return f"The state after step {before} is saved; --resume goes on from it."

    def _write_bundle(self, folder: Path, error: Exception) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank{self.ranks.number}" if self.ranks.count > 1 else ""
        text = str(error) if isinstance(error, RunStopped) else self.clean.traceback(error)
        (folder / f"error{rank}.txt").write_text(self.clean.text(text) + "\n")
        if self.experience is None:
            return
        rollouts = self.experience.rollouts
        weight_BT = rollouts.reward_BT if self.batch is None else self.batch.weight_BT
        rows = self.clean.tree(self.experience.readable(weight_BT, len(self.experience.prompts)))
        with (folder / f"completions{rank}.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        tensors = {"mask": rollouts.mask_BT, "logp": rollouts.logp_BT, "reward": rollouts.reward_BT}
        if rollouts.tokens_BT is not None:
            tensors["tokens"] = rollouts.tokens_BT
        if rollouts.ref_logp_BT is not None:
            tensors["ref_logp"] = rollouts.ref_logp_BT
        if self.batch is not None:
            tensors |= {"weight": self.batch.weight_BT, "scale": self.batch.scale_BT}
        contiguous = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        save_file(contiguous, folder / f"batch{rank}.safetensors")
