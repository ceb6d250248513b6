"""How much entropy bonus: β of 0, 0.01, 0.1 and 1 on the 4×4 GridWorld.

    python recipes/control_entropy_sweep.py --seeds 5

Draws return and policy entropy over the episodes, and prints where each ends and which runs collapsed. Too little and
the policy may settle on the first way it finds, too much and it never settles. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from curves import compare, figure, save

from llm_pg.control.record import ControlRun
from llm_pg.control.runs import train_seeds
from llm_pg.control.settings import resolve

COEFFICIENTS = (0.0, 0.01, 0.1, 1.0)


def train_all(env: str, num_seeds: int, num_episodes: int) -> dict[str, list[ControlRun]]:
    return {
        f"β = {beta:g}": train_seeds(
            resolve(env, "reinforce", baseline="running_mean", entropy_coef=beta, total_episodes=num_episodes),
            num_seeds,
            num_processes=1,  # a run is shorter than the start of a process
        )
        for beta in COEFFICIENTS
    }


def draw(runs: dict[str, list[ControlRun]], path: Path) -> list[Path]:
    drawing, (return_axis, entropy_axis) = figure(2)
    compare(runs, "return_mean", return_axis, "mean return of 100 episodes")
    compare(runs, "entropy", entropy_axis, "policy entropy, nats")
    entropy_axis.axhline(0.1, color="#777777", linestyle=":", label="collapse, if β = 0")
    return_axis.legend(frameon=False)
    entropy_axis.legend(frameon=False)
    drawing.suptitle(f"Entropy bonus β on {next(iter(runs.values()))[0].settings.env}")
    return save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="gridworld")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path("runs/control_entropy_sweep"))
    args = parser.parse_args()
    runs = train_all(args.env, args.seeds, args.episodes)
    print(f"{'':<10}{'final return, median (range)':<34}{'final entropy':<16}{'solved after':<16}flagged as collapsed")
    for name, of_name in runs.items():
        final = [run.points[-1]["return_mean"] for run in of_name]
        entropy = statistics.median(run.points[-1]["entropy"] for run in of_name)
        solved = [run.solved_episodes for run in of_name if run.solved_episodes is not None]
        when = f"{statistics.median(solved):.0f} ({len(solved)}/{len(of_name)})" if solved else "never"
        collapsed = sum(any(finding.rule == "entropy-collapse" for finding in run.findings) for run in of_name)
        spread = f"{statistics.median(final):.2f} ({min(final):.2f} to {max(final):.2f})"
        print(f"{name:<10}{spread:<34}{entropy:<16.3f}{when:<16}{collapsed}/{len(of_name)}")
    for path in draw(runs, args.out / "entropy"):
        print(path)


if __name__ == "__main__":
    main()
