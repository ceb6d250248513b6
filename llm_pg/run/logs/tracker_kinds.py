"""What is special of each tracker: how its run begins and goes on, its tables, its summary, and where it is read."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...config import Config, ConfigError

START_SECONDS = 15.0


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers name it.

    Attributes:
        project: of the trackers. name: of the run. folder: of the run.
        group: of runs that belong together, such as seeds. tags: words to find it by.
        start: steps that are done already; 0 = it begins.
    """

    project: str
    name: str
    folder: Path
    group: str
    tags: tuple[str, ...] = ()
    start: int = 0

    @property
    def _file(self) -> Path:
        return self.folder / "trackers.json"

    def known_id(self, kind: str) -> str | None:
        """The tracker's own id of this run, where it was begun before and goes on now."""
        found = self._ids().get(kind) if self.start else None
        return None if found is None else str(found)

    def keep_id(self, kind: str, own: str) -> None:
        """Writes it down for a resumed run."""
        self._file.write_text(json.dumps({**self._ids(), kind: own}), encoding="utf-8")

    def _ids(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        return found


def group_of(name: str) -> str:
    """The name of a run without its seed: runs that differ in nothing else are a group."""
    return re.sub(r"-seed\d+$", "", name)


Rows = tuple[list[str], list[list[Any]]]


class Kind:
    """A tracker of accelerate as it is: numbers and settings, a run of its own each time.

    Args:
        name: in `report_to`. module: that must be installed.
    """

    def __init__(self, name: str, module: str | None = None) -> None:
        self.name, self.module = name, module or name

    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def begin(self, run: TrackedRun) -> Any:
        """Returns accelerate's tracker, started."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        made = LOGGER_TYPE_TO_CLASS[self.name]
        tracker = made(run.project, run.folder / self.name) if made.requires_logging_directory else made(run.project)
        return self._started(tracker)

    @staticmethod
    def _started(tracker: Any) -> Any:
        if hasattr(tracker, "start"):
            tracker.start()
        return tracker

    def configure(self, tracker: Any, settings: dict[str, Any]) -> None:
        """The settings of the run."""
        tracker.store_init_configuration(settings)

    def place(self, tracker: Any, run: TrackedRun) -> str | None:
        """Where a person reads it: an address, or a command; None = nowhere that is known."""
        return None

    def table(self, tracker: Any, rows: Rows, step: int) -> None:
        """Completions; other trackers get the numbers only."""

    def summarise(self, tracker: Any, values: Mapping[str, float], step: int) -> None:
        """What the run came to."""
        tracker.log({f"summary/{name}": value for name, value in values.items()}, step=step)


class Wandb(Kind):
    """WANDB_NAME, WANDB_RUN_ID, WANDB_RUN_GROUP and WANDB_TAGS of the environment come first, as wandb has them."""

    def begin(self, run: TrackedRun) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        given = {"name": run.name, "group": run.group, "tags": list(run.tags) or None}
        variables = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS"}
        given = {key: value for key, value in given.items() if not os.environ.get(variables[key])}
        if not os.environ.get("WANDB_RUN_ID"):
            given["id"] = run.known_id(self.name)  # None = a new one
        settings = wandb.Settings(init_timeout=START_SECONDS, silent=True, console="off")
        tracker = self._started(WandBTracker(run.project, resume="allow", settings=settings, **given))
        run.keep_id(self.name, tracker.run.id)
        return tracker

    def place(self, tracker: Any, run: TrackedRun) -> str | None:
        if tracker.run.url:
            return str(tracker.run.url)
        return None if tracker.run.disabled else f"wandb sync {Path(tracker.run.dir).parent}"

    def table(self, tracker: Any, rows: Rows, step: int) -> None:
        tracker.log_table("completions", columns=rows[0], data=rows[1], step=step)

    def summarise(self, tracker: Any, values: Mapping[str, float], step: int) -> None:
        tracker.run.summary.update(dict(values))


class Trackio(Kind):
    def begin(self, run: TrackedRun) -> Any:
        from accelerate.tracking import TrackioTracker

        resume = "allow" if run.start else "never"
        return self._started(TrackioTracker(run.project, name=run.name, group=run.group, resume=resume, embed=False))

    def place(self, tracker: Any, run: TrackedRun) -> str | None:
        return f'trackio show --project "{run.project}"'

    def table(self, tracker: Any, rows: Rows, step: int) -> None:
        import pandas
        import trackio

        frame = pandas.DataFrame(rows[1], columns=rows[0])
        tracker.log({"completions": trackio.Table(dataframe=frame)}, step=step)


class TensorBoard(Kind):
    """A folder of its own in each run's folder; what a resumed run does again is taken back."""

    def begin(self, run: TrackedRun) -> Any:
        from accelerate.tracking import TensorBoardTracker

        again = {"purge_step": run.start + 1} if run.start else {}
        return self._started(TensorBoardTracker(self.name, run.folder, **again))

    def place(self, tracker: Any, run: TrackedRun) -> str | None:
        return f"tensorboard --logdir {run.folder.parent}"

    def table(self, tracker: Any, rows: Rows, step: int) -> None:
        """As Markdown, which tensorboard's text pane draws; what would end a cell is written as HTML."""

        def cell(value: Any) -> str:
            text = html.escape("–" if value is None else str(value), quote=False)
            return text.replace("|", "&#124;").replace("\n", "<br>")

        columns, data = rows
        lines = [columns, ["---"] * len(columns), *data]
        text = "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
        tracker.writer.add_text("completions", text, global_step=step)


class MLflow(Kind):
    def begin(self, run: TrackedRun) -> Any:
        from accelerate.tracking import MLflowTracker

        known = run.known_id(self.name)
        tags = {"group": run.group, **{f"tag.{word}": "true" for word in run.tags}}
        name = None if known else run.name
        tracker = self._started(MLflowTracker(experiment_name=run.project, run_id=known, run_name=name, tags=tags))
        run.keep_id(self.name, tracker.active_run.info.run_id)
        return tracker

    def configure(self, tracker: Any, settings: dict[str, Any]) -> None:
        """A parameter of mlflow never changes; what a resumed run changed is a tag."""
        import mlflow

        known = mlflow.MlflowClient().get_run(tracker.active_run.info.run_id).data.params
        tracker.store_init_configuration({name: value for name, value in settings.items() if name not in known})
        changed = {name: str(value) for name, value in settings.items() if known.get(name, str(value)) != str(value)}
        mlflow.set_tags({f"changed.{name}": value for name, value in changed.items()})

    def place(self, tracker: Any, run: TrackedRun) -> str | None:
        import mlflow

        return f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}"

    def table(self, tracker: Any, rows: Rows, step: int) -> None:
        import mlflow

        columns, data = rows
        mlflow.log_table({name: [row[i] for row in data] for i, name in enumerate(columns)}, "completions.json")


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Wandb("wandb"),
        Trackio("trackio"),
        TensorBoard("tensorboard"),
        MLflow("mlflow"),
        Kind("aim"),
        Kind("comet_ml"),
        Kind("clearml"),
        Kind("dvclive"),
        Kind("swanlab"),
    )
}


def check_trackers(config: Config) -> None:
    """ConfigError where a tracker's package is not installed, which accelerate would leave out without a word."""
    for name in config.run.report_to:
        if not KINDS[name].installed():
            there = [each for each in KINDS if KINDS[each].installed()]
            raise ConfigError(
                f"report_to names {name}, and its package {KINDS[name].module} is not installed: pip install "
                f"{KINDS[name].module}. Installed are {', '.join(there) or 'none'}; metrics.jsonl has all numbers in "
                "any case."
            )
