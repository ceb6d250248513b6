"""Sampling ahead of training: the learning curve by `max_staleness`, and a timeline of the overlap.

OMP_NUM_THREADS=1 python recipes/benchmarks/staleness.py --out runs/staleness --seeds 3           # k = 0, 1, 4
OMP_NUM_THREADS=1 python recipes/benchmarks/staleness.py --out runs/staleness --seeds 0           # table and figures

Each run is a process of its own and a line of `<out>/runs.jsonl`; what is there is not made again. Beside it stand
`timeline.svg` (when each phase of a few steps began and ended) and `curves.svg` (reward by step and by seconds).
Seconds are those of the steps without evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_table import PASS, finished, spread
from rich.console import Console
from transformers import TrainerCallback

from llm_pg import PolicyGradientTrainer, shipped
from llm_pg.config import load_config
from llm_pg.metrics import read_metrics
from llm_pg.terminal import Terminal

LAGS = (0, 1, 4)
COLORS = {"sample": "#4c78a8", "reward": "#f58518", "update": "#54a24b", "reference": "#b79a20", "wait": "#d8d8d8"}
TRAINER, BACKGROUND = "trainer", "background"


class Recorder(Terminal):
    """Prints nothing, and keeps [lane, step, phase, begin, end] in seconds."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True))
        self.spans: list[tuple[str, int, str, float, float]] = []
        self.began: dict[tuple[str, str], float] = {}

    def note(self, lane: str, step: int, phase: str, begins: bool) -> None:
        if begins:
            self.began[lane, phase] = time.perf_counter()
        else:
            self.spans.append((lane, step, phase, self.began.pop((lane, phase)), time.perf_counter()))


class BackgroundPhases(TrainerCallback):
    """Tells the recorder of the background's phases too."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: PolicyGradientTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        assert self.trainer.run is not None
        ahead = self.trainer.run.source.ahead
        if ahead is not None:
            ahead.watch = lambda step, phase, begins: self.recorder.note(BACKGROUND, step, phase, begins)


def own_seconds(line: dict[str, Any]) -> float:
    """Of a step without its evaluation."""
    return float(line["seconds"] - line.get("seconds/eval", 0.0))


def reached(lines: Sequence[dict[str, Any]], last: float) -> tuple[int | None, float | None]:
    """The first evaluation at or above 90 %: its step, and the steps' seconds up to there."""
    seconds = 0.0
    for number, line in enumerate(lines):
        seconds += own_seconds(line)
        found = last if number == len(lines) - 1 else line.get("eval/greedy", 0.0)
        if found >= PASS:
            return int(line["step"]), round(seconds, 2)
    return None, None


def train(lag: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run here; what the table and the figures need of it."""
    name, recorder = f"k{lag}-seed{seed}", Recorder()
    settings = [f"max_staleness={lag}", f"seed={seed}", f"output_dir={options.out}", f"run_name={name}"]
    settings += ["overwrite=true", f"eval_steps={options.eval_steps}", "eval_num_samples=0", "save_steps=0"]
    settings += ["log_completions=0", "noise_steps=0", "try_longest_batch=false", *options.settings]
    background = BackgroundPhases(recorder)
    run = PolicyGradientTrainer(
        args=load_config(shipped.find(options.config), settings), terminal=recorder, callbacks=[background]
    )
    background.trainer = run
    recorder.phase = lambda phase, begins: recorder.note(  # type: ignore[method-assign]
        TRAINER, run.state.global_step + 1, phase, begins
    )
    summary = run.train()
    lines = read_metrics(run.folder.metrics)
    step, seconds = reached(lines, summary["pass_rate_after"])
    (run.folder.path / "timeline.json").write_text(json.dumps(recorder.spans))
    return {
        "lag": lag,
        "seed": seed,
        "after": summary["pass_rate_after"],
        "steps_to_pass": step,
        "seconds_to_pass": seconds,
        "step_seconds": statistics.median(own_seconds(line) for line in lines),
        **{f"{x}_seconds": statistics.median(line.get(f"seconds/{x}", 0.0) for line in lines) for x in COLORS},
        "sampler_gap": statistics.fmean(line["sampler_gap"] for line in lines),
        "bounded": statistics.fmean(line.get("correction_bounded", 0.0) for line in lines),
        "overlap": overlap(recorder.spans),
    }


def overlap(spans: Sequence[tuple[str, int, str, float, float]]) -> float:
    """Share of the background's seconds in which the trainer was at work itself; the process starts in batch 1."""
    work = [(begin, end) for lane, _, phase, begin, end in spans if lane == TRAINER and phase != "wait"]
    behind = [(begin, end) for lane, step, _, begin, end in spans if lane == BACKGROUND and step > 1]
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in behind for c, d in work)
    return both / sum(end - begin for begin, end in behind) if behind else 0.0


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a lag: medians and ranges over seeds."""
    words = ("steps to 90 %", "seconds to 90 %", "after, %", "ms a step", "sample", "update", "wait", "overlap, %")
    out = ["| k | runs | reached | " + " | ".join((*words, "gap, nats", "bounded, %")) + " |"]
    out.append("|--:" * 13 + "|")
    for lag in sorted({run["lag"] for run in runs}):
        own = [run for run in runs if run["lag"] == lag]
        numbers = [
            spread([run["steps_to_pass"] for run in own], 0),
            spread([run["seconds_to_pass"] for run in own], 1),
            spread([100 * run["after"] for run in own], 1),
            *(spread([1000 * run[f"{x}_seconds"] for run in own], 0) for x in ("step", "sample", "update", "wait")),
            spread([100 * run["overlap"] for run in own], 0),
            spread([run["sampler_gap"] for run in own], 4),
            spread([100 * run["bounded"] for run in own], 2),
        ]
        passed = sum(run["steps_to_pass"] is not None for run in own)
        out.append(f"| {lag} | {len(own)} | {passed} | " + " | ".join(numbers) + " |")
    return "\n".join(out)


def draw_timeline(out: Path, lags: Sequence[int], seed: int, first: int, number: int) -> None:
    """Steps `first` to `first` + `number` - 1 of one run a lag, the trainer above its background."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(len(lags), 1, figsize=(9, 1.5 * len(lags)), sharex=True, squeeze=False)
    longest = 0.0
    for axis, lag in zip(axes[:, 0], lags, strict=True):
        spans = json.loads((out / f"k{lag}-seed{seed}" / "timeline.json").read_text())
        of_trainer = [s for s in spans if s[0] == TRAINER and first <= s[1] < first + number]
        begin, end = min(s[3] for s in of_trainer), max(s[4] for s in of_trainer)
        longest = max(longest, end - begin)
        for lane, step, phase, start, stop in spans:
            if stop < begin or start > end or phase not in COLORS:
                continue
            height = 1 if lane == TRAINER else 0
            axis.barh(height, stop - start, left=start - begin, color=COLORS[phase], edgecolor="white", linewidth=0.5)
            if stop - start > 0.06 * (end - begin):
                place = ((start + stop) / 2 - begin, height)
                axis.text(*place, str(step), ha="center", va="center", fontsize=8, clip_on=True)
        axis.set_yticks([0, 1], [BACKGROUND, TRAINER])
        axis.set_title(f"max_staleness {lag}", loc="left", fontsize=9)
        axis.set_ylim(-0.5, 1.5)
    axes[-1, 0].set_xlabel("seconds; numbers are steps")
    axes[-1, 0].set_xlim(0, longest)
    figure.legend(handles=[Patch(color=c, label=p) for p, c in COLORS.items()], ncols=len(COLORS), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(out / "timeline.svg", metadata={"Date": None})


def draw_curves(out: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Mean reward of the batch by steps and by seconds, a line a run."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for run in runs:
        lines = read_metrics(out / f"k{run['lag']}-seed{run['seed']}" / "metrics.jsonl")
        seconds = [sum(own_seconds(x) for x in lines[: i + 1]) for i in range(len(lines))]
        color = f"C{sorted({r['lag'] for r in runs}).index(run['lag'])}"
        label = f"k = {run['lag']}" if run["seed"] == min(r["seed"] for r in runs) else None
        for axis, x in zip(axes, ([line["step"] for line in lines], seconds), strict=True):
            axis.plot(x, [line["reward"] for line in lines], color=color, label=label, linewidth=1)
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("seconds of steps")
    axes[0].set_ylabel("reward")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out / "curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--lags", type=int, nargs="+", default=list(LAGS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this number less 1")
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--timeline", type=int, nargs=2, default=(11, 4), help="first step of the figure, and how many")
    parser.add_argument("--one", type=int, nargs=2, help="one run here: lag and seed")
    parser.add_argument("settings", nargs="*", help="more settings, key=value, the same for every run")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    if options.one:
        result = train(*options.one, options)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        return
    for seed in range(options.seeds):
        for lag in options.lags:
            if (lag, seed) not in {(run["lag"], run["seed"]) for run in finished(path)}:
                words = [str(x) for x in (*sys.argv[1:], "--one", lag, seed)]
                subprocess.run([sys.executable, __file__, *words], check=True)
                print(json.dumps(finished(path)[-1]), flush=True)
    runs = [run for run in finished(path) if run["lag"] in options.lags]
    print(table(runs))
    draw_timeline(
        options.out, sorted({run["lag"] for run in runs}), min(run["seed"] for run in runs), *options.timeline
    )
    draw_curves(options.out, runs)


if __name__ == "__main__":
    main()
