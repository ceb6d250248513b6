"""How noisy is one step's gradient: REINFORCE, RLOO, GRPO and the learned critic, at the same weights and samples.

    python recipes/benchmarks/gradient_variance.py --batches 60 --critic-steps 40

The quickstart's model after its warm start is held fixed; a critic learns it first, on batches of its own. Then every
estimator weighs the same fresh batches (64 prompts × 4 completions). Noise is the trace of the covariance of a step's
gradient over the squared length of its mean (unbiased in both), so that scales cancel: the number of such
steps to average before noise and signal are equal. The cosine is that of an estimator's mean gradient with RLOO's.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from typing import Any

import torch
from torch import Tensor

from llm_pg import PolicyGradientTrainer
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import load_config
from llm_pg.metrics import Clock, read_metrics
from llm_pg.model.critic import with_values
from llm_pg.rollouts import TextRollouts
from llm_pg.shipped import find
from llm_pg.terminal import Terminal

ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "reinforce, no baseline": ("reinforce", {}),
    "reinforce, running mean": ("reinforce", {"baseline": "running_mean"}),
    "rloo": ("rloo", {}),
    "grpo": ("grpo", {"beta": 0.0}),
    "critic, λ 1 (a2c)": ("a2c", {}),
    "critic, λ 0.95 (ppo)": ("ppo", {}),
    "critic, λ 0.95, not normalised": ("ppo", {"normalize_advantages": "none"}),
    "critic, λ 0.5, not normalised": ("ppo", {"normalize_advantages": "none", "lam": 0.5}),
}


def warm_started(args: argparse.Namespace, folder: str) -> PolicyGradientTrainer:
    """The quickstart's trainer: policy after the warm start, its critic after `critic_steps`.

    The one step that is not warm-up has the rate 0, at which the quickstart's schedule begins.
    """
    settings = {
        "algorithm.name": "ppo", "beta": 0.0, "max_steps": args.critic_steps + 1,
        "critic_warmup_steps": args.critic_steps, "critic_kind": args.critic, "seed": args.seed, "save_steps": 0,
        "eval_steps": 0, "eval_on_start": False, "num_eval_prompts": 8, "eval_num_samples": 0, "noise_steps": 0,
        "log_completions": 0, "reward_in_process": True, "output_dir": folder, "run_name": "run",
    }  # fmt: skip
    if args.model:
        settings |= {"model.make": "null", "model_name_or_path": args.model, "warm_start_steps": 0}
    if args.critic == "model":
        settings["critic_learning_rate"] = 1e-3
    config = load_config(find("quickstart.yaml"), [f"{name}={value}" for name, value in settings.items()])
    trainer = PolicyGradientTrainer(args=config, terminal=Terminal(quiet=True))
    trainer.train()
    return trainer


class Moments:
    """Sums over gradients that never stand side by side."""

    def __init__(self) -> None:
        self.count, self.squares, self.total = 0, 0.0, torch.zeros(0)

    def add(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.total = gradient if not self.count else self.total + gradient
        self.squares += float(gradient.square().sum())
        self.count += 1

    @property
    def noise_to_signal(self) -> float:
        """tr Σ / |μ|² of one step's gradient."""
        n = self.count
        mean_square = float(self.total.square().sum()) / n**2
        trace = (self.squares - n * mean_square) / (n - 1)
        return trace / (mean_square - trace / n)


def gradients(trainer: PolicyGradientTrainer, rollouts: TextRollouts, algorithms: dict[str, Algorithm]) -> Any:
    """Name -> the gradient of one step of each estimator, by one forward pass."""
    policy, seen = trainer.policy, trainer.policy.observe(rollouts, 10_000, with_logp=False, after=False)
    assert seen.value_BT is not None
    valued = with_values(rollouts, seen.value_BT)
    batches = {name: algorithm.compute_advantages(valued) for name, algorithm in algorithms.items()}
    sums: dict[str, Tensor] = {}
    for index in policy.layout.cuts(rollouts, 10_000):
        logp_BT = policy.forward(rollouts.rows(index)).logp_BT
        for name, algorithm in algorithms.items():
            loss, _ = algorithm.loss(logp_BT, batches[name].rows(index), measure=False)
            parts = torch.autograd.grad(loss, policy.parameters(), retain_graph=True)
            flat = torch.cat([part.reshape(-1) for part in parts])
            sums[name] = sums[name] + flat if name in sums else flat
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help="steps whose gradients are compared")
    parser.add_argument("--critic-steps", type=int, default=40, help="steps that the critic learns before")
    parser.add_argument("--model", help="folder of a trained quickstart model; default: the model after the warm start")
    parser.add_argument("--critic", choices=["head", "model"], default="head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    algorithms = {
        name: Algorithm(dataclasses.replace(ALGORITHMS[base], **changes), 8)
        for name, (base, changes) in ESTIMATORS.items()
    }
    moments = {name: Moments() for name in algorithms}
    explained: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = warm_started(args, folder)
        tail = read_metrics(trainer.folder.metrics)[-10:]
        explained = [line["explained_variance"] for line in tail if "explained_variance" in line]
        with trainer.scorer:
            for step in range(1000, 1000 + args.batches):
                prompts = trainer.prompts.take(step)
                got = trainer.collector.collect(prompts, step, trainer.context.plan.num_generations, Clock())
                for name, gradient in gradients(trainer, got.rollouts, algorithms).items():
                    moments[name].add(gradient)
    print(f"{args.batches} batches, mean reward {tail[-1]['reward']:.2f}, explained variance of the critic "
          f"{sum(explained) / max(len(explained), 1):.2f}\n")  # fmt: skip
    print("| estimator | noise (tr Σ / \\|μ\\|²) | against RLOO | cosine with RLOO |\n|---|--:|--:|--:|")
    rloo = moments["rloo"]
    for name, moment in moments.items():
        cosine = float(torch.nn.functional.cosine_similarity(moment.total, rloo.total, dim=0))
        ratio = moment.noise_to_signal / rloo.noise_to_signal
        print(f"| {name} | {moment.noise_to_signal:.2f} | {ratio:.2f} | {cosine:.3f} |")


if __name__ == "__main__":
    main()
