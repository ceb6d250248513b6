"""The learned critic of a text policy: V(s_t), a number for each state in which a token is chosen.

The state s_t is prompt and tokens before t. Its value is read off the hidden state that predicts token t, so that it
cannot see the token. It is float32 or wider under any mixed precision, and 0 at first: the first advantages are then
plain returns.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distributed.tensors import collect, like
from ..rollouts import TextRollouts, is_last
from ..words import one_of
from .attention import body_of, core_of

HEAD_LEARNING_RATE = 3e-3
CRITIC_FILE = "critic.safetensors"


class Critic(torch.nn.Module):
    """A head on hidden states: the policy's (`head`), or those of a copy of the policy's body (`model`).

    The head has one hidden layer as wide as the states: those serve the next token and do not move for the critic, so a
    linear reading of them predicts little (of the quickstart's returns half as much).

    Args:
        model: the policy, a transformers model or a PEFT model; a copy trains what the policy trains, hence only its
            adapter where there is one.
        kind: head or model.
        trunk_gradient: whether the value loss reaches the policy's body (kind head).

    Raises:
        ValueError: the model shows no hidden states of its own; a kind that is not known.
    """

    def __init__(self, model: Any, *, kind: str = "head", trunk_gradient: bool = False) -> None:
        super().__init__()
        one_of("critic_kind", kind, ("head", "model"))
        core = core_of(model)
        if body_of(core) is core:
            raise ValueError(
                f"{type(core).__name__} has no body apart from its output layer, so a critic finds no hidden states to "
                "read. Use an algorithm without a critic: rloo, grpo or reinforce."
            )
        self.kind, self.trunk_gradient = kind, trunk_gradient
        self.body = _body_of(model) if kind == "model" else None
        weight: Tensor = next(body_of(core).parameters())
        width = core.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same on every rank, and no draw from the run's own stream
            head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 1))
        for p in head[2].parameters():
            torch.nn.init.zeros_(p)
        self.head = head.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def values(self, hidden_M: Tensor) -> Tensor:
        """V of each hidden state (M, hidden): (M,), float32 or wider."""
        if self.kind == "head" and not self.trunk_gradient:
            hidden_M = hidden_M.detach()
        with torch.autocast(hidden_M.device.type, enabled=False):
            value: Tensor = self.head(hidden_M.to(next(self.head.parameters()).dtype)).squeeze(-1)
        return value

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the names that checkpoints use."""
        return {f"critic.{name}": p for name, p in self.named_parameters() if p.requires_grad}

    def collected(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Returns what is trained, in one piece; every rank must call it where weights are in shards. keep: False on
        ranks that only bring theirs, which get nothing."""
        return collect({name: p for name, p in self.named_parameters() if p.requires_grad}, keep)

    def save(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
        """Writes the trained weights to `critic.safetensors`, beside the model's own files.

        weights: of `collected`; None = they are not in shards.
        """
        path = Path(folder) / CRITIC_FILE
        own = {name: x.contiguous().clone() for name, x in (self.collected() if weights is None else weights).items()}
        save_file(own, path, metadata={"kind": self.kind})  # one key: several are written in any order
        return path

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote there. ValueError where they are not there, or of another critic."""
        path = Path(folder) / CRITIC_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {CRITIC_FILE}: a2c and ppo leave it beside the model, in model/.")
        saved, own = load_file(path), {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        odd = sorted(saved.keys() ^ own.keys()) or [name for name, shape in own.items() if saved[name].shape != shape]
        if odd:
            raise ValueError(
                f"{path} holds another critic: {len(odd)} of its weights differ in name or shape, {odd[0]} first. Give "
                "the model, the adapter and the critic_kind that it was trained with."
            )
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(like(saved[name], parameter))


def _body_of(model: Any) -> Any:
    """A copy of the model without its output layer."""
    body = copy.deepcopy(model)
    core_of(body).set_output_embeddings(torch.nn.Identity())
    return body


def with_values(
    rollouts: TextRollouts, value_BT: Tensor, after_B: Tensor | None = None, *, gamma: float = 1.0
) -> TextRollouts:
    """The rollouts as the critic sees them.

    Args:
        value_BT: V(s_t). after_B: value of the state after the last token, read where the row was cut by the length
            limit: there it takes the place of the verdict, which was given on an unfinished text. None = the limit
            ends the episode. gamma: discount per token.
    """
    if after_B is None:
        return rollouts.changed(value_BT=value_BT)  # type: ignore[no-any-return]
    cut_BT = is_last(rollouts.mask_BT) & rollouts.truncated_B.unsqueeze(1)
    return rollouts.changed(  # type: ignore[no-any-return]
        value_BT=value_BT,
        bootstrap_BT=torch.where(cut_BT, after_B.unsqueeze(1), torch.zeros_like(value_BT)),
        cut_BT=rollouts.cut_BT | cut_BT,
        discount_BT=rollouts.discount_BT.masked_fill(cut_BT, gamma),
        reward_BT=rollouts.reward_BT.masked_fill(cut_BT, 0.0),
    )
