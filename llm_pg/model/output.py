"""What a pass of the policy computes, and what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PolicyOutput:
    """Of the sampled tokens under some weights: logp_BT and entropy_BT (nats, float32; 0 outside the mask).

    With a critic, value_BT: V(s_t), 0 outside the mask; after_B: the value after the last token of truncated rows,
    where it was asked for, and 0 for the others. With experts, balance: the pass's part of the batch's load-balancing
    loss, without its coefficient.
    """

    logp_BT: Tensor
    entropy_BT: Tensor
    value_BT: Tensor | None = None
    after_B: Tensor | None = None
    balance: Tensor | None = None

    def put(self, part: PolicyOutput, index: Tensor) -> None:
        """Takes the numbers of the rows at `index`, where both have them."""
        for name in ("logp_BT", "entropy_BT", "value_BT", "after_B"):
            whole, rows = getattr(self, name), getattr(part, name)
            if whole is not None and rows is not None:
                whole[index] = rows.to(whole.dtype)


@dataclass(frozen=True)
class OutputFlags:
    """What a pass computes beside hidden states: log-probabilities, entropies (with a gradient), the critic's values,
    those after the last tokens of truncated rows, the part of the load-balancing loss; frozen: no gradient reaches the
    policy."""

    logp: bool = True
    entropy: bool = False
    entropy_grad: bool = False
    value: bool = False
    after: bool = False
    balance: bool = False
    frozen: bool = False
