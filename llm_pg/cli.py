"""The command `llm-pg`. Heavy imports happen inside the commands, after everything that needs none was checked."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, shipped
from .commands.train import heavy_imports, run_training
from .config import Config, ConfigError, load_config
from .config.arguments import as_settings, common_help, help_text
from .run.guard import RunStopped
from .run.logs.redact import Redactor

Commands = Any  # argparse's type of add_subparsers() is private
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 1


# Read by the libraries when they are imported: their bars and notes off. Threads that wait for each other asleep, since
# spinning ones make a step many times as long where cores are shared.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input prints one paragraph and returns 2."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        arguments = parse(argv)
        if getattr(arguments, "verbose", False):
            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            logging.getLogger("llm_pg").setLevel(logging.DEBUG)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except (ConfigError, RunStopped) as error:
        print(Redactor().text(f"llm-pg: {error}"), file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_STOPPED
    except KeyboardInterrupt:
        print("llm-pg: interrupted.", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes no settings after an option; here they may be anywhere, also as options (`--seed 1`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    command = commands.choices.get(words[0]) if words else None
    settings: list[str] = []
    if command is not None and command.get_default("takes_settings"):
        options = {option for action in command._actions for option in action.option_strings}
        words[1:] = as_settings(words[1:], options)
        settings = [word for word in words[1:] if _is_setting(word)]
        words = [word for word in words if word not in settings]
    arguments, rest = parser.parse_known_args(_with_signs(words))
    if rest:
        raise ConfigError(
            f"Cannot read {' '.join(rest)!r}: `llm-pg {words[0]}` knows no such word. A setting is written key=value "
            f"or --key value; `llm-pg {words[0]} --help` lists the rest."
        )
    arguments.settings = settings
    return arguments


def _is_setting(word: str) -> bool:
    """key=value, and no path that has an equals sign in it."""
    key, equals, _ = word.partition("=")
    return bool(equals) and not word.startswith("-") and os.sep not in key and not os.path.exists(word)


def _with_signs(words: Sequence[str]) -> list[str]:
    """`--reward-range -200:0` as one word: argparse takes a value that begins with a minus for an option."""
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--reward-range":
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _parser() -> tuple[argparse.ArgumentParser, Commands]:
    """The parser, and those of the commands."""
    parser = argparse.ArgumentParser(
        prog="llm-pg", description="Policy-gradient fine-tuning of small language models on verifiable rewards."
    )
    parser.add_argument("--version", action="version", version=f"llm-pg {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    _run_commands(commands)
    _model_commands(commands)
    _room_commands(commands)
    return parser, commands


class _HelpAll(argparse.Action):
    """Prints every setting and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("Every setting, key=value or --key value (a name is unique, its section may be left out):\n")
        print(help_text())
        parser.exit()


def _run_commands(commands: Commands) -> None:
    """Commands that begin or prepare a run."""
    quick = commands.add_parser(
        "quickstart", help="a small model learns a task by reinforcement, here, in a minute or two"
    )
    quick.add_argument(
        "--algorithm", default="grpo", help="a row of the table, such as reinforce, rloo, grpo (default), ppo"
    )
    quick.add_argument("--task", default="sort_letters", help="sort_letters (default) or countdown")
    quick.add_argument("--seed", type=int, default=0)
    _common(quick)
    _steps_as_json(quick)
    quick.set_defaults(run=_quickstart)

    train = commands.add_parser(
        "train",
        help="train as a YAML file or the command line says",
        usage="llm-pg train [CONFIG] [--model M] [--data D] [--reward R] [key=value | --key value ...]",
        description="Settings are written key=value or --key value. The common ones, with their defaults (all, and the "
        "whole of\nwhat they mean: llm-pg train --help-all):\n\n" + common_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--help-all", action=_HelpAll, nargs=0, help="every setting with its choices, and end")
    _config_arguments(train)
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint of the run's folder"
    )
    train.add_argument("--checkpoint", metavar="PATH", help="with --resume: from this checkpoint and no other")
    train.add_argument(
        "--override", action="store_true", help="with --resume: go on although the checkpoint has other settings"
    )
    train.add_argument("--profile", action="store_true", help="trace two steps to profile/ in the run's folder")
    _common(train)
    train.epilog = None
    _steps_as_json(train)
    train.set_defaults(run=_train)

    check = commands.add_parser("check", help="find what is wrong with a config before a run")
    _config_arguments(check)
    check.add_argument(
        "--probe-rewards", action="store_true", help="what do the reward functions pay for completions without work?"
    )
    check.add_argument(
        "--audit-rewards",
        action="store_true",
        help="do the reward functions pay right answers to the data's own rows, and no wrong ones?",
    )
    check.add_argument("--audit-rows", type=int, default=256, metavar="N", help="rows of that, spread over the data")
    _common(check)
    check.set_defaults(run=_check)

    copy = commands.add_parser("cp", help="copy a shipped config or recipe to edit")
    copy.add_argument("name")
    copy.add_argument("target", nargs="?", default=".")
    copy.set_defaults(run=_copy)


def _model_commands(commands: Commands) -> None:
    """Commands about what a run left behind."""
    saved = commands.add_parser("checkpoint", help="verify checkpoints by size and sha256")
    saved.add_argument("action", choices=["verify"])
    saved.add_argument("path", help="a checkpoint, a folder of them, or a run's folder")
    saved.set_defaults(run=_checkpoint)

    evaluate = commands.add_parser("eval", help="pass rates of a model on a task or data")
    evaluate.add_argument(
        "model", help="a run's folder (its own settings and held-out prompts), a model's, or a hub id"
    )
    evaluate.add_argument("--task", help="a synthetic task")
    evaluate.add_argument("--data", help="a file of rows (JSONL, JSON, Parquet, CSV), or a hub dataset: all its rows")
    evaluate.add_argument("--num-prompts", type=int, help="prompts to answer, sampled evenly; all rows, 256 of a task")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    _common(evaluate)
    evaluate.set_defaults(run=_eval)

    merge = commands.add_parser("merge", help="the adapter of a run merged into its model, as one folder")
    merge.add_argument("path", metavar="RUN", help="a run's folder, or an adapter's")
    merge.add_argument("--to", metavar="FOLDER", help="where to; default merged/ in RUN")
    merge.set_defaults(run=_merge)

    from .watch import cli as watch

    watch.add_arguments(commands.add_parser("watch", help="the page of a run, served and kept up to date"))
    report = commands.add_parser("report", help="one offline page about runs, and what the doctor finds in them")
    _report_arguments(report)


def _room_commands(commands: Commands) -> None:
    """Commands about the estimators, without a run."""
    from . import plan
    from .control import cli as control_cli

    prove = commands.add_parser("prove", help="compare every estimator's expected update with the exact gradient")
    prove.add_argument("--quick", action="store_true", help="a smaller table, in under 10 seconds")
    prove.add_argument("--json", action="store_true", help="the rows as JSON")
    prove.add_argument("--markdown", action="store_true", help="the table of docs/estimators.md")
    prove.add_argument("--advantage", metavar="my.py:fn", help="prove your own advantage function")
    prove.add_argument("--loss", metavar="my.py:fn", help="prove your own loss function")
    prove.set_defaults(run=_prove)

    control = commands.add_parser("control", help="classic control with the same estimators")
    control_cli.add_arguments(control)
    control.set_defaults(run=control_cli.main)

    advise = commands.add_parser("advise", help="settings that suit a task, each with its reason, as a YAML")
    _advise_arguments(advise)

    plan.add_arguments(commands.add_parser("plan", help="predicted time, memory and bottleneck of a step on N devices"))


def _common(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_settings=True)
    parser.epilog = "Settings can follow, each as key=value or --key value; `llm-pg train --help-all` lists them."
    parser.add_argument("--quiet", action="store_true", help="print only warnings, findings and the end's table")
    parser.add_argument(
        "--verbose",
        "-v",
        action="store_true",
        help="also write the log of the package (logger llm_pg) to standard error",
    )


def _steps_as_json(parser: argparse.ArgumentParser) -> None:
    text = "one JSON line a step on standard output, everything else on standard error"
    parser.add_argument("--json", action="store_true", help=text)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    """A YAML file, or the three things that a run cannot do without."""
    parser.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--model", help="hub id or local folder (model_name_or_path)")
    parser.add_argument("--data", help="a file of rows (data_files), or a hub dataset (dataset_name)")
    parser.add_argument("--reward", nargs="+", help="reward functions (reward_funcs)")


def _quickstart(arguments: argparse.Namespace) -> int:
    own = {"data.task": arguments.task, "run.seed": arguments.seed, "run.overwrite": "true"}
    own["algorithm.name"] = arguments.algorithm
    given = {word.partition("=")[0] for word in arguments.settings}  # a setting replaces the option's default
    if "algorithm" in given:
        given.add("algorithm.name")
    overrides = [f"{key}={value}" for key, value in own.items() if not given & {key, key.partition(".")[2]}]
    specific = f"quickstart_{arguments.task}.yaml"
    path = shipped.folder("configs") / specific
    if not path.exists():
        path = shipped.find("quickstart.yaml")
    config = load_config(path, [*overrides, *arguments.settings])
    return run_training(config, resume=False, quiet=arguments.quiet, as_json=arguments.json)


def _train(arguments: argparse.Namespace) -> int:
    if (arguments.checkpoint or arguments.override) and not arguments.resume:
        raise ConfigError("--checkpoint and --override say how to go on: give --resume beside them.")
    resume = arguments.checkpoint or arguments.resume
    if arguments.profile:
        arguments.settings = ["run.profile_steps=2", *arguments.settings]
    config, override = _config_of(arguments), arguments.override
    return run_training(config, resume=resume, override=override, quiet=arguments.quiet, as_json=arguments.json)


def _config_of(arguments: argparse.Namespace) -> Config:
    given = []
    if arguments.model:
        given += [f"model_name_or_path={arguments.model}", "model.make=null"]
    if arguments.data:
        given += data_settings(arguments.data)
    if arguments.reward:
        given.append(f"reward_funcs={json.dumps(arguments.reward)}")
    name = arguments.config
    if name is None:
        if not arguments.settings and not given:
            raise ConfigError(
                "Nothing says what to train: name a YAML file (`llm-pg cp gsm8k_qwen2.5-0.5b_grpo.yaml .` copies one "
                "to edit), or give --model, --data and --reward."
            )
        return load_config(None, [*given, *arguments.settings])
    path = name if os.path.exists(name) or os.sep in name else shipped.find(name)
    return load_config(path, [*given, *arguments.settings])


def data_settings(source: str, split: str = "") -> list[str]:
    """Settings that make a file, a pattern of files or a hub dataset the one source of prompts.

    split: "eval_" where it is what is held out.
    """
    from .prompts.files import READABLE

    if Path(source).suffix in READABLE or Path(source).is_file() or "*" in source:
        if split:
            return [f"data.eval_data_files={source}"]
        return [f"data.data_files={source}", "data.dataset_name=null", "data.task=null"]
    return [f"data.dataset_name={source}", "data.data_files=null", "data.task=null"]


def _check(arguments: argparse.Namespace) -> int:
    from .commands.check import check

    audited = max(arguments.audit_rows, 1) if arguments.audit_rewards else 0
    return check(_config_of(arguments), probe=arguments.probe_rewards, audited=audited)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from .commands.saved import verify

    return verify(Path(arguments.path))


def _merge(arguments: argparse.Namespace) -> int:
    from .commands.saved import merge

    print(merge(Path(arguments.path), Path(arguments.to) if arguments.to else None))
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from .commands.evaluate import evaluate_model, evaluation_config
    from .config.load import check_model

    source = data_settings(arguments.data, "eval_") if arguments.data else []
    config, folder = evaluation_config(
        arguments.model, source, arguments.settings, task=arguments.task, num_prompts=arguments.num_prompts
    )
    if folder is None:
        check_model(config.model)
    from .metrics import Clock
    from .terminal import make_terminal

    terminal = make_terminal(quiet=arguments.json or arguments.quiet)
    clock = Clock(terminal.phase)
    with clock("import"):
        heavy_imports()
    result = evaluate_model(config, terminal, folder, clock)
    if arguments.json:
        print(json.dumps(result.metrics()))
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    from .prove import main as prove

    given = vars(arguments)
    return prove(as_json=given["json"], **{name: given[name] for name in ("quick", "markdown", "advantage", "loss")})


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of runs, finished or still going on")
    parser.add_argument("--out", help="where to write the page; by default report.html in the first run")
    parser.add_argument("--json", action="store_true", help="the doctor's findings as JSON on standard output")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from .report.cli import main as report

    return report(arguments.runs, arguments.out, arguments.json)


def _advise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--actions", default="tokens", help="tokens (default), discrete or continuous")
    parser.add_argument("--horizon", type=int, help="steps or tokens of an episode at most; left out = no limit")
    parser.add_argument("--reward-range", metavar="LOW:HIGH", help="of an episode's return, for example -200:0")
    parser.add_argument("--num-actions", type=int, default=2, help="actions of a list, or coordinates of a vector")
    parser.add_argument("--num-inputs", type=int, help="features of an observation, to count a policy's parameters")
    parser.add_argument("--algorithm", help="one that you have in mind: refused where it cannot work")
    parser.add_argument("--baseline", help="the same of a baseline")
    parser.add_argument("--head", help="the same of a policy head")
    parser.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> int:
    from .advise import main as advise

    return advise(vars(arguments))


def _copy(arguments: argparse.Namespace) -> int:
    print(shipped.copy(arguments.name, arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
