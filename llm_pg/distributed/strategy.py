"""How an update is spread over processes: what a learner, a policy and a checkpoint ask, answered for one process.

Every other strategy derives from `Strategy` and changes what differs; nothing outside this room asks which it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .tensors import like, whole

T = TypeVar("T")
CLIP_EPSILON = 1e-6  # beside the norm, where torch divides the limit by it


@dataclass(frozen=True)
class Outcome:
    """Of a step of the optimiser.

    Attributes:
        grad_norm: of the policy's gradient before clipping; NaN where the gradient or the loss is not finite.
        critic_grad_norm: of the critic's; None where there is no critic.
        stepped: False where something was not finite on any rank.
    """

    grad_norm: float
    critic_grad_norm: float | None
    stepped: bool


class Strategy:
    """One process: weights, gradients and moments are here, and there is nobody to exchange anything with.

    On several ranks every method is work of all together, unless it says otherwise.

    Args:
        device: that passes are computed on.
        scaler: a `torch.amp.GradScaler`, where float16 needs a loss scale.

    Attributes:
        num_ranks: processes of the run. rank: number of this one. is_main: whether it is the first, which writes.
        sharded: whether ranks hold parts of weights, gradients or moments. Then all make the same number of passes
            with a gradient, and all bring their parts where something is saved.
        shards_weights: whether ranks hold parts of the weights.
        optimizer: of torch, that `prepare` was given.
    """

    num_ranks, rank = 1, 0
    is_main = True
    sharded = False
    shards_weights = False

    def __init__(self, device: torch.device | str, scaler: Any = None) -> None:
        self.device, self.scaler = torch.device(device), scaler
        self.optimizer: Any = None
        self.max_grad_norm = 0.0

    @property
    def description(self) -> str:
        """What ranks hold parts of, for people to read; "" where each holds everything."""
        return ""

    # --- weights

    def place(self, model: Any) -> None:
        """Moves a model that was just loaded to where it is needed. Not a collective."""
        model.to(self.device)

    def shard(self, policy: Any) -> None:
        """Cuts the weights of policy, reference and critic; before an optimiser is made of them."""

    def gathered(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside the block every rank has the whole weights of `model`, to read."""
        return contextlib.nullcontext()

    def forward(self, model: Any, work: Callable[[], T]) -> T:
        """Returns what `work`, a pass with a gradient through any parts of `model`, returns: a tensor, or a dictionary
        of tensors."""
        return work()

    # --- messages

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks."""
        return x

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order."""
        return [value]

    # --- a step

    def prepare(self, policy: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Takes the optimiser of what is trained, and lets `policy` read its weights by this strategy from now on.

        max_grad_norm: 0 = no clipping.
        """
        policy.use(self)
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm

    def zero_grad(self) -> None:
        """Drops all gradients. Not a collective."""
        self.optimizer.zero_grad(set_to_none=True)

    def idle_passes(self, passes: int) -> int:
        """How many passes this rank must make beside its own `passes`, so that all make the same number."""
        return 0

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a sum over rows of this rank."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(
        self,
        own: Sequence[torch.nn.Parameter],
        critic: Sequence[torch.nn.Parameter] | None,
        *,
        has_rows: bool,
        is_finite: bool,
        spoil: Callable[[], None],
    ) -> Outcome:
        """Sums gradients over ranks, clips them and makes a step.

        Args:
            own, critic: what is to move of the policy and of its critic; None = there is none.
            has_rows: whether a row of any rank has a gradient. Without one there is no gradient: zeros would let the
                moments move the weights.
            is_finite: whether the loss is a number on every rank; a NaN in it can have a gradient that is finite.
            spoil: makes a pass whose gradient is NaN, so that a step that others decide on is dropped.
        """
        if has_rows:
            self._sum_gradients([*own, *(critic or ())])
        norm, critic_norm = self._clip(own, critic)
        if not is_finite:
            norm = math.nan
        stepped = math.isfinite(norm + (critic_norm or 0.0))
        if self.scaler is None:
            if stepped:
                self.optimizer.step()
        elif _with_gradient(own) or _with_gradient(critic or ()):
            # A loss scaler looks at gradients alone, so a NaN of the loss is not left to it. It lowers its scale where
            # they overflowed; where no row had a weight there are none that it could have looked at.
            if stepped:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        return Outcome(norm, critic_norm, stepped)

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Makes each gradient the sum over ranks: with global denominators that is the gradient of the whole batch."""

    def _clip(
        self, own: Sequence[torch.nn.Parameter], critic: Sequence[torch.nn.Parameter] | None
    ) -> tuple[float, float | None]:
        """Gradient norms before clipping, of policy and critic; each is held to the limit on its own, so that a large
        error of the critic does not shorten the policy's step."""
        limit = self.max_grad_norm or math.inf
        moved, valued = _with_gradient(own), _with_gradient(critic or ())
        if self.scaler is not None and (moved or valued):
            self.scaler.unscale_(self.optimizer)
        parts = [part for part in (moved, valued) if part]
        totals = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
        norms = torch.stack([whole(total).double() for total in totals]).tolist() if parts else []
        for part, total, norm in zip(parts, totals, norms, strict=True):
            if not norm + CLIP_EPSILON <= limit:  # else the factor is 1, and a pass over all gradients for nothing
                torch.nn.utils.clip_grads_with_norm_(part, limit, total)
        norm = norms.pop(0) if moved else 0.0
        return norm, None if critic is None else norms.pop() if valued else 0.0

    def close(self) -> None:
        """Ends what has process groups of its own, at the end of a run."""

    # --- what is saved

    def state_dict(self, model: Any, names: Collection[str] | None = None) -> dict[str, Tensor] | None:
        """The whole weights of a model to save, on the first rank; None = those that it holds itself.

        names: of weights and buffers; None = all.
        """
        return None

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in one piece, for the first rank to save."""
        return dict(tensors)

    def moments(self, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """The optimiser's state in one piece, for the first rank to save: '<name of the weight>.<name of the moment>'.

        Not by the optimiser's own numbers, which count along its groups: weight decay on or off makes others of them.
        """
        return _apart(
            self.collect(
                {
                    f"{name}.{moment}": _as_tensor(value)
                    for name, parameter in weights.items()
                    for moment, value in self.optimizer.state.get(parameter, {}).items()
                    if value is not None
                }
            )
        )

    def restore(self, weights: Mapping[str, torch.nn.Parameter], moments: Mapping[str, Tensor]) -> None:
        """Puts `moments`, as saved, back, after the weights themselves."""
        name_of = {parameter: name for name, parameter in weights.items()}
        order = [name_of[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, moment = key.rsplit(".", 1)
            state.setdefault(order.index(name), {})[moment] = _as_held(value, weights[name])
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a copy of each that is in the memory of an earlier one, which no file of safetensors can hold.

    All weights share one table of 8-bit numbers in bitsandbytes' optimisers.
    """
    seen: set[int] = set()
    out = {}
    for name, x in tensors.items():
        place = x.untyped_storage()._cdata  # of the memory itself, also where a tensor has no address
        out[name] = x.clone() if place in seen else x
        seen.add(place)
    return out


def _as_tensor(value: Any) -> Tensor:
    """A tensor as it is; a number of Python's in 64 bits, by which `_as_held` knows it again."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _as_held(value: Tensor, parameter: Tensor) -> Any:
    if value.dim():
        return like(value, parameter)
    return value.item() if value.dtype in (torch.float64, torch.int64) else value


def _with_gradient(parameters: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [p for p in parameters if p.grad is not None]
