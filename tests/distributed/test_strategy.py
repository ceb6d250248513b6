"""A strategy of one's own stands where the package's stand."""

from collections.abc import Callable
from typing import Any

import torch

from llm_pg import Algorithm, Learner, Policy
from llm_pg.distributed.strategy import Outcome, Strategy
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts


class Watched(Strategy):
    """Counts what it is asked for."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.passes, self.norms = 0, []  # type: ignore[var-annotated]

    def backward(self, loss: torch.Tensor) -> None:
        self.passes += 1
        super().backward(loss)

    def step(self, *given: Any, **named: Any) -> Outcome:
        done = super().step(*given, **named)
        self.norms.append(done.grad_norm)
        return done


class Scored:
    rollouts = rollouts(num_prompts=4, group=3)


def test_a_strategy_of_ones_own_sees_every_pass_and_step_and_changes_no_bit(make_model: Callable[..., Any]) -> None:
    ends = []
    for strategy in (None, Watched("cpu")):
        policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0, packing="padded")
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        learner = Learner(policy, Algorithm("grpo"), optimizer, strategy=strategy, micro_rows=6, num_iterations=2)
        update = learner.update(Scored())
        ends.append([p.detach().clone() for p in policy.parameters()])
    assert isinstance(strategy, Watched)
    assert policy.strategy is strategy
    assert strategy.passes == 4
    assert strategy.norms == [step.grad_norm for step in update.steps]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
