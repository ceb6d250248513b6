"""Reward hacking: a coin meant as a hint towards the goal, which a walker learns to milk instead of going there.

    python recipes/control_reward_hacking.py --seeds 5

The environment also tells the true return, which nothing is trained on. Draws both, prints what the run's own flag
says, and shows the walk that was learned. Takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curves import COLOURS, band, draw_band, figure, save

from llm_pg.control.record import ControlRun
from llm_pg.control.runs import train_seeds
from llm_pg.control.settings import resolve


def draw(runs: list[ControlRun], honest: list[ControlRun], path: Path) -> list[Path]:
    drawing, (hacked_axis, honest_axis) = figure(2)
    for axis, of_axis, title in (
        (hacked_axis, runs, "coin pays every time"),
        (honest_axis, honest, "no coin: the true reward"),
    ):
        for key, name, colour in (
            ("return_mean", "return that is trained on", COLOURS[0]),
            ("true_return_mean", "true return", COLOURS[1]),
        ):
            found = band([run.points for run in of_axis], key)
            if found is not None:
                draw_band(axis, found, name, colour)
        axis.set_title(title)
        axis.set_xlabel("environment steps")
        axis.legend(frameon=False)
    hacked_axis.set_ylabel("mean return of 100 episodes")
    drawing.suptitle("A flawed proxy reward, and the true return that finds it out")
    return save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path("runs/control_reward_hacking"))
    args = parser.parse_args()
    changes = {"baseline": "running_mean", "total_episodes": args.episodes}
    hacked = train_seeds(
        resolve("hackable-gridworld", "reinforce", **changes), args.seeds, folder=args.out, num_processes=1
    )
    honest = train_seeds(resolve("gridworld", "reinforce", **changes), args.seeds, num_processes=1)
    for run in hacked:
        last = run.points[-1]
        print(
            f"seed {run.settings.seed}: trained return {last['return_mean']:.2f}, true {last['true_return_mean']:.2f}; "
            + ("; ".join(f.evidence for f in run.findings if f.rule == "reward-hacking") or "no hacking found")
        )
    print((args.out / "replay.txt").read_text(encoding="utf-8").split("the walk")[0])
    for path in draw(hacked, honest, args.out / "hacking"):
        print(path)


if __name__ == "__main__":
    main()
