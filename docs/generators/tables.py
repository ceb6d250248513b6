"""Writes the tables that are computed into README and docs, between their `<!-- NAME:begin -->` and `end` comments:

    python docs/generators/tables.py

tests/prove/test_prove_table.py fails where one is out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_pg import plan, prove

ROOT = Path(__file__).resolve().parents[2]
CARDS = {"rtx4090": "RTX 4090", "rtx3090": "RTX 3090", "l4": "L4"}
WAYS = {"full weights": (1.0, 4), "LoRA": (0.02, 2)}  # share of the parameters that is trained, bytes of a weight


def verdicts() -> str:
    """The algorithms as shipped: what their expected update is."""
    lines = ["| algorithm | baseline | cosine with the gradient | verdict |", "|---|---|--:|---|"]
    for line in prove.table(quick=True):
        if line.section.startswith("As shipped"):
            detail = f", {line.detail}" if line.detail else ""
            name = f"`{line.algorithm}`{detail}"
            lines.append(f"| {name} | {line.baseline} | {line.cosine:.4f} | {line.verdict} |")
    return "\n".join(lines)


def plans() -> str:
    """A step of docs/qwen.md by model, card and what is trained."""
    lines = [f"| model | trained | memory | {' | '.join(CARDS.values())} |", "|---|---|--:|" + "--:|" * len(CARDS)]
    for size in ("0.5b", "1.5b", "3b", "7b"):
        for way, (trained, width) in WAYS.items():
            job = plan.PlannedJob(
                prompts=32, prompt_length=200, completion_length=300, rows=4, reference=True, trained=trained,
                weight_bytes=width,
            )  # fmt: skip
            model = plan.MODELS[size]
            most = plan.memory(model, job, 1, "ddp")["most"]
            seconds = []
            for card in CARDS:
                machine = plan.MACHINES[card]
                step = sum(phase.seconds for phase in plan.phases(model, machine, job, 1, "ddp"))
                seconds.append(f"{step:.0f} s" if most <= machine.memory else "does not fit")
            lines.append(f"| Qwen2.5-{size.upper()} | {way} | {most / 1e9:.1f} GB | {' | '.join(seconds)} |")
    return "\n".join(lines)


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "verdicts"): verdicts,
    ("docs/qwen.md", "plan"): plans,
    ("docs/estimators.md", "prove"): prove.markdown_table,
}


def written(page: str, name: str) -> str:
    """What the page has between the comments. Raises ValueError where it has them not once."""
    text = (ROOT / page).read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} needs one {begin} and one {end}.")
    return text.split(begin)[1].split(end)[0].strip()


def write(page: str, name: str, table: str) -> None:
    """Puts the table between the comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    head, rest = text.split(f"<!-- {name}:begin -->")
    _, tail = rest.split(f"<!-- {name}:end -->")
    new = f"{head}<!-- {name}:begin -->\n{table.strip()}\n<!-- {name}:end -->{tail}"
    (ROOT / page).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    for (page, name), table in BLOCKS.items():
        write(page, name, table())
        print(page, name)
