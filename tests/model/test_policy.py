"""The policy's log-probabilities and its update: no layout, no cut and no dropped row changes the gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.distributions import entropy, token_logp
from llm_pg.learner.update import Updater
from llm_pg.model.layout import micro_batches
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from tests.conftest import FAMILIES


def rollouts(num_prompts: int = 3, group: int = 2, seed: int = 0) -> TextRollouts:
    """Random completions of random lengths (1..7) with distinct rewards."""
    g = torch.Generator().manual_seed(seed)
    rows = num_prompts * group
    length_B = torch.randint(1, 8, (rows,), generator=g)
    mask_BT = torch.arange(7) < length_B.unsqueeze(1)
    prompts = [tuple(torch.randint(3, 90, (2 + 3 * p,), generator=g).tolist()) for p in range(num_prompts)]
    return TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=-torch.rand(rows, 7, generator=g) * mask_BT,
        group_B=torch.arange(num_prompts).repeat_interleave(group),
        reward_B=torch.rand(rows, generator=g),
        tokens_BT=torch.randint(3, 90, (rows, 7), generator=g) * mask_BT,
        greedy_B=torch.rand(num_prompts, generator=g).repeat_interleave(group),
        prompt_ids_B=[prompts[i // group] for i in range(rows)],
    )


def policy_of(model: Any, params: SamplingParams | None = None, **options: Any) -> Policy:
    return Policy(model, params=params or SamplingParams(), pad_id=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=30, top_p=0.95)])
def test_logp_and_entropy_equal_those_of_each_row_alone(
    family: str, params: SamplingParams, make_model: Callable[..., Any]
) -> None:
    model, batch = make_model(family), rollouts()
    scores = policy_of(model, params).forward(batch)
    assert batch.tokens_BT is not None
    for i, prompt in enumerate(batch.prompt_ids_B):
        n = int(batch.length_B[i])
        done = batch.tokens_BT[i, :n]
        warped = params.warp(
            model(torch.tensor([[*prompt, *done.tolist()]])).logits[0, len(prompt) - 1 : -1], keep=done
        )
        torch.testing.assert_close(scores.logp_BT[i, :n], token_logp(warped, done), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropy_BT[i, :n], entropy(warped), atol=2e-5, rtol=1e-5)
        assert (scores.logp_BT[i, n:] == 0).all()


def gradient(
    model: Any,
    name: str,
    batch: TextRollouts,
    micro_rows: int,
    order: torch.Tensor | None = None,
    packing: str = "auto",
) -> torch.Tensor:
    """Gradient of one step, before any optimiser; rows optionally in another order."""
    policy = policy_of(model, packing=packing)
    row = dataclasses.replace(ALGORITHMS[name], beta=0.05 if ALGORITHMS[name].kl_placement == "loss" else 0.0)
    algorithm = Algorithm(row, 7)
    batch = dataclasses.replace(batch, ref_logp_BT=batch.logp_BT - 0.1, teacher_logp_BT=2 * batch.logp_BT)
    weighted = algorithm.compute_advantages(batch if order is None else batch.rows(order))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    updater = Updater(
        policy, algorithm, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer),
        micro_rows=micro_rows, max_grad_norm=0.0,
    )  # fmt: skip
    updater.update(weighted, torch.arange(len(weighted.mask_BT)).unsqueeze(0))
    return torch.cat([p.grad.reshape(-1) for p in policy.parameters() if p.grad is not None])


def in_double(batch: TextRollouts) -> TextRollouts:
    wide = {name: getattr(batch, name).double() for name in ("logp_BT", "reward_BT", "discount_BT")}
    return dataclasses.replace(batch, **wide)


def doubled(model: Any) -> Any:
    """The model in float64 throughout: transformers' RMSNorms round to float32 inside, torch's do not."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                eps = next(value for value in (getattr(child, k, None) for k in ("variance_epsilon", "eps")) if value)
                norm = torch.nn.RMSNorm(child.weight.shape, eps=eps)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


TEXT_ROWS = [name for name, row in ALGORITHMS.items() if not row.needs_critic]


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_micro_batches_row_order_and_padding_leave_the_gradient(name: str, make_model: Callable[..., Any]) -> None:
    model, batch = doubled(make_model("llama")), in_double(rollouts())
    whole = gradient(model, name, batch, 6)
    for micro_rows in (1, 2, 4):
        torch.testing.assert_close(gradient(model, name, batch, micro_rows), whole, rtol=1e-12, atol=1e-14)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(gradient(model, name, batch, 3, order), whole, rtol=1e-12, atol=1e-14)
    wider = batch.rows(torch.arange(6))
    for field in ("mask_BT", "logp_BT", "reward_BT", "discount_BT", "cut_BT", "tokens_BT"):
        setattr(wider, field, torch.nn.functional.pad(getattr(wider, field), (0, 5)))
    torch.testing.assert_close(gradient(model, name, wider, 6), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_packed_and_padded_rows_have_the_same_gradient(name: str, make_model: Callable[..., Any]) -> None:
    """Relative to its length 1e-6 in float32 and 1e-12 in float64, for one pass and for pieces."""
    for model, batch, most in (
        (make_model("llama"), rollouts(), 1e-6),
        (doubled(make_model("llama")), in_double(rollouts()), 1e-12),
    ):
        padded = gradient(model, name, batch, 6, packing="padded")
        for micro_rows in (6, 2):
            packed = gradient(model, name, batch, micro_rows, packing="shared_prefix")
            assert float((packed - padded).norm() / padded.norm()) < most


def test_the_micro_batches_hold_each_row_once_longest_first() -> None:
    lengths = torch.tensor([3, 9, 1, 9, 4])
    pieces = list(micro_batches(lengths, 2))
    flat = torch.cat(pieces)
    assert sorted(flat.tolist()) == [0, 1, 2, 3, 4]
    assert lengths[flat].tolist() == sorted(lengths.tolist(), reverse=True)


def test_rows_of_weight_zero_are_not_computed(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("llama"), rollouts()
    batch.reward_BT[:4] = 0.0  # the first two groups are uniform
    computed: list[int] = []
    original = Policy.forward

    def counted(self: Policy, rows: TextRollouts, **options: Any) -> Any:
        computed.append(len(rows.mask_BT))
        return original(self, rows, **options)

    monkeypatch.setattr(Policy, "forward", counted)
    gradient(model, "rloo", batch, 6)
    assert sum(computed) == 2


def test_the_reference_is_frozen_and_does_not_follow_the_policy(make_model: Callable[..., Any]) -> None:
    model, batch = make_model("llama"), rollouts()
    policy = policy_of(model, with_reference=True)
    before = policy.ref_logp(batch, 4)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05)
    torch.testing.assert_close(policy.ref_logp(batch, 4), before, rtol=0, atol=0)
    assert not torch.allclose(policy.logp(batch, 4), before)


@pytest.mark.parametrize("begins", ["as the model without it", "with weights of its own"])
def test_with_an_adapter_the_reference_is_the_policy_as_it_was(begins: str, make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    batch = rollouts()
    plain = policy_of(make_model("llama")).logp(batch, 4)
    none = begins == "as the model without it"
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=none))
    policy = policy_of(model, with_reference=True)
    assert policy.reference is None
    assert (policy.start is None) == none
    start = policy.logp(batch, 4)
    assert torch.allclose(start, plain, rtol=1e-6, atol=1e-6) == none
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05)
    torch.testing.assert_close(policy.ref_logp(batch, 4), start, rtol=0, atol=0)
    assert (policy.logp(batch, 4) - start).abs().max() > 1e-3


def test_a_reference_pass_leaves_the_frozen_part_of_an_adapter_frozen(make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    policy = policy_of(model, with_reference=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    policy.ref_logp(rollouts(), 4)
    assert policy.start is None
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_log_probabilities_are_float32_under_bfloat16_weights(make_model: Callable[..., Any]) -> None:
    policy = policy_of(make_model("llama").to(torch.bfloat16))
    assert policy.forward(rollouts()).logp_BT.dtype == torch.float32


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(make_model: Callable[..., Any]) -> None:
    model, batch = make_model("llama"), rollouts()
    policy, algorithm = policy_of(model), Algorithm(ALGORITHMS["rloo"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    updater = Updater(policy, algorithm, optimizer, scheduler, micro_rows=6)
    weighted = algorithm.compute_advantages(batch)
    weighted.advantage_BT[0, 0] = torch.nan
    before = [p.clone() for p in policy.parameters()]
    stats = updater.update(weighted, torch.arange(6).unsqueeze(0))
    assert not stats[0].stepped
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_reused_rollouts_keep_the_log_probabilities_of_sampling(make_model: Callable[..., Any]) -> None:
    """With two passes the second sees a ratio away from 1; its reference point is the policy before the first."""
    model, batch = make_model("llama"), rollouts()
    policy, algorithm = policy_of(model), Algorithm(ALGORITHMS["grpo"])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    updater = Updater(
        policy,
        algorithm,
        optimizer,
        scheduler,
        micro_rows=6,
        num_iterations=2,
        max_grad_norm=0.0,
    )
    start = policy.logp(batch, 6)
    weighted = algorithm.compute_advantages(batch)
    steps = updater.update(weighted, torch.arange(6).repeat(2, 1))
    torch.testing.assert_close(weighted.proximal_logp_BT, start)
    assert steps[0].values["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert steps[1].values["approx_kl"] > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_before_an_update_are_those_of_its_own_pass(family: str, make_model: Callable[..., Any]) -> None:
    policy, batch = policy_of(make_model(family)), rollouts()
    with torch.no_grad():
        expected = policy.forward(batch).entropy_BT
    assert float(expected.max()) > 1
    torch.testing.assert_close(policy.entropies(batch, 2), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_minibatches_are_steps_of_the_size_of_the_whole_batch(name: str, make_model: Callable[..., Any]) -> None:
    """The gradients of three minibatches at the same weights have the mean that one step on all rows has."""
    batch, found = rollouts(num_prompts=6), {}
    for number in (1, 3):
        policy, algorithm = policy_of(make_model("llama")), Algorithm(ALGORITHMS[name])
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        gradients: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(
            lambda *_, into=gradients, of=policy: into.append(torch.cat([p.grad.reshape(-1) for p in of.parameters()]))
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        updater = Updater(
            policy, algorithm, optimizer, scheduler,
            micro_rows=4, num_minibatches=number, max_grad_norm=0.0,
        )  # fmt: skip
        updater.update(algorithm.compute_advantages(batch), torch.tensor([[3, 0, 5, 1, 11, 4, 2, 8, 7, 6, 9, 10]]))
        assert len(gradients) == number
        found[number] = torch.stack(gradients).mean(0)
    assert float((found[3] - found[1]).norm() / found[1].norm()) < 1e-5
