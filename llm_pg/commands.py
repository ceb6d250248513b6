"""The commands that train nothing: `llm-pg checkpoint verify` and `llm-pg check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, ConfigError, load_config
from .doctor import arithmetic, examine_config, show
from .run.preflight import check_inputs, check_room, task_rewards

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .rewards.probes import Finding

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


def check(config: Config, *, probe: bool) -> int:
    """Everything that can be found wrong before a run; with `probe` also what the reward functions pay for nothing."""
    check_inputs(config)
    check_room(config)
    findings = examine_config(config)
    print(f"{arithmetic(config)}\n\n{show(findings)}")
    bad = any(finding.level == "problem" for finding in findings)
    if probe:
        bad = _probe(config) or bad
    return int(bad)


def _probe(config: Config) -> bool:
    """Whether a function pays for completions without work in them, or executes them; prints which."""
    from .prompts.rows import draft_prompts
    from .prompts.sources import read_sources
    from .rewards.probes import probe_rewards
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


def _report(name: str, found: list[Finding]) -> bool:
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


def evaluate_model(config: Config, terminal: Any) -> Evaluation:
    """Pass rates of a model as it stands on held-out prompts: all rows of a file, or those of a task or hub split."""
    from .prompts import load_held_out
    from .run.models import load_model, load_tokenizer
    from .run.parts import evaluate_held_out, make_collector, make_scorer

    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, tokenizer, seed=config.run.seed)
    if not config.train.use_cpu:
        model.to(default_device())
    context = getattr(model.config, "max_position_embeddings", None)
    prompts = load_held_out(config, tokenizer, context_length=context)
    with make_scorer(config, None, sorted(prompts[0].row)) as scorer:
        collector = make_collector(config, model, tokenizer, scorer)
        with collector:
            result = evaluate_held_out(collector, prompts, config.eval)
    terminal.evaluation(str(config.model.model_name_or_path), result)
    return result


def merge(path: Path, target: Path | None) -> Path:
    """The adapter that a run saved, merged into its model and saved as one model; where it stands.

    path: a run's folder, whose config says which model it was trained on, or an adapter's own folder.
    """
    from .run.models import load_model, load_tokenizer
    from .training.adapters import save_merged

    adapter = path / "model" if (path / "model").exists() else path
    facts = adapter / "adapter_config.json"
    if not facts.exists():
        raise ConfigError(
            f"There is no adapter at {adapter} (no adapter_config.json). Give the folder of a run with use_peft=true "
            "or a peft_config, or the folder of an adapter; a run without one has whole weights in model/ already."
        )
    from peft import PeftModel

    config = load_config(path / "config.yaml").model if (path / "config.yaml").exists() else Config().model
    config = config.model_copy(update={"use_peft": False, "load_in_4bit": False})
    if config.make is None and config.model_name_or_path is None:
        config.model_name_or_path = json.loads(facts.read_text())["base_model_name_or_path"]
    if config.make is None and not config.model_name_or_path:
        raise ConfigError(
            f"{adapter} does not say which model its adapter belongs to: that model was given as an object without a "
            "name. Merge it in Python: peft.PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    seed = load_config(path / "config.yaml").run.seed if (path / "config.yaml").exists() else 0
    tokenizer = load_tokenizer(config)
    model = PeftModel.from_pretrained(load_model(config, tokenizer, seed=seed), str(adapter))
    folder = target or path / "merged"
    save_merged(model, tokenizer, folder)
    return folder


def default_device() -> str:
    """The accelerator where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
