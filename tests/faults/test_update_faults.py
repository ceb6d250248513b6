"""R12 and R14 at the update: a loss that is no number, and a micro-batch that does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.distributed.strategy import Strategy
from llm_pg.learner.update import Updater
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams

pytestmark = pytest.mark.faults
LENGTHS = [9, 7, 5, 3, 8, 2, 6, 4]


def rollouts() -> TextRollouts:
    g = torch.Generator().manual_seed(0)
    mask_BT = torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)
    return TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-torch.rand(8, 9, generator=g) * mask_BT,
        group_B=torch.arange(2).repeat_interleave(4),
        reward_B=torch.rand(8, generator=g),
        tokens_BT=torch.randint(3, 90, (8, 9), generator=g) * mask_BT,
        prompt_ids_B=[(5, 6, 7)] * 8,
    )


def updater_of(model: Any, micro_rows: int = 8, scaler: torch.amp.GradScaler | None = None) -> Updater:
    policy = Policy(model, params=SamplingParams(), pad_id=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    algorithm = Algorithm(ALGORITHMS["rloo"])
    strategy = Strategy("cpu", scaler)
    return Updater(policy, algorithm, optimizer, scheduler, strategy, micro_rows=micro_rows, max_grad_norm=0)


def gradients(updater: Updater) -> list[torch.Tensor]:
    """Of one update; the optimiser leaves them in place."""
    updater.update(updater.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))
    return [p.grad.clone() for p in updater.policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("room", [1, 3])
def test_a_batch_that_does_not_fit_is_cut_until_it_does_and_gives_the_same_gradient(
    where: str, room: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for `room` rows. In the backward pass it runs out after a part of the gradient is in place."""
    whole = gradients(updater_of(make_model("llama")))
    updater = updater_of(make_model("llama"))
    score, backward = updater.policy.forward, updater.strategy.backward
    rows: list[int] = []

    def counted(batch: TextRollouts, **options: Any) -> Any:
        rows.append(len(batch.prompt_ids_B))
        if where == "forward" and rows[-1] > room:
            raise torch.OutOfMemoryError("injected")
        return score(batch, **options)

    def poisoned(loss: torch.Tensor) -> None:
        backward(loss)
        if where == "backward" and rows[-1] > room:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(updater.policy, "forward", counted)
    monkeypatch.setattr(updater.strategy, "backward", poisoned)
    stats = updater.update(updater.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))[0]
    assert stats.stepped
    assert stats.splits == (3 if room == 1 else 2)
    assert rows[-1] <= room
    cut = [p.grad for p in updater.policy.parameters() if p.grad is not None]
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_log_probabilities_that_do_not_fit_are_computed_in_smaller_pieces(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(make_model("llama"), params=SamplingParams(), pad_id=0)
    whole_BT = policy.logp(rollouts(), micro_rows=8)
    hidden_states = policy.layout.hidden_states

    def small(model: Any, batch: TextRollouts, *rest: Any) -> Any:
        if len(batch.prompt_ids_B) > 2:
            raise torch.OutOfMemoryError("injected")
        return hidden_states(model, batch, *rest)

    monkeypatch.setattr(policy.layout, "hidden_states", small)
    torch.testing.assert_close(policy.logp(rollouts(), micro_rows=8), whole_BT, atol=1e-6, rtol=1e-5)


def test_one_row_that_does_not_fit_is_an_error(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    updater = updater_of(make_model("llama"))

    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(updater.policy, "forward", never)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        updater.update(updater.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))


@pytest.mark.parametrize("overflows", [False, True])
def test_under_a_loss_scaler_a_loss_that_is_no_number_moves_nothing_either(
    overflows: bool, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler sees gradients alone: it halves its scale where they overflowed, and steps where they did not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    hurt, clean = updater_of(make_model("llama"), scaler=scaler), updater_of(make_model("llama"))
    loss = hurt.algorithm.loss
    spoil = times_nan if overflows else plus_inf

    def spoilt(*given: Any, **named: Any) -> Any:
        value, stats = loss(*given, **named)
        return spoil(value), {**stats, "policy_loss": spoil(value).detach()}

    before = [p.detach().clone() for p in hurt.policy.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(hurt.algorithm, "loss", spoilt)
        stats = hurt.update(hurt.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))[0]
    assert not stats.stepped
    assert all(torch.equal(a, b) for a, b in zip(before, hurt.policy.parameters(), strict=True))
    assert scaler.get_scale() == (128.0 if overflows else 256.0)
    stats = hurt.update(hurt.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))[0]
    gradients(clean)
    assert stats.stepped
    for a, b in zip(hurt.policy.parameters(), clean.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def times_nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def plus_inf(loss: torch.Tensor) -> torch.Tensor:
    """The gradient stays finite: only the loss itself tells."""
    return loss + float("inf")


@pytest.mark.parametrize("spoil", [times_nan, plus_inf])
def test_a_loss_that_is_no_number_steps_nothing_and_the_next_step_is_as_without_it(
    spoil: Callable[[torch.Tensor], torch.Tensor], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, hurt = updater_of(make_model("llama")), updater_of(make_model("llama"))
    loss = hurt.algorithm.loss

    def spoilt(*given: Any, **named: Any) -> Any:
        value, stats = loss(*given, **named)
        return spoil(value), {**stats, "policy_loss": spoil(value).detach()}

    before = [p.detach().clone() for p in hurt.policy.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(hurt.algorithm, "loss", spoilt)
        stats = hurt.update(hurt.algorithm.compute_advantages(rollouts()), torch.arange(8).unsqueeze(0))[0]
    assert not stats.stepped
    assert stats.grad_norm != stats.grad_norm
    assert all(torch.equal(a, b) for a, b in zip(before, hurt.policy.parameters(), strict=True))
    gradients(clean)
    gradients(hurt)
    assert all(torch.equal(a, b) for a, b in zip(clean.policy.parameters(), hurt.policy.parameters(), strict=True))
