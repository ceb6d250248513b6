"""When a step fails: the state before it and the batch that failed are saved, so that it can be looked at and gone on
from. `<run>/crash/step-000007/` holds error.txt, completions.jsonl and batch.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ...learner.learner import Learner
from ..context import RunContext
from ..guard import RunStopped
from . import checkpoint_files
from .checkpointer import Checkpointer


class CrashKeeper:
    """Remembers what a step begins from.

    The weights are not copied. Where the step fails before its first optimiser step they still are those of the step
    before, which are saved; where it fails later, a resume repeats the steps from the newest checkpoint, bit for bit.

    Args:
        context: of the run. checkpointer: saves the state. learner: whose optimiser's steps are watched, and which
            knows the batch it works on.
    """

    def __init__(self, context: RunContext, checkpointer: Checkpointer, learner: Learner) -> None:
        self.context, self.checkpointer, self.learner = context, checkpointer, learner
        self.root, self.ranks, self.clean = context.folder.crash, context.ranks, context.redactor
        self.say = context.terminal.warn
        self.step: int | None = None  # that goes on now
        self._numbers: dict[str, Any] = {}
        self._moved = False
        learner.optimizer.register_step_pre_hook(self._note_move)

    def _note_move(self, *_: Any) -> None:
        self._moved = True

    def begin(self, step: int) -> None:
        self.step, self._moved = step, False
        self.learner.experience = self.learner.batch = None
        self._numbers = self.checkpointer.numbers()

    def end(self) -> None:
        """The step is over; what fails from here on is not its fault."""
        self.step = None

    def keep(self, error: Exception) -> None:
        """Write the bundle of a step that goes on, and the state before it. What cannot be written is reported: `error`
        goes on anyway."""
        if self.step is None:
            return
        folder = self.root / f"step-{self.step:06d}"
        try:
            self._write_bundle(folder, error)
            self.say(f"Step {self.step} failed; its batch and the error are in {folder}.")
        except (OSError, SafetensorError) as problem:
            self.say(f"Step {self.step} failed, and {folder} could not be written: {problem}.")
        if self.ranks.is_main:
            self.say(self._keep_state(self.step))

    def keep_evaluation(self, error: Exception, step: int, model: Path) -> None:
        """The same for the evaluation after the last step, when the model is already saved."""
        folder, self.learner.experience = self.root / f"after-step-{step:06d}", None
        try:
            self._write_bundle(folder, error)
            where = f"the error is in {folder}"
        except (OSError, SafetensorError) as problem:
            where = f"{folder} could not be written: {problem}"
        self.say(
            f"The evaluation after step {step} failed; {where}. The model is in {model}; --resume makes the evaluation "
            "again."
        )

    def _keep_state(self, step: int) -> str:
        before, newest = step - 1, self.checkpointer.newest_step()
        if self._moved and newest is None:
            return "Its weights had moved already and no checkpoint was written before (run.save_steps is 0 or larger)."
        if self.learner.strategy.sharded:  # whoever failed alone, the others are not here to bring their parts
            return f"Its state is in parts over the ranks: --resume repeats the steps from checkpoint {newest}."
        if self._moved:
            return f"Its weights had moved already: --resume repeats the steps from the checkpoint of step {newest}."
        try:
            self.checkpointer.save(before, self._numbers, alone=True)
        except checkpoint_files.CheckpointError as problem:
            return str(problem)
        return f"The state after step {before} is saved; --resume goes on from it."

    def _write_bundle(self, folder: Path, error: Exception) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank{self.ranks.number}" if self.ranks.count > 1 else ""
        text = str(error) if isinstance(error, RunStopped) else self.clean.traceback(error)
        (folder / f"error{rank}.txt").write_text(self.clean.text(text) + "\n")
        experience, batch = self.learner.experience, self.learner.batch
        if experience is None:
            return
        rollouts = experience.rollouts
        advantage_BT = rollouts.reward_BT if batch is None else batch.advantage_BT
        rows = self.clean.tree(experience.readable(advantage_BT, len(experience.prompts)))
        with (folder / f"completions{rank}.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        tensors = {"mask": rollouts.mask_BT, "logp": rollouts.logp_BT, "reward": rollouts.reward_BT}
        if rollouts.tokens_BT is not None:
            tensors["tokens"] = rollouts.tokens_BT
        if rollouts.ref_logp_BT is not None:
            tensors["ref_logp"] = rollouts.ref_logp_BT
        if rollouts.teacher_logp_BT is not None:
            tensors["teacher_logp"] = rollouts.teacher_logp_BT
        if batch is not None:
            tensors |= {"weight": batch.advantage_BT, "scale": batch.loss_scale_BT}
        contiguous = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        save_file(contiguous, folder / f"batch{rank}.safetensors")
