"""The model of a run on the hub: its card, and the upload that a script asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..algorithms.spec import AlgorithmSpec
from ..config import Config, ConfigError
from ..config.flat import FlatConfig
from ..run.saving.folder import RunFolder

_CARD = "README.md"
# Files of a checkpoint that are the model; the rest is what a run goes on with.
_MODEL_FILES = [
    *("config.json", "generation_config.json", "model*.safetensors*", "adapter_*", "tokenizer*", "chat_template*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*", "merges*"),
]


@dataclass(frozen=True)
class HubOptions:
    """TRL's arguments about the hub, as a config has them: `push_to_hub` and those that begin with `hub_`."""

    push: bool = False
    model_id: str | None = None
    token: str | None = None
    private_repo: bool | None = None
    revision: str | None = None
    strategy: str = "every_save"


def hub_options(config: Config) -> HubOptions:
    """Those of a config; the defaults where it is not one of TRL's form."""
    if not isinstance(config, FlatConfig):
        return HubOptions()
    return HubOptions(
        config.push_to_hub,
        config.hub_model_id,
        config.hub_token,
        config.hub_private_repo,
        config.hub_revision,
        str(getattr(config.hub_strategy, "value", config.hub_strategy)),
    )


class HubModel:
    """The model of a run on the hub.

    Args:
        config: of the run. spec: its algorithm. folder: where its model is.

    Attributes:
        repo_id: of the repository that an upload made or found; None before.
    """

    def __init__(self, config: Config, spec: AlgorithmSpec, folder: RunFolder) -> None:
        self.config, self.spec, self.folder = config, spec, folder
        self.repo_id: str | None = None

    @property
    def options(self) -> HubOptions:
        """Of the config as it is now."""
        return hub_options(self.config)

    @property
    def model_id(self) -> str | None:
        """The repository's id; before an upload as the config has it."""
        return self.repo_id or self.options.model_id

    def write_card(
        self,
        folder: Path,
        summary: Mapping[str, Any] | None,
        *,
        model_name: Any = None,
        dataset_name: str | list[str] | None = None,
        tags: str | Sequence[str] | None = (),
    ) -> Path:
        """Writes the model's card, `README.md`, into a folder; returns its place.

        Args:
            folder: made where it is not there. summary: of a run that came to its end; None = it has not.
            model_name: in the title; what is no text = that of the run. dataset_name, tags: in the card's data, beside
                those that the run knows.
        """
        from huggingface_hub import ModelCardData

        config, algorithm = self.config, self.spec
        name = model_name if isinstance(model_name, str) else self.folder.path.name
        base, task = config.model.model_name_or_path, config.data.task or config.data.dataset_name
        data = ModelCardData(
            base_model=base if base and not Path(base).exists() else None,
            datasets=dataset_name or config.data.dataset_name,
            library_name="peft" if config.model.use_peft else "transformers",
            model_name=name,
            tags=[
                "llm_pg",
                "reinforcement-learning",
                algorithm.name,
                *([tags] if isinstance(tags, str) else tags or ()),
            ],
        )
        lines = ["---", data.to_yaml(), "---", "", f"# {name}", "", *_facts(config, algorithm, task, base)]
        lines += _results(summary) + _reproduction(config, algorithm, summary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder / _CARD

    def push(self, summary: Mapping[str, Any] | None, commit_message: str, **options: Any) -> Any:
        """Uploads the model of the run with its card to a repository, which is made where it is not there.

        Args:
            summary: of a run that came to its end; None = it has not. commit_message: of the upload.
            **options: token, model_id, revision: in place of the config's; model_name, dataset_name, tags: of the card.

        Returns:
            huggingface_hub's CommitInfo; `repo_url.repo_id` is the repository.

        Raises:
            ConfigError: the hub refuses, or cannot be reached.
        """
        folder, given = self.folder.model, self.options
        of_card = {name: options.get(name) for name in ("model_name", "dataset_name", "tags")}
        self.write_card(folder, summary, **of_card)
        done = self._upload(
            folder,
            commit_message,
            model_id=options.get("model_id"),
            token=options.get("token"),
            revision=options.get("revision") or given.revision,
        )
        self.repo_id = done.repo_url.repo_id
        return done

    def push_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Uploads what `hub_strategy` asks for of a checkpoint: the model, and with `checkpoint` the whole folder as
        `last-checkpoint`, with `all_checkpoints` as `checkpoint-<step>`.

        Args:
            checkpoint: its folder. step: its step.

        Raises:
            ConfigError: the hub refuses, or cannot be reached.
        """
        message, revision = f"Training in progress, step {step}", self.options.revision
        self.repo_id = self._upload(
            checkpoint, message, revision=revision, allow_patterns=_MODEL_FILES
        ).repo_url.repo_id
        whole = {"checkpoint": "last-checkpoint", "all_checkpoints": f"checkpoint-{step}"}.get(self.options.strategy)
        if whole is not None:
            self._upload(checkpoint, f"{message}, checkpoint", revision=revision, path_in_repo=whole)

    def _upload(
        self, folder: Path, commit_message: str, *, model_id: str | None = None, token: str | None = None, **more: Any
    ) -> Any:
        from httpx import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        given = self.options
        name = model_id or given.model_id or Path(self.config.run.output_dir).name
        api = HfApi(token=token or given.token)
        try:
            url = api.create_repo(name, private=given.private_repo, exist_ok=True)
            return api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message, **more)
        except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, ValueError) as error:
            raise ConfigError(
                f"The model was not uploaded: {' '.join(str(error).split())} It is in {folder}. Log in with `hf auth "
                "login` or give hub_token and hub_model_id, and call trainer.push_to_hub() again."
            ) from None


class HubSaves(TrainerCallback):
    """Uploads after each checkpoint, as `hub_strategy` says. An upload that fails cannot end the run.

    Args:
        hub: the model of the run. warn: called with the reason where an upload failed.
    """

    def __init__(self, hub: HubModel, warn: Callable[[str], None]) -> None:
        self.hub, self.warn = hub, warn

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(self.hub.config.run.output_dir) / f"checkpoint-{state.global_step}"
        try:
            self.hub.push_checkpoint(checkpoint.resolve(), state.global_step)
        except ConfigError as error:
            self.warn(str(error))


def _facts(config: Config, algorithm: Any, task: str | None, base: str | None) -> list[str]:
    rewards = [getattr(each, "__name__", str(each)) for each in config.reward.reward_funcs]
    return [
        f"{base or 'A model with random weights'}, fine-tuned by `{algorithm.name}` ({algorithm.source}).",
        "",
        f"- Data: {task or 'rows given to the trainer'}" + (f"; rewards: {', '.join(rewards)}" if rewards else ""),
        f"- {config.train.max_steps} steps, learning rate {config.train.learning_rate:g}, KL weight {algorithm.beta:g},"
        f" temperature {config.rollout.temperature:g}, {config.rollout.num_generations} completions a prompt",
        "",
    ]


def _results(summary: Mapping[str, Any] | None) -> list[str]:
    """Before and after with 95 % intervals, of what was evaluated."""
    if not summary or not summary.get("num_eval_prompts"):
        return ["No prompts were held out, so there is no evaluation.", ""]
    lines = ["| held out | before | after |", "| --- | --- | --- |"]
    rows = {"pass rate, greedy": "pass_rate_{}_interval", "mean reward, greedy": "reward_{}"}
    rows["mean reward, sampled"] = "sampled_reward_{}"
    for title, name in rows.items():
        shown = [_interval(summary.get(name.format(when))) for when in ("before", "after")]
        if any(shown):
            lines.append(f"| {title} | {shown[0] or '–'} | {shown[1] or '–'} |")
    return [f"On {summary['num_eval_prompts']} held-out prompts, with 95 % intervals:", "", *lines, ""]


def _interval(values: Sequence[float] | None) -> str:
    return "" if not values else f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def _reproduction(config: Config, algorithm: Any, summary: Mapping[str, Any] | None) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in (summary or {}).get("versions", {}).items())
    return [
        "To reproduce it: `llm-pg train config.yaml` with the run's settings, which are in its folder; seed "
        f"{config.run.seed}" + (f"; {versions}." if versions else "."),
        "",
        f"What the expected update of `{algorithm.name}` is, against the exact gradient: its line of `llm-pg prove`.",
    ]
