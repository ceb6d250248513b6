"""What a baseline does: REINFORCE on the 4×4 GridWorld without one, with a running mean and with a learned value.

    python recipes/control_gridworld_baseline.py --seeds 10
    python recipes/control_gridworld_baseline.py --learning-rate 0.2      # small enough for all four

Draws the mean and the standard deviation of the return (each seed thin, their mean thick), and prints after how many
episodes each is within 0.1 of the shortest way. The default learning rate is large, so that noise decides: an unlucky
batch drives a policy into a wall for good, and a run that ends at -5 never left it. A running mean is a baseline for
the total return; what is to come after a late step has another mean, so reward-to-go wants a value of the state. How
noisy each of them is says `control_gradient_variance.py`. Takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from curves import COLOURS, episode_band, figure, save

from llm_pg.control.record import ControlRun
from llm_pg.control.runs import train_seeds
from llm_pg.control.settings import resolve

VARIANTS = {
    "total return": {"returns": "total", "baseline": "none"},
    "total return - running mean": {"returns": "total", "baseline": "running_mean"},
    "reward-to-go": {"returns": "reward_to_go", "baseline": "none"},
    "reward-to-go - learned value": {"returns": "reward_to_go", "baseline": "value"},
}
WINDOW = 50


def train_all(num_seeds: int, num_episodes: int, learning_rate: float) -> dict[str, list[ControlRun]]:
    return {
        name: train_seeds(
            resolve(
                "gridworld",
                "reinforce",
                total_episodes=num_episodes,
                learning_rate=learning_rate,
                **changes,
            ),
            num_seeds,
            num_processes=1,  # a run is shorter than the start of a process
        )
        for name, changes in VARIANTS.items()
    }


def draw(runs: dict[str, list[ControlRun]], path: Path) -> list[Path]:
    drawing, (mean_axis, std_axis) = figure(2)
    for (name, of_name), colour in zip(runs.items(), COLOURS, strict=False):
        for axis, numbers in ((mean_axis, 0), (std_axis, 1)):
            each = [episode_band([run.returns], WINDOW)[numbers] for run in of_name]
            num_points = min(len(one.steps) for one in each)
            table = np.stack([one.median[:num_points] for one in each])
            axis.plot(each[0].steps[:num_points], table.T, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(each[0].steps[:num_points], table.mean(0), color=colour, linewidth=2, label=name)
    threshold = next(iter(runs.values()))[0].threshold
    mean_axis.axhline(threshold, color="#777777", linestyle=":", label="solved")
    mean_axis.set_ylabel(f"mean return of {WINDOW} episodes")
    std_axis.set_ylabel(f"standard deviation of {WINDOW} returns")
    for axis in (mean_axis, std_axis):
        axis.set_xlabel("episodes")
    mean_axis.legend(frameon=False, loc="center right")
    rate = next(iter(runs.values()))[0].settings.learning_rate
    drawing.suptitle(f"REINFORCE on GridWorld, learning rate {rate:g}: what a baseline does")
    return save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/control_gridworld_baseline"))
    args = parser.parse_args()
    runs = train_all(args.seeds, args.episodes, args.learning_rate)
    print(f"{'credit':<30}{'solved':>8}  {'episodes to solve, median (range)':<36}{'std of return, first / last 100'}")
    for name, of_name in runs.items():
        solved = [run.solved_episodes for run in of_name if run.solved_episodes is not None]
        when = f"{statistics.median(solved):.0f} ({min(solved)} to {max(solved)})" if solved else "-"
        early, late = (
            statistics.median(statistics.pstdev(run.returns[part]) for run in of_name)
            for part in (slice(100), slice(-100, None))
        )
        print(f"{name:<30}{len(solved):>4}/{len(of_name):<3}  {when:<36}{early:.2f} / {late:.2f}")
    for path in draw(runs, args.out / "baseline"):
        print(path)


if __name__ == "__main__":
    main()
