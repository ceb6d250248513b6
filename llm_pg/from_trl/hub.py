"""The model of a run on the hub: its card, and the upload that a script asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError

_CARD = "README.md"


def write_card(
    folder: Path,
    config: Config,
    algorithm: Any,
    summary: Mapping[str, Any] | None,
    *,
    model_name: str,
    dataset_name: str | list[str] | None = None,
    tags: str | Sequence[str] = (),
) -> Path:
    """Writes the card of a model, `README.md`, into a folder; returns its place.

    Args:
        folder: made where it is not there. config: of the run. algorithm: its `AlgorithmSpec`.
        summary: of a run that came to its end; None = it has not.
        model_name: in the title. dataset_name, tags: in the card's data, beside those that the run knows.
    """
    from huggingface_hub import ModelCardData

    base, task = config.model.model_name_or_path, config.data.task or config.data.dataset_name
    data = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=dataset_name or config.data.dataset_name,
        library_name="peft" if config.model.use_peft else "transformers",
        model_name=model_name,
        tags=["llm_pg", "reinforcement-learning", algorithm.name, *([tags] if isinstance(tags, str) else tags)],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {model_name}", "", *_facts(config, algorithm, task, base)]
    lines += _results(summary) + _reproduction(config, algorithm, summary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / _CARD


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
        return ["Nothing was held out, so nothing is said of how well it does.", ""]
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


def upload(folder: Path, given: Any, *, default_name: str, commit_message: str, **options: Any) -> Any:
    """Uploads a folder to a model repository of the hub, which is made where it is not there.

    Args:
        folder: with model and card. given: the config, of which `hub_model_id`, `hub_token`, `hub_private_repo` and
            `hub_revision` are read. default_name: of the repository, where no id is given.
        options: token, revision: in place of the config's.

    Returns:
        huggingface_hub's CommitInfo; `repo_url.repo_id` is the repository.

    Raises:
        ConfigError: the hub refuses, or cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def read(name: str) -> Any:
        return options.get(name) or getattr(given, f"hub_{name}", None)

    api = HfApi(token=read("token"))
    try:
        private = getattr(given, "hub_private_repo", None)
        url = api.create_repo(read("model_id") or default_name, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=commit_message, revision=read("revision")
        )
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, ValueError) as error:
        raise ConfigError(
            f"The model was not uploaded: {' '.join(str(error).split())} It is in {folder}. Log in with `hf auth login`"
            " or give hub_token and hub_model_id, and call trainer.push_to_hub() again."
        ) from None
