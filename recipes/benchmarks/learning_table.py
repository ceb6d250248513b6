"""Every row on the same task: steps and seconds until 90 % of the held-out prompts are answered, over seeds.

python recipes/benchmarks/learning_table.py --out runs/learning --seeds 5            # every row that trains text
python recipes/benchmarks/learning_table.py --out runs/learning --rows rloo maxrl    # some
python recipes/benchmarks/learning_table.py --out runs/learning --seeds 0            # only the table of what is there

One run at a time, each in a process of its own. A finished run is a line of `<out>/runs.jsonl` and is not made again,
so an interrupted table goes on where it was. Seconds are those of the steps: sampling, rewards, reference, update;
not start, warm start and evaluation, which are the same for every row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_pg.algorithms.table import TABLE
from llm_pg.metrics import read_metrics

PASS = 0.9
WORDS = "row, runs, reached 90 %, steps to 90 %, seconds to 90 %, greedy before, greedy after, s a step"
COLUMNS = WORDS.split(", ")


def finished(path: Path) -> list[dict[str, Any]]:
    """The runs that are done; a half-written last line is a run to make again."""
    done = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return done


def train(row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run; what the table needs of it."""
    name = f"{row}-seed{seed}"
    command = [
        *(sys.executable, "-m", "llm_pg.cli", "train", options.config),
        *(f"algorithm={row}", f"seed={seed}", f"output_dir={options.out}", f"run_name={name}"),
        *("overwrite=true", f"eval_steps={options.eval_steps}", "eval_num_samples=0", "save_steps=0"),
        *("log_completions=0", "noise_steps=0", "try_longest_batch=false", *options.settings),
    ]
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        return {"row": row, "seed": seed, "error": ended.stderr.strip()[-400:] or f"exit code {ended.returncode}"}
    folder = Path(options.out) / name
    summary = json.loads((folder / "summary.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    step, seconds = reached(lines, summary["pass_rate_after"])
    return {
        "row": row,
        "seed": seed,
        "before": summary["pass_rate_before"],
        "after": summary["pass_rate_after"],
        "steps_to_pass": step,
        "seconds_to_pass": seconds,
        "seconds_a_step": statistics.median(own_seconds(line) for line in lines),
        "wall": round(time.perf_counter() - begin, 1),
    }


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


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median and range of the runs that have a number."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return "-"
    low, middle, high = (f"{v:.{digits}f}" for v in (known[0], statistics.median(known), known[-1]))
    return middle if len(known) == 1 else f"{middle} ({low} to {high})"


def table(runs: Sequence[dict[str, Any]], rows: Sequence[str]) -> str:
    """Markdown; the medians are over the runs that reached the mark."""
    out = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for row in rows:
        own = [run for run in runs if run["row"] == row]
        good = [run for run in own if "error" not in run]
        if not own:
            continue
        numbers = (
            spread([run["steps_to_pass"] for run in good], 0),
            spread([run["seconds_to_pass"] for run in good], 1),
            spread([100 * run["before"] for run in good], 0),
            spread([100 * run["after"] for run in good], 0),
            spread([run["seconds_a_step"] for run in good], 3),
        )
        passed = sum(run["steps_to_pass"] is not None for run in good)
        out.append(f"| {row} | {len(good)} | {passed} | " + " | ".join(numbers) + " |")
        out += [f"| {row}, seed {r['seed']} | 0 | {' '.join(r['error'].split())[-120:]} |" for r in own if "error" in r]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/learning")
    parser.add_argument("--rows", nargs="+", default=list(TABLE), choices=list(TABLE))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this number less 1")
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="more settings, key=value, the same for every run")
    options = parser.parse_intermixed_args()
    path = Path(options.out) / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(run["row"], run["seed"]) for run in finished(path) if "error" not in run}
    for seed in range(options.seeds):
        for row in options.rows:
            if (row, seed) not in done:
                run = train(row, seed, options)
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print(json.dumps(run), flush=True)
    latest = {(run["row"], run["seed"]): run for run in finished(path)}
    print(table(list(latest.values()), options.rows))


if __name__ == "__main__":
    main()
