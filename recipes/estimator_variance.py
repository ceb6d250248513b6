"""The variance and the bias of estimators, exactly: every group that could be sampled is listed, nothing is drawn.

    python estimator_variance.py                 # estimators.svg and .png in runs/estimator_variance
    python estimator_variance.py --groups 2 3 4 5 --success 0.2

A policy of 15 completions a prompt stands for the language model; its gradient ∇J is known by enumeration. For each
estimator and each group size G the expected update E[g] and its covariance follow from all groups and their
probabilities. Left: trace of the covariance, brought to the gradient's length, plain REINFORCE = 1. Right: the
distance of E[g] from ∇J, with its length set right, so that what remains is a wrong direction.

What a baseline is worth depends on the share of completions that are right: where few are, the return itself is near
0 most of the time, and the mean of one or two others is more noise than help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from curves import COLOURS, figure, save
from torch import Tensor

from llm_pg.estimators import baselines
from llm_pg.estimators.exact import TabularPolicy, objective, terminal_reward
from llm_pg.estimators.expectation import Comparison, Groups, LossOfGroups, compare, expected_update

Advantage = Callable[[Tensor, Tensor, Tensor], Tensor]  # reward_B, group_B, valid_B -> advantage_B


def plain(reward_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    return reward_B


def rloo(reward_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    return reward_B - baselines.leave_one_out(reward_B, group_B, valid_B)


def group_mean(reward_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    return reward_B - baselines.group_mean(reward_B, group_B, valid_B)


def z_score(reward_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    return group_mean(reward_B, group_B, valid_B) / (
        baselines.group_std(reward_B, group_B, valid_B) + baselines.STD_EPS
    )


# name -> advantage, and whether a completion's tokens are averaged (GRPO as published) or summed
ESTIMATORS: dict[str, tuple[Advantage, bool]] = {
    "REINFORCE": (plain, False),
    "RLOO": (rloo, False),
    "group mean": (group_mean, False),
    "z-score": (z_score, False),
    "z-score, mean over tokens (GRPO)": (z_score, True),
}


def loss_of(policy: TabularPolicy, reward_PS: Tensor, advantage: Advantage, token_mean: bool) -> LossOfGroups:
    """The loss of M groups at M parameter sets, as `expected_update` wants it."""
    length_S = policy.completions.mask_ST.sum(1)

    def loss(theta_MPNV: Tensor, groups: Groups) -> Tensor:
        num, size = groups.index_MB.shape
        logp_MPS = policy.with_logits(theta_MPNV.flatten(0, 1)).logp_PST().sum(2).unflatten(0, theta_MPNV.shape[:2])
        row_M1 = torch.arange(num).unsqueeze(1)
        logp_MB = logp_MPS[row_M1, groups.prompt_MB, groups.index_MB]
        if token_mean:
            logp_MB = logp_MB / length_S[groups.index_MB]
        reward_MB = reward_PS[groups.prompt_MB, groups.index_MB]
        group_B = torch.arange(num).repeat_interleave(size)
        weight_B = advantage(reward_MB.flatten(), group_B, torch.ones(num * size, dtype=torch.bool))
        return -(weight_B.view(num, size) * logp_MB).mean(1)

    return loss


def measure(sizes: list[int], seed: int, success: float) -> dict[str, list[Comparison]]:
    """Name -> a comparison for each group size."""
    policy = TabularPolicy.random(vocab_size=3, horizon=3, num_prompts=2, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    num = policy.completions.num_completions
    reward_PS = (torch.rand(policy.num_prompts, num, generator=generator) < success).double()
    exact = objective(policy, terminal_reward(policy.completions, reward_PS)).gradient_PNV
    table: dict[str, list[Comparison]] = {}
    for name, (advantage, token_mean) in ESTIMATORS.items():
        loss = loss_of(policy, reward_PS, advantage, token_mean)
        updates = (expected_update(loss, policy.logits_PNV, policy.prob_PS(), size) for size in sizes)
        table[name] = [compare(update, exact) for update in updates]
    return table


def draw(table: dict[str, list[Comparison]], sizes: list[int], path: Path) -> list[Path]:
    drawing, (variance_axis, bias_axis) = figure(2)
    widths = range(12, 0, -2)  # several curves coincide: the later ones are drawn inside the earlier ones
    for (name, found), colour, width in zip(table.items(), COLOURS, widths, strict=False):
        unit = [plain.noise for plain in table["REINFORCE"]]
        relative = [one.noise / whole for one, whole in zip(found, unit, strict=True)]
        variance_axis.plot(sizes, relative, "o-", color=colour, label=name, markersize=width, linewidth=width / 2)
        bias_axis.plot(
            sizes,
            [one.off_direction for one in found],
            "o-",
            color=colour,
            label=name,
            markersize=width,
            linewidth=width / 2,
        )
    for axis in (variance_axis, bias_axis):
        axis.set_xticks(sizes)
        axis.set_xlabel("G, completions of a prompt")
    variance_axis.set_ylabel("variance at equal length (REINFORCE = 1)")
    bias_axis.set_ylabel("share of E[update] off the gradient's direction")
    variance_axis.legend(frameon=False, fontsize="small")
    drawing.suptitle("Estimators of one gradient, over every group that could be sampled")
    return save(drawing, path)


def main(words: list[str] | None = None) -> dict[str, list[Comparison]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--success", type=float, default=0.6, help="share of completions that are right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_variance"))
    args = parser.parse_args(words)
    table = measure(args.groups, args.seed, args.success)
    print(f"{'estimator':<34}{'G':>3}{'variance':>10}{'bias':>9}{'scale':>8}{'off direction':>15}")
    for name, found in table.items():
        for size, one, unit in zip(args.groups, found, table["REINFORCE"], strict=True):
            relative = one.noise / unit.noise
            print(f"{name:<34}{size:>3}{relative:>10.3f}{one.bias:>9.3f}{one.scale:>8.3f}{one.off_direction:>15.4f}")
    for path in draw(table, args.groups, args.out / "estimators"):
        print(path)
    return table


if __name__ == "__main__":
    main()
