"""Batches made of nothing but numbers, for tests of the algorithms: no model, no text."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm, Batch
from llm_pg.algorithms.spec import WORDS, AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.baselines import AllSum
from llm_pg.rollouts import Rollouts

T = TypeVar("T")
LIMIT = 9


def algorithm(row: AlgorithmSpec | str, **changes: object) -> Algorithm:
    row = ALGORITHMS[row] if isinstance(row, str) else row
    return Algorithm(dataclasses.replace(row, **changes), max_completion_length=LIMIT)  # type: ignore[arg-type]


def text(
    reward_B: list[float] | list[float | None],
    *,
    group_B: list[int] | None = None,
    length_B: list[int] | None = None,
    **others: object,
) -> Rollouts:
    num = len(reward_B)
    length = torch.tensor(length_B or [3] * num)
    likely = torch.full((num, int(length.max())), -1.0)
    others = {"greedy_B": torch.full((num,), 0.4), "teacher_logp_BT": likely, **others}  # a teacher of one mind
    return Rollouts.of_scored_text(
        mask_BT=torch.arange(int(length.max())).expand(num, -1) < length.unsqueeze(1),
        logp_BT=likely.clone(),
        group_B=torch.tensor(group_B or [0] * num),
        reward_B=reward_B,
        **others,  # type: ignore[arg-type]
    )


@dataclass
class Linear:
    """A stand-in for a model: every number that is trained is linear in the same ten parameters."""

    logp_BTK: Tensor
    entropy_BTK: Tensor
    value_BTK: Tensor

    def rows(self, index: Tensor) -> Linear:
        return Linear(self.logp_BTK[index], self.entropy_BTK[index], self.value_BTK[index])

    def gradient(self, algorithm: Algorithm, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the loss over these rows, and the statistics."""
        theta = torch.linspace(-0.5, 0.5, 10, dtype=self.logp_BTK.dtype).requires_grad_()
        loss, stats = algorithm.loss(
            self.logp_BTK @ theta - 1.0,
            batch,
            entropy_BT=self.entropy_BTK @ theta,
            value_BT=self.value_BTK @ theta,
        )
        (gradient,) = torch.autograd.grad(loss, theta, allow_unused=True)
        stats = {name: value.detach() for name, value in stats.items()}
        return (torch.zeros_like(theta) if gradient is None else gradient), {**stats, "loss": loss.detach()}


def rows_of_the_table() -> dict[str, AlgorithmSpec]:
    """Every algorithm, as shipped and with everything on that it can have."""
    out = dict(ALGORITHMS)
    for name, row in ALGORITHMS.items():
        out[f"{name} with all"] = dataclasses.replace(row, beta=0.1, entropy_coef=0.02, value_clip=0.2)
    out["rloo of batch deviation"] = dataclasses.replace(ALGORITHMS["rloo"], scale_rewards="batch", kl_target=0.01)
    out["reinforce of batch mean"] = dataclasses.replace(ALGORITHMS["reinforce"], baseline="batch_mean", gamma=0.9)
    out["grpo, bnpo, truncated masked"] = dataclasses.replace(ALGORITHMS["grpo"], loss_type="bnpo", truncated="mask")
    out["rloo, truncated fined"] = dataclasses.replace(ALGORITHMS["rloo"], truncated="penalize", truncation_penalty=0.5)
    corrected = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1.2}
    for mode in WORDS["vllm_importance_sampling_mode"]:
        out[f"rloo, {mode}"] = dataclasses.replace(
            ALGORITHMS["rloo"], vllm_importance_sampling_mode=mode, off_policy_mask_threshold=0.01, **corrected
        )
    for name in ("grpo", "reinforce_plus_plus", "ppo"):
        out[f"{name}, a third of the tokens"] = dataclasses.replace(ALGORITHMS[name], top_entropy_quantile=1 / 3)
    bonus = {"entropy_coef": 0.1, "top_entropy_quantile": 1 / 3}
    out["dr_grpo, a bonus on a third of the tokens"] = dataclasses.replace(ALGORITHMS["dr_grpo"], **bonus)
    out["normalised rollouts"] = dataclasses.replace(ALGORITHMS["reinforce"], normalize_advantages="rollouts")
    return out


def make(
    seed: int,
    *,
    prompts: int = 2,
    generations: int = 3,
    steps: int = 6,
    dtype: torch.dtype = torch.float64,
    reused: bool = False,
    unscored: bool = False,
) -> tuple[Rollouts, Linear]:
    """Rows of random lengths, some cut, some at the limit, one prompt with equal rewards."""
    g = torch.Generator().manual_seed(seed)
    num = prompts * generations

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    length_B = torch.randint(1, steps + 1, (num,), generator=g)
    at_BT = torch.arange(steps).expand(num, -1)
    mask_BT = at_BT < length_B.unsqueeze(1)
    last_BT = at_BT == length_B.unsqueeze(1) - 1
    cut_B = torch.rand(num, generator=g) < 0.3
    group_B = torch.arange(prompts).repeat_interleave(generations)
    reward_B = (torch.rand(num, generator=g) < 0.5).to(dtype)
    reward_B[group_B == prompts - 1] = 1.0  # a group that teaches nothing
    model = Linear(0.3 * normal(num, steps, 10), 0.3 * normal(num, steps, 10), 0.3 * normal(num, steps, 10))
    theta = torch.linspace(-0.5, 0.5, 10, dtype=dtype)
    present_BT = model.logp_BTK @ theta - 1.0
    sampled_BT = present_BT + (0.2 * normal(num, steps) if reused else 0)
    rollouts = Rollouts(
        mask_BT=mask_BT,
        logp_BT=sampled_BT,
        group_B=group_B,
        reward_BT=last_BT * reward_B.unsqueeze(1),
        discount_BT=(mask_BT & ~(last_BT & ~cut_B.unsqueeze(1))).to(dtype),
        cut_BT=last_BT & cut_B.unsqueeze(1),
        valid_B=torch.rand(num, generator=g) < (0.7 if unscored else 2.0),
        truncated_B=cut_B,
        greedy_B=(group_B % 2).to(dtype),
        entropy_BT=normal(num, steps).abs(),
        ref_logp_BT=present_BT + 0.5 * normal(num, steps),
        teacher_logp_BT=present_BT + 0.5 * torch.cos(7 * at_BT + 3 * torch.arange(num).unsqueeze(1)).to(dtype),
        value_BT=normal(num, steps),
        bootstrap_BT=normal(num, steps),
    )
    return rollouts, model


def weighed(algorithm: Algorithm, rollouts: Rollouts, reused: bool) -> Batch:
    batch = algorithm.compute_advantages(rollouts)
    return dataclasses.replace(batch, proximal_logp_BT=rollouts.logp_BT) if reused else batch


def on_two_ranks(work: Callable[[int, AllSum], T]) -> list[T]:
    """What `work(rank, all_sum)` returns on each of two ranks, threads here, whose `all_sum` adds the other's."""
    given: list[list[Tensor]] = [[], []]
    meet = threading.Barrier(2)

    def rank(i: int) -> T:
        def all_sum(x: Tensor) -> Tensor:
            given[i].append(x)
            meet.wait(timeout=10)
            total = given[0][len(given[i]) - 1] + given[1][len(given[i]) - 1]
            meet.wait(timeout=10)
            return total

        return work(i, all_sum)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def close(a: Tensor, b: Tensor, dtype: torch.dtype, unit: float = 1e-3) -> bool:
    """Equal to 1e-12 of the length in float64, to 3e-6 in float32; numbers under `unit` count as being that long."""
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    return float((a - b).norm()) <= bound * max(float(b.norm()), unit)
