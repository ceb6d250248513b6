"""How noisy is one episode's gradient: REINFORCE, with baselines, actor-critic and GAE, at one and the same policy.

    python recipes/control_gradient_variance.py --batches 1500

A policy and its critic are half trained on the 4×4 GridWorld and then held. Every estimator gets fresh episodes, one a
gradient. Variance is the trace of the covariance, REINFORCE with total returns = 1. The exact ∇J comes from dynamic
programming, so that the bias is known too: ‖mean - ∇J‖ / ‖∇J‖, with its own sampling error beside it. About a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from curves import COLOURS, figure, save
from torch import Tensor

from llm_pg.control.learner import ControlLearner
from llm_pg.control.prepare import prepare
from llm_pg.control.settings import SPECS, resolve
from llm_pg.control.tabular import build, exact_gradient

LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)
ESTIMATORS: dict[str, dict[str, Any]] = {
    "REINFORCE, total return": {"returns": "total"},
    "REINFORCE, reward-to-go": {},
    "+ running mean": {"baseline": "running_mean"},
    "+ learned value": {"baseline": "value", "lam": 1.0},
    "actor-critic (TD error)": {"baseline": "value", "lam": 0.0},
    **{f"GAE λ = {lam:g}": {"baseline": "value", "lam": lam} for lam in LAMBDAS},
}


def half_trained(num_episodes: int) -> tuple[Any, ControlLearner]:
    """A collector and a learner whose policy and critic saw some episodes."""
    settings = resolve("gridworld", "reinforce", baseline="value", learning_rate=0.1)
    _, collector, learner = prepare(settings)
    for _ in range(num_episodes):
        learner.update(collector.collect(), 0.0)
    return collector, learner


def gradients(changes: dict[str, Any], collector: Any, learner: ControlLearner, num_batches: int) -> Tensor:
    """One gradient of the return an episode, of the policy's parameters only: (N, parameters)."""
    row = dataclasses.replace(SPECS["reinforce"], **changes)
    other = ControlLearner(
        dataclasses.replace(learner.settings, spec=row), learner.policy, collector.policy.interface.horizon, False
    )
    num_actor = sum(p.numel() for p in learner.policy.actor.parameters())
    for _ in range(50):  # the running mean finds its level
        other.gradient(collector.collect(), 0.0)
    return -torch.stack([other.gradient(collector.collect(), 0.0)[0][:num_actor] for _ in range(num_batches)]).double()


def measure(num_batches: int, num_episodes: int) -> dict[str, tuple[float, float, float]]:
    """Name -> variance (trace), relative bias, and the relative error that chance alone would leave."""
    collector, learner = half_trained(num_episodes)
    logits_SA = learner.policy.actor[0].weight.T
    _, exact_SA = exact_gradient(build("llm_pg/GridWorld-v0"), logits_SA)
    exact = exact_SA.T.flatten()
    out = {}
    for name, changes in ESTIMATORS.items():
        samples = gradients(changes, collector, learner, num_batches)
        variance = float(samples.var(0).sum())
        bias = float((samples.mean(0) - exact).norm() / exact.norm())
        out[name] = (variance, bias, float((variance / num_batches) ** 0.5 / exact.norm()))
    return out


def draw(table: dict[str, tuple[float, float, float]], path: Path) -> list[Path]:
    drawing, (variance_axis, bias_axis) = figure(2, height=4.8)
    names = list(table)[::-1]
    unit = next(iter(table.values()))[0]
    variance_axis.barh(names, [table[name][0] / unit for name in names], color=COLOURS[0])
    variance_axis.set_xscale("log")
    variance_axis.set_xlabel("variance of one episode's gradient (total return = 1)")
    bias_axis.barh(names, [table[name][1] for name in names], color=COLOURS[1], label="‖mean - ∇J‖ / ‖∇J‖")
    bias_axis.plot([table[name][2] for name in names], names, "k|", markersize=12, label="what chance leaves")
    bias_axis.set_xlabel("distance of the mean from the exact gradient")
    bias_axis.set_yticklabels([])
    bias_axis.legend(frameon=False)
    drawing.suptitle("Variance and bias at a half-trained policy on GridWorld")
    return save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1_500)
    parser.add_argument("--episodes", type=int, default=60, help="of training before policy and critic are held")
    parser.add_argument("--out", type=Path, default=Path("runs/control_gradient_variance"))
    args = parser.parse_args()
    table = measure(args.batches, args.episodes)
    unit = next(iter(table.values()))[0]
    print(f"{'estimator':<28}{'variance':>10}{'bias':>10}{'by chance':>12}")
    for name, (variance, bias, chance) in table.items():
        print(f"{name:<28}{variance / unit:>10.3f}{bias:>10.3f}{chance:>12.3f}")
    for path in draw(table, args.out / "variance"):
        print(path)


if __name__ == "__main__":
    main()
