"""CartPole by REINFORCE, with a baseline, actor-critic, A2C, RLOO, GRPO and PPO: learning curves side by side.

    python recipes/control_cartpole_algorithms.py --seeds 5 --steps 150000

Each algorithm runs at the settings that suit it here (`llm_pg.control.settings`), not at one learning rate for all.
Takes some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from curves import compare, figure, save

from llm_pg.control.record import ControlRun
from llm_pg.control.runs import train_seeds
from llm_pg.control.settings import resolve

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "REINFORCE": ("reinforce", {}),
    "+ learned value": ("reinforce", {"baseline": "value", "normalize_advantages": "steps"}),
    "actor-critic": ("actor_critic", {}),
    "A2C, GAE 0.95": ("a2c", {}),
    "RLOO": ("rloo", {"baseline_per_step": True}),
    "GRPO": ("grpo", {}),
    "PPO": ("ppo", {}),
}


def train_all(num_seeds: int, num_steps: int) -> dict[str, list[ControlRun]]:
    return {
        name: train_seeds(resolve("cartpole", algorithm, total_steps=num_steps, **changes), num_seeds)
        for name, (algorithm, changes) in VARIANTS.items()
    }


def draw(runs: dict[str, list[ControlRun]], path: Path) -> list[Path]:
    drawing, (return_axis, entropy_axis) = figure(2)
    compare(runs, "return_mean", return_axis, "mean return of 100 episodes")
    compare(runs, "entropy", entropy_axis, "policy entropy, nats")
    return_axis.axhline(475, color="#777777", linestyle=":", label="solved")
    return_axis.legend(frameon=False, fontsize="small")
    drawing.suptitle("CartPole-v1 by the algorithms of one table")
    return save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--out", type=Path, default=Path("runs/control_cartpole_algorithms"))
    args = parser.parse_args()
    runs = train_all(args.seeds, args.steps)
    print(f"{'':<18}{'solved':>8}  {'steps to solve, median (range)':<36}{'final return':>14}{'steps/s':>10}")
    for name, of_name in runs.items():
        solved = [run.solved_steps for run in of_name if run.solved_steps is not None]
        when = f"{statistics.median(solved):,.0f} ({min(solved):,} to {max(solved):,})" if solved else "-"
        final = statistics.median(run.points[-1]["return_mean"] for run in of_name)
        speed = statistics.median(run.steps_per_second for run in of_name)
        print(f"{name:<18}{len(solved):>4}/{len(of_name):<3}  {when:<36}{final:>14.1f}{speed:>10,.0f}")
    for path in draw(runs, args.out / "cartpole"):
        print(path)


if __name__ == "__main__":
    main()
