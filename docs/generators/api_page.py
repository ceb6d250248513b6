"""Prints `docs/api.md`, or writes it to a file that is named, from the signatures and docstrings of what is public.

The source is parsed and nothing of it imported, so that torch is not loaded.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from publish import publish

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING: tuple[str, ...] = ()  # all functions and classes of the module whose name has no underscore
# Heading -> import path -> names. A class is shown with its public methods that have a docstring.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "Training": {
        "llm_pg.trainer": (
            "PolicyGradientTrainer",
            "ReinforceTrainer",
            "RLOOTrainer",
            "GRPOTrainer",
            "ActorCriticTrainer",
        ),
        "llm_pg.config.flat": ("ReinforceConfig", "RLOOConfig", "GRPOConfig", "ActorCriticConfig"),
        "llm_pg.config.load": ("load_config", "ConfigError"),
    },
    "A loop of your own": {
        "llm_pg.model.policy": ("Policy",),
        "llm_pg.prompts.stream": ("Prompts",),
        "llm_pg.rollout.sampler": ("Sampler", "Samples"),
        "llm_pg.rewards.scorer": ("Scorer",),
        "llm_pg.rollout.experience": ("Experience",),
        "llm_pg.algorithms.algorithm": ("Algorithm",),
        "llm_pg.learner.learner": ("Learner", "Update"),
        "llm_pg.sampling.protocol": ("SamplingEngine", "Completions"),
    },
    "Rewards": {
        "llm_pg.rewards.tally": ("Scores", "RewardError"),
        "llm_pg.rewards.audit.probes": ("probe_rewards", "probe_texts", "ProbeFinding"),
        "llm_pg.rewards.audit.tries": ("audit_rewards",),
        "llm_pg.rewards.audit.tables": ("Audit", "Mistake"),
        "reward_fns.judge": ("judge", "JudgeError", "JudgeDownError", "NoScoreError"),
        "reward_fns.registry": ("rewards", "tasks", "RewardInfo", "Gold"),
    },
    "Algorithms": {
        "llm_pg.algorithms.own": ("register_algorithm",),
        "llm_pg.algorithms.table": ("AlgorithmSpec",),
        "llm_pg.algorithms.batch": ("Batch",),
        "llm_pg.rollouts": ("Rollouts",),
    },
    "Estimators": {
        f"llm_pg.estimators.{name}": EVERYTHING
        for name in ("returns", "baselines", "losses", "ratios", "kl", "distributions", "masked", "objectives", "noise")
    },
    "Exact gradients": {
        "llm_pg.estimators.exact": EVERYTHING,
        "llm_pg.estimators.expectation": EVERYTHING,
    },
    "Runs": {
        "llm_pg.metrics": ("read_metrics",),
        "llm_pg.doctor.live": ("examine_run",),
        "llm_pg.doctor.static": ("examine_config",),
        "llm_pg.doctor.finding": ("Finding",),
    },
}
HEAD = """# API reference

Made from docstrings by `python docs/generators/api_page.py docs/api.md`. Settings are not repeated here:
`llm-pg train --help` lists them all. Trainers, their configs, `register_algorithm`, and the pieces of a loop (Policy,
Prompts, Sampler, Scorer, Algorithm, Learner) can be imported from `llm_pg` itself, all else from the module named.

Letters that name axes: B rollouts, T completion tokens (or control steps), P prompts, G samples per prompt,
V vocabulary.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
ENTRY = re.compile(r"^    (\S[^:]*): (.*)$")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def markdown() -> str:
    """The page."""
    out = [HEAD]
    for heading, modules in ROOMS.items():
        out.append(f"## {heading}\n")
        for module, names in modules.items():
            out.extend(_entry(module, node) for node in _definitions(module, names))
    return "\n".join(out)


def _definitions(module: str, names: Sequence[str]) -> list[Definition]:
    path = ROOT / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, (*Function, ast.ClassDef))}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"api_guide.ROOMS names {', '.join(missing)} of {module}, which {path} does not define.")
    return [found[name] for name in names or found if not name.startswith("_")]


def _entry(module: str, node: Definition) -> str:
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    lines = [f"### {node.name}\n", f"```text\n{kind}{module}.{signature(node)}\n```\n", described(node)]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                lines.append(f"```text\n.{signature(method)}\n```\n\n{described(method)}")
    return "\n".join(lines)


def signature(node: Definition) -> str:
    """Name and arguments; of a class those of its `__init__`, or its fields with their defaults."""
    if not isinstance(node, ast.ClassDef):
        first = node.args.args[:1]
        if first and first[0].arg in ("self", "cls"):
            node.args.args = node.args.args[1:]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
        wrapped = _wrap(list(_parameters(node.args)), node.name)
        is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
        return f"{node.name}{returns}" if is_property else f"{wrapped}{returns}"
    init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
    if init is not None:
        init.name, init.returns = node.name, None
        return signature(init)
    fields = [m for m in node.body if isinstance(m, ast.AnnAssign) and not ast.unparse(m.target).startswith("_")]
    if any("ClassVar" in ast.unparse(m.annotation) for m in fields):
        fields = []
    return _wrap([ast.unparse(m) for m in fields], node.name) if fields else node.name


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    """Each parameter with annotation and default, and the bare star."""
    padded: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    for given, default in zip(arguments.args, [*padded, *arguments.defaults], strict=True):
        yield _parameter(given, default)
    if arguments.vararg is not None:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for given, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(given, default)
    if arguments.kwarg is not None:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(given: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(given.annotation)}" if given.annotation is not None else ""
    return f"{given.arg}{kind}" + (f" = {ast.unparse(default)}" if default is not None else "")


def _wrap(parts: Sequence[str], name: str) -> str:
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= 90 else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def described(node: Definition) -> str:
    """The docstring as Markdown: its sections of names as lists, the rest as it stands."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    out: list[str] = []
    in_section = False
    for line in text.splitlines():
        if found := SECTION.match(line):
            out += [f"**{found[1]}**", ""]
            in_section = True
        elif in_section and (found := ENTRY.match(line)):
            out.append(f"* `{found[1]}`: {found[2]}")
        elif in_section and line.startswith("    "):
            out.append(f"  {line.strip()}" if out[-1].startswith(("*", " ")) else line.strip())
        else:
            in_section = in_section and not line
            out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    publish(markdown())
