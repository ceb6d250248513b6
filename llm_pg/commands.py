"""The commands that train nothing: `llm-pg checkpoint verify` and `llm-pg check`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, ConfigError, load_config
from .doctor import arithmetic, examine_config, show
from .metrics import Clock
from .run.preflight import check_inputs, check_room, task_rewards

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .rewards.audit.probes import ProbeFinding

PROBED_ROWS = 4


def verify(path: Path) -> int:
    """Print what each checkpoint under `path` is: a checkpoint, a folder of them, or a run. 1 where one is damaged."""
    from .run import checkpoint

    places = [path, path / "checkpoints"]
    found = [path] if path.name.startswith("step-") else [f for place in places for f in checkpoint.folders(place)]
    if not found:
        raise ConfigError(
            f"There is no checkpoint at {path}. Give a step-* folder, the folder of several, or a run's folder."
        )
    damaged = 0
    for folder in found:
        why = checkpoint.problem(folder)
        damaged += why is not None
        if why is None:
            manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
            size = sum(facts["size"] for facts in manifest["files"].values())
            print(f"{folder}: whole, {len(manifest['files'])} files, {size:,} bytes, every sha256 as written")
        else:
            print(f"{folder}: DAMAGED: {why}")
    return int(damaged > 0)


def check(config: Config, *, probe: bool = False, audited: int = 0) -> int:
    """Everything that can be found wrong before a run; 1 where something is.

    probe: also what the reward functions pay for nothing. audited: rows on which it is tried what they pay for right
    and for wrong answers.
    """
    rows = check_inputs(config, read_hub=True)
    check_room(config)
    findings = examine_config(config)
    print(f"{arithmetic(config)}\n{_rows_read(config, rows)}\n\n{show(findings)}")
    bad = any(finding.level == "problem" for finding in findings)
    if probe:
        bad = _probe(config) or bad
    if audited:
        bad = _audit(config, audited) or bad
    return int(bad)


def _rows_read(config: Config, rows: list[int]) -> str:
    """Of the data, in a line. rows: as `check_inputs` returns them."""
    wanted = config.data.num_eval_prompts
    if len(rows) > 1:
        held_out = f"{wanted:,} of {rows[1]:,}" if wanted < rows[1] else f"{rows[1]:,}"
        return f"Data: {rows[0]:,} rows to train on, {held_out} rows held out."
    return f"Data: {rows[0]:,} rows read, {wanted:,} of them held out." if wanted else f"Data: {rows[0]:,} rows read."


def _audit(config: Config, count: int) -> bool:
    """Whether a function pays for wrong answers to `count` of the config's rows; prints what was tried and found."""
    from .prompts.rows import draft_prompts
    from .prompts.sources import read_sources
    from .rewards.audit.tries import audit_rewards, spread
    from .rewards.scorer import Scorer
    from .rewards.tally import RewardError

    if config.rollout.environment is not None:
        print("\nAudit: not made, as an environment gives the rewards itself.")
        return False
    drafts = spread(draft_prompts(config.data, read_sources(config)[0]), count)
    settings = config.reward
    with Scorer(task_rewards(config), workers=settings.reward_workers, deadline=settings.reward_timeout) as scorer:
        try:
            audits = audit_rewards(scorer, [draft.content for draft in drafts], [draft.row for draft in drafts])
        except RewardError as error:
            print(f"\nAudit: {error}")
            return True
    print("\nAudit: right and wrong answers to rows of the data", *audits, sep="\n")
    return any(audit.paid for audit in audits)


def _probe(config: Config) -> bool:
    """Whether a function pays for completions without work in them, or executes them; prints which."""
    from .prompts.rows import draft_prompts
    from .prompts.sources import read_sources
    from .rewards.audit.probes import probe_rewards
    from .rewards.specs import resolve_all

    drafts = draft_prompts(config.data, read_sources(config)[0])[:PROBED_ROWS]
    functions = resolve_all(task_rewards(config))
    found = probe_rewards(
        task_rewards(config),
        [draft.content for draft in drafts],
        [draft.row for draft in drafts],
        deadline=config.reward.reward_timeout,
    )
    print(f"\nProbes: {len({f.probe for f in found})} completions without work, on {len(drafts)} rows")
    bad = [_report(function.name, [f for f in found if f.function == function.name]) for function in functions]
    return any(bad)


def _report(name: str, found: list[ProbeFinding]) -> bool:
    lowest = min((f.highest for f in found if f.highest is not None), default=None)
    paid = [f for f in found if lowest is not None and f.highest is not None and f.highest > lowest]
    failed = [f for f in found if f.problems]
    ran = [f for f in found if f.ran_code]
    print(f"{name}: " + ("every probe earns the same" if not paid else f"{len(paid)} probes earn more than the least"))
    for finding in sorted(paid, key=lambda f: -(f.highest or 0.0))[:8]:
        print(f"  pays {finding.highest:g} for {finding.probe} (the least paid is {lowest:g})")
    for finding in failed[:8]:
        print(f"  fails on {finding.probe}: {', '.join(f'{cause} ({n})' for cause, n in finding.problems.items())}")
    for finding in ran:
        print(f"  EXECUTES the completion: {finding.probe}")
    return bool(paid or failed or ran)


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
    from .model.bars import without_bars
    from .model.loading import context_length, default_device, load_model, load_tokenizer
    from .prompts import load_held_out
    from .run.build import make_collector, make_scorer
    from .run.evaluator import evaluate_held_out
    from .run.fitting import fit_to_prompts

    clock = clock or Clock()
    with clock("load"), without_bars():
        if folder is None:
            tokenizer = load_tokenizer(config.model)
            model = load_model(config.model, tokenizer, seed=config.run.seed)
        else:
            model, tokenizer = load_saved(config, folder)
        if not config.train.use_cpu:
            model.to(default_device())
        prompts = load_held_out(config, tokenizer, context_length=context_length(model))
    fit_to_prompts(model, tokenizer, prompts, config, terminal.warn)
    with make_scorer(config, None, [prompt.row for prompt in prompts]) as scorer:
        collector = make_collector(config, model, tokenizer, scorer)
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
    from .model.loading import load_model, load_tokenizer

    base = config.model.model_copy(update={"use_peft": False})
    facts = folder / "adapter_config.json"
    if not facts.exists():
        here = base.model_copy(update={"make": None, "model_name_or_path": str(folder)})
        tokenizer = load_tokenizer(here)
        return load_model(here, tokenizer, seed=config.run.seed), tokenizer
    from peft import PeftModel

    if base.make is None and base.model_name_or_path is None:
        base.model_name_or_path = json.loads(facts.read_text())["base_model_name_or_path"]
    if base.make is None and not base.model_name_or_path:
        raise ConfigError(
            f"{folder} does not say which model its adapter belongs to: that model was given as an object without a "
            "name. Merge it in Python: peft.PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    tokenizer = load_tokenizer(base)
    return PeftModel.from_pretrained(load_model(base, tokenizer, seed=config.run.seed), str(folder)), tokenizer


def merge(path: Path, target: Path | None) -> Path:
    """The adapter that a run saved, merged into its model and saved as one model; returns where it is.

    path: a run's folder, whose config says which model it was trained on, or an adapter's own folder.

    Raises ConfigError where the merged model does not compute what the adapter does; no file of it is then at `target`.
    """
    from .model.merging import save_merged

    adapter = path / "model" if (path / "model").exists() else path
    if not (adapter / "adapter_config.json").exists():
        raise ConfigError(
            f"There is no adapter at {adapter} (no adapter_config.json). Give the folder of a run with use_peft=true "
            "or a peft_config, or the folder of an adapter; a run without one has whole weights in model/ already."
        )
    config = load_config(path / "config.yaml") if (path / "config.yaml").exists() else Config()
    config.model = config.model.model_copy(update={"load_in_4bit": False})
    folder = target or path / "merged"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merging-") as place:
        model, tokenizer = load_saved(config, adapter)
        save_merged(model, tokenizer, Path(place), _prompts_of_run(path, tokenizer))
        for file in Path(place).iterdir():
            file.replace(folder / file.name)
    return folder


def _prompts_of_run(path: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts whose completions a run wrote down at its last step; none where it wrote none."""
    texts: dict[str, None] = {}
    for file in sorted((path / "completions").glob("step-*.jsonl"))[-1:]:
        texts.update(dict.fromkeys(json.loads(line)["prompt"] for line in file.read_text().splitlines()))
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
