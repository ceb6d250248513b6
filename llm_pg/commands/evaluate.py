"""`llm-pg eval`: a model, or what a run saved, on held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, ConfigError, load_config
from ..metrics import Clock

if TYPE_CHECKING:
    from ..config.schema import ModelConfig
    from ..evaluate import Evaluation


def evaluation_config(
    model: str, source: list[str], settings: list[str], *, task: str | None = None, num_prompts: int | None = None
) -> tuple[Config, Path | None]:
    """Returns the settings of an evaluation, and the folder of what is evaluated where a run saved it.

    Args:
        model: a run's folder or a folder that a run saved in it (model/, best/, merged/), whose settings are then
            taken; else a hub id or the folder of a model.
        source: settings of the held-out rows; [] = those of `task`, else the run's own.
        settings: key=value, over everything else.
        task: a synthetic task, scored by its own reward unless `settings` name another.
        num_prompts: held-out prompts; None = the run's number, all rows of `source`, or the default.

    Raises ConfigError where nothing says what to evaluate on, or the run has saved no model.
    """
    run, saved = _saved_by_run(Path(model))
    given = [] if run is not None else [f"model_name_or_path={model}"]
    if task:
        given += ["data.dataset_name=null", "data.data_files=null", "data.eval_data_files=null", f"data.task={task}"]
        given += ["reward.reward_funcs=[]", "reward.reward_weights=null"]
    elif source:
        on_hub = any(setting.startswith("data.dataset_name") for setting in source)
        given += [*source, *(["data.eval_data_files=null", "data.dataset_eval_split=test"] if on_hub else [])]
    if num_prompts or source:
        given.append(f"num_eval_prompts={num_prompts or 10**9}")
    config = load_config(run / "config.yaml" if run is not None else None, [*given, *settings])
    data = config.data
    if not (data.task or data.eval_data_files or data.dataset_name or data.data_files):
        why = "; the run's own prompts were given in Python" if run else ", or name the folder of a run"
        raise ConfigError(
            f"Nothing says what {model} is evaluated on: give --task NAME, or --data with a file or a hub dataset{why}."
        )
    if not data.num_eval_prompts:
        raise ConfigError("num_eval_prompts is 0, so that there is nothing to evaluate on. Give --num-prompts N.")
    return config, saved


def _saved_by_run(path: Path) -> tuple[Path | None, Path | None]:
    """The run's folder and the model's in it; None and None where the path is neither."""
    if (path / "config.yaml").is_file():
        if not (path / "model").is_dir():
            raise ConfigError(
                f"The run {path} has no model/ yet. It is written when the run ends; `llm-pg train ... --resume` goes "
                "on with one that was ended early."
            )
        return path, path / "model"
    if path.is_dir() and (path.resolve().parent / "config.yaml").is_file():
        return path.resolve().parent, path
    return None, None


def evaluate_model(config: Config, terminal: Any, folder: Path | None = None, clock: Clock | None = None) -> Evaluation:
    """Pass rates on held-out prompts of a model as it is: that of the config, or what a run saved in `folder`.

    clock: whose phases are shown.
    """
    from ..model.bars import no_progress_bars
    from ..model.loading import context_length, context_length_before, default_device, generation_stub, load_tokenizer
    from ..prompts import load_held_out
    from ..run.before.fit_to_prompts import fit_to_prompts
    from ..run.build import make_collector, make_scorer
    from ..run.evaluator import evaluate_held_out
    from ..run.tools import make_toolbox, show_tools, shown_to

    clock = clock or Clock()
    source = config.model if folder is None else saved_source(config, folder)
    with clock("load"), no_progress_bars():
        tokenizer = load_tokenizer(source)
        longest = context_length_before(source)
        # What data, tokenizer and rewards alone can refuse comes before the weights, where the context is known.
        first = _loaded(config, source, folder, tokenizer) if longest is None else None
        toolbox = make_toolbox(config)
        show_tools(config, toolbox, first or generation_stub(source), tokenizer, terminal.warn)
        longest = longest if first is None else context_length(first)
        held_out = load_held_out(config, tokenizer, context_length=longest)
        (prompts,) = shown_to(config, toolbox, tokenizer, held_out)
    with make_scorer(config, None, [prompt.row for prompt in prompts], toolbox=toolbox) as scorer:
        with clock("load"), no_progress_bars():
            model = first or _loaded(config, source, folder, tokenizer)
            if not config.train.use_cpu:
                model.to(default_device())
        fit_to_prompts(model, tokenizer, prompts, config, terminal.warn)
        collector = make_collector(config, model, tokenizer, scorer, toolbox=toolbox)
        if hasattr(collector.engine, "progress"):
            collector.engine.progress = terminal.sampled
        with collector, clock("eval"):
            result = evaluate_held_out(collector, prompts, config.eval)
    terminal.evaluation(str(folder or config.model.model_name_or_path), result)
    return result


def load_saved(config: Config, folder: Path) -> tuple[Any, Any]:
    """Returns the model in a folder and its tokenizer: whole weights, or an adapter on the model it was trained on.

    config: of the run that saved it. Raises ConfigError where the adapter's model is not known.
    """
    from ..model.loading import load_tokenizer

    source = saved_source(config, folder)
    tokenizer = load_tokenizer(source)
    return _loaded(config, source, folder, tokenizer), tokenizer


def saved_source(config: Config, folder: Path) -> ModelConfig:
    """Returns what is loaded of a folder that a run saved: itself, or the model that its adapter belongs to.

    config: of the run. Raises ConfigError where the adapter's model is not known.
    """
    base = config.model.model_copy(update={"use_peft": False})
    facts = folder / "adapter_config.json"
    if not facts.exists():
        return base.model_copy(update={"make": None, "model_name_or_path": str(folder)})
    if base.make is None and base.model_name_or_path is None:
        base.model_name_or_path = json.loads(facts.read_text())["base_model_name_or_path"]
    if base.make is None and not base.model_name_or_path:
        raise ConfigError(
            f"{folder} does not say which model its adapter belongs to: that model was given as an object without a "
            "name. Merge it in Python: peft.PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    return base


def _loaded(config: Config, source: ModelConfig, folder: Path | None, tokenizer: Any) -> Any:
    """The model of `source`, with the adapter in `folder` where there is one."""
    from ..model.loading import load_model

    model = load_model(source, tokenizer, seed=config.run.seed)
    if folder is None or not (folder / "adapter_config.json").exists():
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))
