"""What is subtracted from a return, and what it is divided by; `algorithms.advantages` makes advantages of them.

Groups: `group_B` holds a group's number for each rollout (0..P-1); the rollouts of one group answer the same prompt
(or start in the same state). `valid_B` is False for rollouts that could not be scored: they enter no mean and get 0.

Sums that must span all ranks go through `all_sum` (identity on one rank). Groups never straddle ranks.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
STD_EPS = 1e-4  # added to every deviation before dividing, as GRPO's reference implementations do


def _identity(x: Tensor) -> Tensor:
    return x


def _place_of_group(group_B: Tensor) -> Tensor:
    """The groups numbered from 0 without gaps, so that there is room for each among as many as there are rollouts: how
    many groups there are the host need not ask the device."""
    ordered, order = group_B.sort(stable=True)
    is_new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).to(group_B.dtype)])
    return torch.empty_like(group_B).scatter(0, order, is_new.cumsum(0))


def group_sums(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the valid entries of each rollout's group, both shaped as `x_B`.

    Args:
        x_B: one number for each rollout (B,), or for each step (B, T). For steps, each is summed with the same step of
            the others.
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    place_B, valid = _place_of_group(group_B), valid_B.reshape(-1, *[1] * (x_B.dim() - 1)).expand_as(x_B)
    empty_P = torch.zeros_like(x_B)
    sum_P = empty_P.index_add(0, place_B, torch.where(valid, x_B, torch.zeros_like(x_B)))
    num_P = empty_P.index_add(0, place_B, valid.to(x_B.dtype))
    return sum_P[place_B], num_P[place_B]


def origin_of_group(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """The least valid entry of each rollout's group, shaped as `x_B`.

    Sums are taken of the distance from it, so that a group of equal rewards has advantage 0 to the last bit: 0.7 is
    not (0.7 + 0.7 + 0.7) / 3 in floating point, and dividing by a deviation of 1e-4 would make a signal of the rest.

    Args:
        x_B: one number for each rollout (B,), or for each step (B, T).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    valid = valid_B.reshape(-1, *[1] * (x_B.dim() - 1)).expand_as(x_B)
    place_B = _place_of_group(group_B)
    index = place_B.reshape(-1, *[1] * (x_B.dim() - 1)).expand_as(x_B)
    least_P = torch.full_like(x_B, torch.inf)
    least_P = least_P.scatter_reduce(0, index, torch.where(valid, x_B, torch.inf), "amin")
    return torch.where(least_P == torch.inf, torch.zeros_like(least_P), least_P)[place_B]


def group_mean(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Mean of the rollout's group, itself included.

    Bias: the expected update is (G-1)/G of the gradient: the right direction, shrunk.

    Args:
        x_B: one number for each rollout (B,), or for each step (B, T).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300).
    """
    origin_B = origin_of_group(x_B, group_B, valid_B)
    sum_B, num_B = group_sums(x_B - origin_B, group_B, valid_B)
    return origin_B + sum_B / num_B.clamp(min=1)


def length_weighted_mean(x_B: Tensor, length_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Mean of the rollout's group, itself included, each weighted by its length: Σ lᵢ Rᵢ / Σ lᵢ.

    The constant baseline of least variance is E[|∇log π|² R] / E[|∇log π|²], and a completion's squared score grows
    about as its number of tokens.

    Bias: it contains the rollout that it is compared with, and its weight depends on that rollout's length, so the
    expected update is shrunk and turned (`llm-pg prove`); both go as 1/G.
    Source: OPO, Hao et al. 2025 (arXiv 2505.23585).

    Args:
        x_B: one number for each rollout (B,).
        length_B: steps inside the mask (B,), > 0 for valid rollouts.
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    origin_B = origin_of_group(x_B, group_B, valid_B)
    weight_B = length_B.to(x_B.dtype)
    sum_B, _ = group_sums(weight_B * (x_B - origin_B), group_B, valid_B)
    total_B, _ = group_sums(weight_B, group_B, valid_B)
    return origin_B + sum_B / total_B.clamp(min=1)


def leave_one_out(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Mean of the *other* valid rollouts of the group.

    Bias: none, since the baseline of a rollout does not depend on its own actions. A rollout with no valid other
    gets itself as baseline, that is advantage 0: there is nothing to compare it with.

    Args:
        x_B: one number for each rollout (B,), or for each step (B, T).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.

    Source: Kool et al. 2019; RLOO, Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    origin_B = origin_of_group(x_B, group_B, valid_B)
    sum_B, num_B = group_sums(x_B - origin_B, group_B, valid_B)
    others_B = origin_B + (sum_B - (x_B - origin_B)) / (num_B - 1).clamp(min=1)
    return torch.where(num_B > 1, others_B, x_B)


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two of each positive number, half of it to all of it; 1 for 0.

    A deviation is computed in this unit: squares of numbers from 1e19 on overflow float32, and a deviation of inf makes
    every advantage 0. To divide by a power of two changes no digit.
    """
    mantissa, _ = torch.frexp(size)
    return torch.where(size > 0, size / mantissa, torch.ones_like(size))


def _squares(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances from the group's mean in the group's unit, the sum of their squares, their number, and the unit."""
    distance_B = x_B - group_mean(x_B, group_B, valid_B)
    _, num_B = group_sums(x_B, group_B, valid_B)
    size_B, _ = group_sums(distance_B.abs() / num_B.clamp(min=1), group_B, valid_B)
    unit_B = _power_of_two(size_B)
    scaled_B = distance_B / unit_B
    square_B, _ = group_sums(scaled_B**2, group_B, valid_B)
    return scaled_B, square_B, num_B, unit_B


def group_std(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Sample standard deviation (divisor n-1) of the rollout's group; 0 for a group of one.

    Dividing by it reweights prompts: the rarer success is, the larger the step (about 1/sqrt(p(1-p)) for 0/1
    rewards), and the more so the larger the group.

    Args:
        x_B: one number for each rollout (B,), or for each step (B, T).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    _, square_B, num_B, unit_B = _squares(x_B, group_B, valid_B)
    return unit_B * (square_B / (num_B - 1).clamp(min=1)).sqrt()


def sum_of_normalised(part_B: Tensor, weight_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Each reward function's scores less their mean and over their deviation in the group, then the weighted sum.

    A function of small range or small variance then counts as much as one of large.

    Bias: as dividing by a group's deviation, for each function by its own.
    Source: GDPO, 2026 (arXiv 2601.05242).

    Args:
        part_B: score of each function (B, F); NaN = it gave none, which is left out of its mean and counts as its mean.
        weight_B: weight of each (B, F).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    normal = []
    for x_B in part_B.unbind(1):
        given_B = valid_B & ~x_B.isnan()
        x_B = torch.where(given_B, x_B, torch.zeros_like(x_B))
        z_B = (x_B - group_mean(x_B, group_B, given_B)) / (group_std(x_B, group_B, given_B) + STD_EPS)
        normal.append(torch.where(given_B, z_B, torch.zeros_like(z_B)))
    return (torch.stack(normal, 1) * weight_B).sum(1)


def leave_one_out_std(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Sample standard deviation of the *other* valid rollouts of the group; 0 with fewer than two others.

    It does not depend on the rollout's own actions, so dividing by it reweights prompts and turns no advantage of a
    prompt against another of the same.

    Args:
        x_B: one number for each rollout (B,).
        group_B: int64 (B,), the number of each rollout's group, 0 to P-1.
        valid_B: bool (B,); False for rollouts without a score.
    """
    scaled_B, square_B, num_B, unit_B = _squares(x_B, group_B, valid_B)
    # Of n numbers about their mean, without one at distance d: Σ of the others about their own = Σ - d² n/(n - 1).
    rest_B = square_B - scaled_B**2 * num_B / (num_B - 1).clamp(min=1)
    rest_B = torch.where(rest_B > 1e-6 * square_B, rest_B, torch.zeros_like(rest_B))  # equal others, but for rounding
    return unit_B * (rest_B / (num_B - 2).clamp(min=1)).sqrt()


def batch_mean(x_B: Tensor, valid_B: Tensor, all_sum: AllSum = _identity) -> Tensor:
    """Mean over all valid rollouts of all ranks, a scalar. Bias: shrinks the gradient by (N-1)/N.

    The mean of what is left over is added to a first mean, so that equal numbers have deviation 0 to the last bit:
    see `origin_of_group`, whose least entry ranks could not agree on by sums.

    Args:
        x_B: one number for each rollout of this rank (B,).
        valid_B: bool (B,); False for rollouts without a score.
        all_sum: sums a tensor over all ranks; the identity on one rank.
    """
    return _mean_of_all(x_B, valid_B, all_sum)[0]


def batch_std(x_B: Tensor, valid_B: Tensor, all_sum: AllSum = _identity) -> Tensor:
    """Sample standard deviation over all valid rollouts of all ranks, a scalar; 0 for a batch of one.

    Args:
        x_B: one number for each rollout of this rank (B,).
        valid_B: bool (B,); False for rollouts without a score.
        all_sum: sums a tensor over all ranks; the identity on one rank.
    """
    return batch_mean_and_std(x_B, valid_B, all_sum)[1]


def batch_mean_and_std(x_B: Tensor, valid_B: Tensor, all_sum: AllSum = _identity) -> tuple[Tensor, Tensor]:
    """`batch_mean` and `batch_std`, in three exchanges of the ranks.

    Args:
        x_B: one number for each rollout of this rank (B,).
        valid_B: bool (B,); False for rollouts without a score.
        all_sum: sums a tensor over all ranks; the identity on one rank.
    """
    mean, num, size = _mean_of_all(x_B, valid_B, all_sum)
    unit = _power_of_two(size)
    centred_B = torch.where(valid_B, x_B - mean, torch.zeros_like(x_B))
    square = all_sum(((centred_B / unit) ** 2).sum())
    return mean, unit * (square / (num - 1).clamp(min=1)).sqrt()


def _mean_of_all(x_B: Tensor, valid_B: Tensor, all_sum: AllSum) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, number and mean distance from the first mean, of the valid ones."""
    nothing_B = torch.zeros_like(x_B)
    total = all_sum(torch.stack([torch.where(valid_B, x_B, nothing_B).sum(), valid_B.sum().to(x_B.dtype)]))
    num = total[1].clamp(min=1)
    first = total[0] / num
    left_B = torch.where(valid_B, x_B - first, nothing_B)
    left, size = all_sum(torch.stack([left_B.sum(), (left_B.abs() / num).sum()])).unbind()
    return first + left / num, total[1], size


class RunningMean:
    """Mean of the returns of earlier batches, an exponential average corrected for its start.

    Bias: none, because a batch is compared with a number fixed before it was sampled. The first batch has baseline 0.

    Args:
        decay: weight of the past in [0, 1); 0.9 remembers about ten batches.

    Source: Williams 1992 (reinforcement comparison).
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.sum = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float:
        return self.sum / self.weight if self.weight else 0.0

    def update(self, mean: float | Tensor, num_rows: float | Tensor = 1) -> None:
        """Take in the mean return of a batch; of one without a scored row nothing: its mean is no return.

        Args:
            mean: mean return of the batch.
            num_rows: rollouts of the batch that have a score; 0 = the batch changes nothing.
        """
        if isinstance(mean, Tensor) and isinstance(num_rows, Tensor):
            mean, num_rows = torch.stack([mean, num_rows]).tolist()  # the device is waited for once
        if not float(num_rows):
            return
        self.sum = self.decay * self.sum + (1 - self.decay) * float(mean)
        self.weight = self.decay * self.weight + (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        return {"sum": self.sum, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.sum, self.weight = float(state["sum"]), float(state["weight"])


class RunningMeans:
    """A running mean for each role of the rollouts, as `RunningMean` is one for all.

    Roles are numbers below `NUM_ROLES`, hashes of what names a role (`role_of`), so that all ranks agree on them
    whatever their own rollouts hold. Two roles with one hash would share a mean, which is still no bias.

    Bias: none, as `RunningMean`. SPIRAL updates a role's mean before it subtracts it, which takes (1 - decay)/n off the
    gradient, n the role's rollouts in the batch.

    Args:
        decay: weight of the past in [0, 1).

    Source: role-conditioned advantage estimation, SPIRAL, Liu et al. 2025 (arXiv 2506.24119).
    """

    NUM_ROLES = 2**16

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.sum_R = torch.zeros(self.NUM_ROLES, dtype=torch.float64)
        self.weight_R = torch.zeros(self.NUM_ROLES, dtype=torch.float64)

    @staticmethod
    def role_of(value: object) -> int:
        """Returns the number of the role that a value of the data names: the same in every process.

        Args:
            value: a text, a number, ...; its `repr` counts.
        """
        return zlib.crc32(repr(value).encode()) % RunningMeans.NUM_ROLES

    def value_B(self, role_B: Tensor) -> Tensor:
        """Returns the mean of each rollout's role, float64; 0 for a role that was not met before.

        Args:
            role_B: int64 (B,), see `role_of`.
        """
        value_R = self.sum_R / torch.where(self.weight_R > 0, self.weight_R, torch.ones_like(self.weight_R))
        return value_R.to(role_B.device)[role_B]

    def update(self, return_B: Tensor, role_B: Tensor, valid_B: Tensor, all_sum: AllSum = _identity) -> None:
        """Takes in the mean return of each role of a batch.

        Args:
            return_B: returns (B,).
            role_B: int64 (B,), see `role_of`.
            valid_B: bool (B,); False for rollouts without a score.
            all_sum: sums a tensor over all ranks; the identity on one rank.
        """
        seen = torch.stack([torch.where(valid_B, return_B, torch.zeros_like(return_B)), valid_B.to(return_B.dtype)])
        total, num = all_sum(seen.new_zeros(2, self.NUM_ROLES).index_add(1, role_B, seen)).double().cpu().unbind()
        met = num > 0
        mean = total / num.clamp(min=1)
        self.sum_R = torch.where(met, self.decay * self.sum_R + (1 - self.decay) * mean, self.sum_R)
        self.weight_R = torch.where(met, self.decay * self.weight_R + (1 - self.decay), self.weight_R)

    def state_dict(self) -> dict[str, list[float]]:
        roles = self.weight_R.nonzero().squeeze(1)
        return {"role": roles.tolist(), "sum": self.sum_R[roles].tolist(), "weight": self.weight_R[roles].tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        roles = torch.tensor(state["role"], dtype=torch.int64)
        self.sum_R, self.weight_R = torch.zeros_like(self.sum_R), torch.zeros_like(self.weight_R)
        self.sum_R[roles] = torch.tensor(state["sum"], dtype=torch.float64)
        self.weight_R[roles] = torch.tensor(state["weight"], dtype=torch.float64)
