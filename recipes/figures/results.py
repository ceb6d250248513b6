"""The two charts of the README, drawn from the tables of recipes/benchmarks/RESULTS.md, which name their commands.

    python recipes/figures/results.py        # writes docs/images/learning.svg and docs/images/speed.svg

tests/docs/test_pictures.py fails where a picture is not what this script draws.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from drawing import INK, MUTED, OTHER, OURS, Drawing

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def table(first_cells: str) -> list[list[str]]:
    """The rows, as cells, of the table of RESULTS.md whose header begins with these cells. Raises ValueError where
    there is none or more than one."""
    lines = (ROOT / "recipes" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(first_cells)]
    if len(starts) != 1:
        raise ValueError(f"RESULTS.md has {len(starts)} tables that begin with {first_cells!r}, not one.")
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def numbers(cell: str) -> list[float]:
    """All numbers of a cell, commas of thousands removed."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(cell)]


def learning() -> str:
    """Held-out pass rates before and after training, and the time to 90 % beside TRL's."""
    drawing = Drawing(880, 420, "Held-out pass rates before and after training; seconds to 90 percent, llm_pg and TRL")
    _before_and_after(drawing, left=150, right=450)
    _seconds(drawing, left=610, right=850)
    return drawing.svg()


def _before_and_after(drawing: Drawing, left: float, right: float) -> None:
    def at(percent: float) -> float:
        return left + (right - left) * percent / 100

    drawing.text(18, 28, "Held-out pass rate (greedy), before and after", size=14, bold=True)
    drawing.text(18, 46, "one line a seed; after: 95 % interval", colour=MUTED)
    for percent in (0, 25, 50, 75, 100):
        drawing.line(at(percent), 60, at(percent), 384)
        drawing.text(at(percent), 402, f"{percent} %", size=11, colour=MUTED, anchor="middle")
    runs = [(row[0], numbers(row[2])[0], numbers(row[3])) for row in table("| algorithm | seed | greedy before |")]
    groups = [(("sorting letters", name.upper()), [run[1:] for run in runs if run[0] == name])
              for name in ("grpo", "rloo", "reinforce")]  # fmt: skip
    chat = table("| seed | greedy before | after 50 steps |")
    groups.append((("SmolLM2-135M,", "sums, GRPO"), [(numbers(row[1])[0], numbers(row[3])) for row in chat]))
    y = 72.0
    for label, rows in groups:
        for i, words in enumerate(label):
            drawing.text(18, y + (len(rows) - 1) * 7.5 - 3 + 15 * i, words, colour=INK if i == 0 else MUTED)
        for before, after in rows:
            drawing.line(at(before), y, at(after[0]), y, "#b6c2cc", 1.4)
            drawing.dot(at(before), y, MUTED, hollow=True)
            drawing.interval(at(after[1]), at(after[2]), y, OURS)
            drawing.dot(at(after[0]), y, OURS)
            y += 15
        y += 15


def _seconds(drawing: Drawing, left: float, right: float) -> None:
    low, high = math.log(3), math.log(130)

    def at(seconds: float) -> float:
        return left + (right - left) * (math.log(seconds) - low) / (high - low)

    drawing.text(490, 28, "Seconds until 90 % of held-out words are right", size=14, bold=True)
    drawing.text(490, 46, "median and range of 5 seeds, log scale", colour=MUTED)
    drawing.dot(726, 42, OURS)
    drawing.text(735, 46, "llm_pg", colour=OURS, bold=True)
    drawing.dot(788, 42, OTHER)
    drawing.text(797, 46, "TRL 1.16", colour=OTHER, bold=True)
    for seconds in (3, 10, 30, 100):
        drawing.line(at(seconds), 60, at(seconds), 384)
        drawing.text(at(seconds), 402, f"{seconds} s", size=11, colour=MUTED, anchor="middle")
    y = 80.0
    for row in table("| row | reached, ours |"):
        ours, theirs = numbers(row[5]), numbers(row[6])
        if not theirs:
            continue
        drawing.text(left - 14, y + 11, row[0], anchor="end")
        for values, colour, down in ((ours, OURS, 0), (theirs, OTHER, 14)):
            drawing.interval(at(values[1]), at(values[2]), y + down, colour)
            drawing.dot(at(values[0]), y + down, colour)
        y += 44


def speed() -> str:
    """A training step and its memory, beside TRL's."""
    drawing = Drawing(880, 232, "Seconds of a training step and peak memory, llm_pg and TRL")
    steps = [(row[0], numbers(row[1])[2], numbers(row[2])[2], numbers(row[4]))
             for row in table("| work, both bf16 | TRL generate / update / step, s |")]  # fmt: skip
    drawing.text(18, 28, "Seconds of a GRPO step, both in bf16", size=14, bold=True)
    drawing.text(18, 46, "two CPU cores; medians of alternating pairs", colour=MUTED)
    y = 62.0
    widest = max(max(step[1:3]) for step in steps)
    for name, theirs, ours, ratio in steps:
        label = f"{ratio[0]:.1f} × ({ratio[1]:.1f} to {ratio[2]:.1f})"
        _pair(drawing, name, (theirs, ours), ("s", 1, label), at=(110.0, y), scale=170 / widest)
        y += 56
    memory = [(row[0], numbers(row[1])[0], numbers(row[2])[0])
              for row in table("| peak memory of two steps, a process each, float32 |")]  # fmt: skip
    drawing.text(490, 28, "Peak memory of two steps, float32", size=14, bold=True)
    drawing.text(490, 46, "a process each, imports included", colour=MUTED)
    y = 62.0
    widest = max(max(row[1:]) for row in memory)
    for name, theirs, ours in memory:
        share = f"{ours / theirs:.0%} of it"
        _pair(drawing, name, (theirs / 1000, ours / 1000), ("GB", 1, share), at=(582.0, y), scale=170 / widest * 1000)
        y += 56
    return drawing.svg()


def _pair(
    drawing: Drawing, name: str, values: tuple[float, float], unit: tuple[str, int, str], at: tuple[float, float],
    scale: float,
) -> None:  # fmt: skip
    """TRL's bar over ours, with the comparison behind ours."""
    word, places, comparison = unit
    x, y = at
    drawing.text(x - 12, y + 22, name, anchor="end")
    for value, colour, down, said in ((values[0], OTHER, 0, "TRL"), (values[1], OURS, 20, comparison)):
        drawing.bar(x, y + down, value * scale, 16, colour)
        drawing.text(x + value * scale + 7, y + down + 12.5, f"{value:.{places}f} {word}", bold=True)
        width = 8 * len(f"{value:.{places}f} {word}")
        drawing.text(x + value * scale + 11 + width, y + down + 12.5, said, colour=colour)


def pictures() -> dict[Path, str]:
    """Each picture's path and what it holds."""
    return {IMAGES / "learning.svg": learning(), IMAGES / "speed.svg": speed()}


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path, content in pictures().items():
        path.write_text(content, encoding="utf-8")
        print(path)
