"""What of a run is saved to go on with, and the refusal to go on with something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__, checkpoint
from .config import Config, ConfigError
from .policy import Updater

# Sections that may differ when a run goes on: where it writes, how it is watched, how functions are bounded.
_FREE = ("run", "eval", "reward")


class Saver:
    """Saves and restores the moving parts of a run: trainable weights, optimiser, schedule, the algorithm's state."""

    def __init__(self, root: Path, config: Config, updater: Updater, data: str) -> None:
        self.root, self.config, self.updater, self.data = root, config, updater, data

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = {k: v for k, v in self.config.model_dump(mode="json").items() if k not in _FREE}
        settings["run"] = {"seed": self.config.run.seed}
        versions = {"llm_pg": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {"config": settings, "data": self.data, "versions": versions}

    def save(self, step: int) -> None:
        updater = self.updater
        state = checkpoint.State(
            step,
            {name: p for name, p in updater.policy.model.named_parameters() if p.requires_grad},
            checkpoint.optimizer_tensors(updater.optimizer.optimizer),
            {"scheduler": _plain(updater.scheduler.state_dict()), "algorithm": updater.algorithm.state_dict()},
        )
        checkpoint.save(self.root, state, self.identity(), self.config.run.save_total_limit)

    def restore(self, folder: Path) -> int:
        """Put a verified checkpoint back; returns its step. ConfigError when it belongs to other settings."""
        state, identity = checkpoint.load(folder)
        changed = difference(identity, self.identity())
        if changed:
            raise ConfigError(
                f"Checkpoint {folder} belongs to a run with other settings: {'; '.join(changed)}. Go back to those, or "
                "start anew with run.overwrite=true or another run.run_name."
            )
        parameters = dict(self.updater.policy.model.named_parameters())
        with torch.no_grad():
            for name, value in state.weights.items():
                parameters[name].copy_(value)
        checkpoint.restore_optimizer(self.updater.optimizer.optimizer, state.optimizer)
        lambdas = self.updater.scheduler.state_dict()["lr_lambdas"]
        self.updater.scheduler.load_state_dict({**state.numbers["scheduler"], "lr_lambdas": lambdas})
        for group, rate in zip(
            self.updater.optimizer.param_groups, state.numbers["scheduler"]["_last_lr"], strict=True
        ):
            group["lr"] = rate
        self.updater.algorithm.load_state_dict(state.numbers["algorithm"])
        return state.step


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's numbers; its functions come back from the config."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"}


def difference(saved: Any, present: Any, path: str = "") -> list[str]:
    """'section.key: saved -> present' for every leaf that differs; versions are told apart by their own line."""
    if isinstance(saved, dict) and isinstance(present, dict):
        keys = [*saved, *(k for k in present if k not in saved)]
        return [
            line for k in keys for line in difference(saved.get(k), present.get(k), f"{path}.{k}" if path else str(k))
        ]
    return [] if saved == present else [f"{path.removeprefix('config.')}: {saved!r} then, {present!r} now"]
