"""Classic control against Stable-Baselines3: environment steps until solved, and steps a second, on the same work.

    pip install stable-baselines3          # used by this script alone
    python recipes/benchmarks/control_vs_sb3.py --seeds 5 --out runs/control_vs_sb3.jsonl

Both libraries run in this process, one thread, turn by turn within each seed, so that other load on the machine meets
both alike. The same hyper-parameters are in `TASKS` once and go to both; where a name differs the comment says so.
Solved means the same for both: mean return of the last 100 training episodes at the threshold. "ours, own settings"
runs our defaults on the same task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from llm_pg.control.settings import resolve
from llm_pg.control.train import train

# n_envs, steps and so on as in the tuned settings that the SB3 community publishes (rl-baselines3-zoo) for PPO, and
# SB3's defaults at its usual 8 environments for A2C. Their gSDE for Pendulum has no counterpart here and stays off.
TASKS: dict[str, dict[str, Any]] = {
    "cartpole-a2c": {
        "env": "CartPole-v1", "algorithm": "a2c", "threshold": 475.0, "total_steps": 400_000,
        "num_envs": 8, "num_steps": 5, "gamma": 0.99, "lam": 1.0, "learning_rate": 7e-4, "final": 7e-4, "epochs": 1,
        "minibatches": 1, "log_std": 0.0,
    },
    "cartpole-ppo": {
        "env": "CartPole-v1", "algorithm": "ppo", "threshold": 475.0, "total_steps": 150_000,
        "num_envs": 8, "num_steps": 32, "gamma": 0.98, "lam": 0.8, "learning_rate": 1e-3, "final": 0.0, "epochs": 20,
        "minibatches": 1, "log_std": 0.0,
    },
    "pendulum-ppo": {
        "env": "Pendulum-v1", "algorithm": "ppo", "threshold": -200.0, "total_steps": 120_000,
        "num_envs": 4, "num_steps": 1024, "gamma": 0.9, "lam": 0.95, "learning_rate": 1e-3, "final": 1e-3, "epochs": 10,
        "minibatches": 64, "log_std": 0.0,
    },
}  # fmt: skip
SHORT = {"CartPole-v1": "cartpole", "Pendulum-v1": "pendulum"}


def ours(task: dict[str, Any], seed: int, same: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if same:
        changes = {
            "num_envs": task["num_envs"], "num_steps": task["num_steps"], "gamma": task["gamma"], "lam": task["lam"],
            "learning_rate": task["learning_rate"], "learning_rate_final": task["final"],
            "num_epochs": task["epochs"], "num_minibatches": task["minibatches"], "reward_scale": 1.0,
            "scale_observations": False, "max_grad_norm": 0.5, "total_steps": task["total_steps"],
            "vf_coef": 1.0,  # ours halves the squared error, so 1 is their 0.5
            "optimizer": "rmsprop" if task["algorithm"] == "a2c" else "adam",
            "normalize_advantages": "steps" if task["algorithm"] == "ppo" else "none",
        }  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    run = train(resolve(SHORT[task["env"]], task["algorithm"], seed=seed, stop_when_solved=True, **changes))
    return _result(run.solved_steps, run.steps, time.perf_counter() - start, time.process_time() - cpu)


def theirs(task: dict[str, Any], seed: int) -> dict[str, Any]:
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Watch(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.recent: deque[float] = deque(maxlen=100)
            self.solved: int | None = None

        def _on_step(self) -> bool:
            self.recent.extend(info["episode"]["r"] for info in self.locals["infos"] if "episode" in info)
            if len(self.recent) == 100 and float(np.mean(self.recent)) >= task["threshold"]:
                self.solved = self.num_timesteps
            return self.solved is None

    start, cpu = time.perf_counter(), time.process_time()
    first, final = task["learning_rate"], task["final"]
    common: dict[str, Any] = {
        "n_steps": task["num_steps"], "gamma": task["gamma"], "gae_lambda": task["lam"], "seed": seed, "device": "cpu",
        "learning_rate": first if first == final else lambda left: final + (first - final) * left,
    }  # fmt: skip
    envs = make_vec_env(task["env"], task["num_envs"], seed=seed)
    if task["algorithm"] == "a2c":
        model: Any = A2C("MlpPolicy", envs, **common)
    else:
        size = task["num_envs"] * task["num_steps"] // task["minibatches"]
        model = PPO("MlpPolicy", envs, n_epochs=task["epochs"], batch_size=size, **common)
    watch = Watch()
    model.learn(task["total_steps"], callback=watch)
    envs.close()
    return _result(watch.solved, model.num_timesteps, time.perf_counter() - start, time.process_time() - cpu)


def _result(solved: int | None, steps: int, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    return {"solved": solved, "steps": steps, "per_second": steps / seconds, "per_cpu_second": steps / cpu_seconds}


WHO = {
    "ours": lambda task, seed: ours(task, seed, same=True),
    "SB3": theirs,
    "ours, own settings": lambda task, seed: ours(task, seed, same=False),
}


def report(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'task':<14}{'who':<20}{'solved':>7}  {'steps to solve: median (range)':<34}{'steps/s':>9}{'per CPU s':>11}"
    )
    for task in dict.fromkeys(row["task"] for row in rows):
        for who in WHO:
            mine = [row for row in rows if row["task"] == task and row["who"] == who]
            if not mine:
                continue
            solved = sorted(row["solved"] for row in mine if row["solved"])
            when = f"{statistics.median(solved):,.0f} ({solved[0]:,} to {solved[-1]:,})" if solved else "-"
            speed, cpu = (statistics.median(row[key] for row in mine) for key in ("per_second", "per_cpu_second"))
            print(f"{task:<14}{who:<20}{len(solved):>4}/{len(mine):<2}  {when:<34}{speed:>9,.0f}{cpu:>11,.0f}")
        ratios = {}
        for key in ("per_second", "per_cpu_second"):
            pairs = [
                {row["who"]: row[key] for row in rows if row["task"] == task and row["seed"] == seed}
                for seed in dict.fromkeys(row["seed"] for row in rows if row["task"] == task)
            ]
            ratios[key] = sorted(pair["ours"] / pair["SB3"] for pair in pairs if {"ours", "SB3"} <= set(pair))
        for key, values in ratios.items():
            if values:
                print(
                    f"{'':<14}{key} ours / SB3: {statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/control_vs_sb3.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    gymnasium.logger.min_level = 40
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with args.out.open("w", encoding="utf-8") as file:
        for task in args.tasks.split(","):
            for seed in range(args.seeds):
                for who, run in WHO.items():
                    rows.append({"task": task, "seed": seed, "who": who, **run(TASKS[task], seed)})
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
    report(rows)


if __name__ == "__main__":
    main()
