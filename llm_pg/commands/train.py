"""A run from the command line: its first line, its checks, the slow imports, then the trainer."""

from __future__ import annotations

from .. import __version__
from ..config import Config
from ..run.guard import RunStopped
from ..run.logs.redact import Redactor


def run_training(config: Config, *, resume: bool | str, quiet: bool, as_json: bool, override: bool = False) -> int:
    """Runs a config to its end; what needs no torch is checked before torch is imported.

    Raises:
        ConfigError: bad settings or data.
        RunStopped: the run cannot go on.
    """
    from ..metrics import Clock
    from ..terminal import make_terminal

    terminal = make_terminal(quiet=quiet, as_json=as_json)
    clean = Redactor(config.model_dump(mode="json"))
    terminal.say(clean.text(f"llm-pg {__version__}: {_in_short(config)}"))
    clock = Clock(terminal.phase)
    with terminal.during("check"):
        from ..run.before.preflight import preflight

        preflight(config, resume=bool(resume))
    clean.guard_process()
    with clock("import"):
        heavy_imports()
    from ..rewards import RewardError
    from ..run.saving.checkpoint_files import CheckpointError
    from ..sampling.vllm import EngineError
    from ..trainer import Trainer

    try:
        Trainer(config, terminal=terminal, clock=clock).train(resume=resume, override=override)
    except (RunStopped, RewardError, CheckpointError, EngineError) as error:
        raise RunStopped(str(error)) from None
    return 0


def _in_short(config: Config) -> str:
    """What a run is about, in a line."""
    from ..run.saving.folder import run_name

    data, model = config.data, config.model
    files = data.data_files if isinstance(data.data_files, str) else ", ".join(data.data_files or [])
    source = data.task or data.dataset_name or files
    name = model.model_name_or_path or "a made model"
    return f"{config.algorithm.name}, {name}, {source} (runs in {config.run.output_dir}/{run_name(config)})"


def heavy_imports() -> None:
    """torch and transformers; the run prints its own lines."""
    from .. import trainer  # noqa: F401
