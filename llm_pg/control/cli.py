"""`llm-pg control ENV`: arguments without a heavy import, then the run. Bad input gets one paragraph and code 2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EPILOG = """examples:
  llm-pg control cartpole --algorithm ppo
  llm-pg control gridworld --algorithm reinforce --baseline running_mean --seeds 5
  llm-pg control pendulum --algorithm ppo --head tanh_gaussian
  llm-pg control cartpole --advise"""

# Flag, type, help. The name is that of the field in `ControlSettings` or `AlgorithmSpec`.
NUMBERS: tuple[tuple[str, Any, str], ...] = (
    ("total_steps", int, "environment steps of the run, all rows together"),
    ("total_episodes", int, "end after so many episodes, if that comes first"),
    ("num_envs", int, "rows that move together; with --num-steps 0 the episodes of an update"),
    ("num_steps", int, "steps of a row before an update; 0 = whole episodes"),
    ("group_size", int, "rows that start from the same state (rloo, grpo and relatives)"),
    ("num_workers", int, "asynchronous processes (a3c)"),
    ("num_epochs", int, "passes over a batch"),
    ("num_minibatches", int, "parts of a batch, an optimiser step each"),
    ("learning_rate", float, "step size at the start"),
    ("learning_rate_final", float, "step size at the end, linear in between; left out = constant"),
    ("max_grad_norm", float, "clip the gradient's norm; 0 = off"),
    ("gamma", float, "discount, in (0, 1]"),
    ("lam", float, "lambda of GAE: 0 = TD error, 1 = Monte Carlo"),
    ("epsilon", float, "PPO's clip"),
    ("kl_target", float, "KL of an update that an adaptive penalty keeps to, nats; 0 = no penalty"),
    ("vf_coef", float, "weight of the value loss"),
    ("entropy_coef", float, "weight of the entropy bonus (the lectures' beta)"),
    ("entropy_coef_final", float, "its weight at the end, linear in between"),
    ("baseline_decay", float, "memory of the running mean, in [0, 1)"),
    ("reward_scale", float, "rewards are multiplied by it for training"),
    ("log_std", float, "logarithm of the first sigma of a Gaussian head"),
    ("threshold", float, "mean return over --window episodes that counts as solved"),
    ("window", int, "episodes of the mean return"),
    ("seed", int, "of the first run"),
)
WORDS: tuple[tuple[str, str], ...] = (
    ("baseline", "what is subtracted from a return"),
    ("returns", "credit of a step: the rewards from it on, or all of them"),
    ("normalize_advantages", "weights shifted and scaled to mean 0, deviation 1"),
    ("scale_rewards", "deviation of the returns to divide by"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; what is not given is left to the defaults of the algorithm and the environment."""
    from ..algorithms import spec as specs

    parser.description = "Classic control with the estimators that train language models: the answer is known here."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("env", metavar="ENV", help="cartpole, gridworld, bandit, pendulum... or a gymnasium name")
    parser.add_argument("--algorithm", metavar="NAME", help="row of the table; left out = what --advise says")
    parser.add_argument("--policy", help="mlp, linear, or module:Class or file.py:Class of your own")
    parser.add_argument("--head", help="auto, softmax, sigmoid, gaussian, tanh_gaussian")
    parser.add_argument("--hidden", metavar="N,N", help="widths of the hidden layers, e.g. 64,64")
    parser.add_argument("--optimizer", choices=("adam", "rmsprop", "sgd"))
    for name, help_ in WORDS:
        parser.add_argument(_flag(name), metavar="WORD", help=f"{help_}: {', '.join(specs.WORDS[name])}")
    parser.add_argument(
        "--baseline-per-step", action="store_true", default=None, help="compare a group's rewards-to-go step by step"
    )
    for name, kind, help_ in NUMBERS:
        parser.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=help_)
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs side by side; the page shows median and quartiles"
    )
    parser.add_argument("--until-solved", action="store_true", help="end when the environment is solved")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the run is written (default runs/control-ENV-ALGORITHM; with --seeds, -seedN is added)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    parser.add_argument("--force", action="store_true", help="go on where the adviser refuses what is only unwise")
    parser.add_argument("--advise", action="store_true", help="say what suits the environment, and end")
    parser.add_argument("--plain", action="store_true", help="ASCII only, nothing before the end")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0 = done, 1 = the run failed, 2 = bad input."""
    try:
        return _run(args)
    except ValueError as error:
        print(f"llm-pg control: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, RuntimeError) as error:
        print(f"llm-pg control: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nllm-pg control: stopped; metrics.jsonl holds what was reached.", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; it is {args.seeds}.")
    try:
        import gymnasium  # noqa: F401
    except ImportError as error:
        raise ValueError('The control track needs gymnasium: pip install "llm-policy-gradient[control]"') from error
    from .environments import full_name, inspect

    env_id = full_name(args.env)
    if args.advise:
        return _advise(env_id)
    algorithm = args.algorithm
    if algorithm is None:
        from .adviser import advise

        algorithm = next(advice.value for advice in advise(inspect(env_id)) if advice.setting == "algorithm")
    return _train(args, env_id, algorithm)


def _settings(args: argparse.Namespace, env_id: str, algorithm: str) -> Any:
    from ..algorithms import spec as specs
    from ..words import choices
    from .settings import resolve

    names = [name for name, *_ in (*NUMBERS, *WORDS)]
    changes = {name: getattr(args, name) for name in (*names, "policy", "head", "optimizer", "baseline_per_step")}
    for name, _ in WORDS:
        if changes[name] is not None and changes[name] not in specs.WORDS[name]:
            raise ValueError(f"{_flag(name)} cannot be {changes[name]!r}; {choices(changes[name], specs.WORDS[name])}")
    if args.hidden is not None:
        widths = args.hidden.split(",")
        if not all(width.isdigit() and int(width) > 0 for width in widths):
            raise ValueError(
                f"--hidden takes widths above 0 with commas between them, e.g. 64,64; got {args.hidden!r}."
            )
        changes["hidden"] = tuple(int(width) for width in widths)
    return resolve(env_id, algorithm, force=args.force, stop_when_solved=args.until_solved, **changes)


def _train(args: argparse.Namespace, env_id: str, algorithm: str) -> int:
    from rich.console import Console

    from ..report import leave_report
    from ..terminal import Terminal, make_terminal
    from ..terminal.figures import ASCII_LEVELS, LEVELS
    from ..terminal.plain import Plan
    from .adviser import check
    from .environments import inspect
    from .runs import seed_folders, train_seeds
    from .summary import lines

    settings = _settings(args, env_id, algorithm)
    check(settings, inspect(env_id, settings.env_options))
    short = args.env.rsplit("/", 1)[-1].lower()
    folder = args.folder or Path("runs") / f"control-{short}-{algorithm}"
    terminal = Terminal(quiet=True) if args.plain else make_terminal()
    last = settings.total_episodes or settings.total_steps
    unit = "episodes" if settings.total_episodes else "steps"
    plan = Plan(folder.name, algorithm, last, 0, 0, logging_steps=max(last // 20, 1), unit=unit)

    def show(number: int, point: dict[str, Any]) -> None:
        if number == 0:  # the screen shows the first seed; the end and the page show all of them
            terminal.step(point, point["seconds"])

    terminal.begin(plan)
    with terminal.running():
        runs = train_seeds(settings, args.seeds, folder=folder, overwrite=args.overwrite, on_point=show)
    console = Console(highlight=False, soft_wrap=True)
    unicode = not args.plain and "utf" in (console.encoding or "").lower()
    for run in runs:
        for finding in run.findings:
            terminal.finding(finding)
    first, *others = seed_folders(folder, args.seeds, settings.seed)
    places = [*leave_report(first, terminal.warn, others), f"Folders: {', '.join(map(str, [first, *others]))}"]
    for line in ["", *lines(runs, LEVELS if unicode else ASCII_LEVELS), "", *places]:
        console.print(line if unicode else line.replace("≥", ">="), markup=False)
    return 0


def _advise(env_id: str) -> int:
    from .adviser import advise
    from .environments import inspect

    interface = inspect(env_id)
    limit = "without a time limit" if interface.horizon is None else f"of at most {interface.horizon} steps"
    print(f"{env_id}: episodes {limit}, {interface.num_inputs} inputs")
    for advice in advise(interface):
        print(f"  {advice.setting:<22} {advice.value:<28} {advice.why}")
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="llm-pg control")
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
