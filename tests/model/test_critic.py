"""The learned critic of a text policy: what a value sees, what it costs, and what it must not touch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import ConfigError
from llm_pg.estimators.critics import explained_variance, length_adaptive_lambda
from llm_pg.learner.update import Updater
from llm_pg.metrics import read_metrics
from llm_pg.model.attention import core_of
from llm_pg.model.critic import Critic, with_values
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from tests.conftest import FAMILIES
from tests.faults.tiny_run import ROWS as ROWS_OF_TEXT
from tests.faults.tiny_run import make
from tests.model.test_policy import doubled, in_double, policy_of, rollouts
from tests.seams import Steps

ROWS = ("a2c", "ppo")


def cut_rollouts() -> TextRollouts:
    """The first three rows hit the length limit; one of them has a single token."""
    batch = rollouts()
    batch.mask_BT[1, 1:] = False
    batch.tokens_BT = None if batch.tokens_BT is None else batch.tokens_BT * batch.mask_BT
    assert batch.tokens_BT is not None
    rewards_B = batch.reward_BT.sum(1)
    again: TextRollouts = TextRollouts.of_scored_text(
        mask_BT=batch.mask_BT,
        logp_BT=batch.logp_BT * batch.mask_BT,
        group_B=batch.group_B,
        reward_B=rewards_B,
        truncated_B=torch.arange(6) < 3,
        tokens_BT=batch.tokens_BT,
        prompt_ids_B=batch.prompt_ids_B,
    )
    return again


def with_critic(model: Any, packing: str = "auto", *, random: bool = True, **options: Any) -> Policy:
    """A policy whose critic's head is random, so that every value and every gradient through it counts."""
    critic = Critic(model, **options)
    if random:
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in critic.head.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return policy_of(model, packing=packing, critic=critic)


def value_alone(policy: Policy, ids: list[int]) -> torch.Tensor:
    """V of the state after these tokens, by a forward pass of nothing else."""
    assert policy.critic is not None
    hidden = core_of(policy.model).base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return policy.critic.head(hidden.to(policy.critic.head[0].weight.dtype))[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_value_is_that_of_the_prompt_and_the_tokens_before(family: str, make_model: Callable[..., Any]) -> None:
    """Shifted by one place, every number here would be another."""
    batch = cut_rollouts()
    policy = with_critic(make_model(family))
    seen = policy.observe(batch, 4, with_logp=False, after=True)
    assert seen.value_BT is not None
    assert seen.after_B is not None
    for i, (prompt, done) in enumerate(zip(batch.prompt_ids_B, batch.completion_ids(), strict=True)):
        for t in range(len(done)):
            expected = value_alone(policy, [*prompt, *done[:t]])
            torch.testing.assert_close(seen.value_BT[i, t], expected, atol=2e-5, rtol=1e-4)
        after = value_alone(policy, [*prompt, *done]) if i < 3 else torch.tensor(0.0)
        torch.testing.assert_close(seen.after_B[i], after, atol=2e-5, rtol=1e-4)
    assert (seen.value_BT[~batch.mask_BT] == 0).all()
    assert (seen.logp_BT == 0).all()


def test_values_one_place_late_are_found(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Critic.values
    monkeypatch.setattr(Critic, "values", lambda self, hidden_M: original(self, hidden_M).roll(-1))
    with pytest.raises(AssertionError, match="not close"):
        test_each_value_is_that_of_the_prompt_and_the_tokens_before("llama", make_model)


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_a_value_does_not_see_the_token_that_is_chosen_in_its_state(
    packing: str, make_model: Callable[..., Any]
) -> None:
    batch = rollouts()
    row = int(batch.length_B.argmax())
    n = int(batch.length_B[row])
    other = dataclasses.replace(batch, tokens_BT=batch.tokens_BT.clone())  # type: ignore[union-attr]
    assert other.tokens_BT is not None
    other.tokens_BT[row, 2] = (other.tokens_BT[row, 2] + 1) % 90
    policy = with_critic(make_model(), packing)
    before, after = (policy.observe(b, 9, with_logp=False, after=False).value_BT for b in (batch, other))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before[row, :3], after[row, :3], rtol=0, atol=1e-6)
    assert ((before[row, 3:n] - after[row, 3:n]).abs() > 1e-4).all()


def test_the_values_are_the_same_packed_padded_and_in_any_pieces(make_model: Callable[..., Any]) -> None:
    """Log-probabilities of the same pass too, and both with the states after the last tokens among them or not."""
    batch, model = in_double(cut_rollouts()), doubled(make_model())
    whole = with_critic(model, "padded").observe(batch, 6, with_logp=True, after=True)
    assert whole.value_BT is not None
    torch.testing.assert_close(whole.logp_BT, policy_of(model).logp(batch, 6), rtol=1e-11, atol=1e-12)
    for packing in ("padded", "shared_prefix"):
        for micro_rows in (1, 2, 4, 6):
            policy = with_critic(model, packing)
            seen = policy.observe(batch, micro_rows, with_logp=True, after=True)
            without = policy.observe(batch, micro_rows, with_logp=False, after=False)
            for ours, theirs in (
                (seen.value_BT, whole.value_BT),
                (seen.after_B, whole.after_B),
                (seen.logp_BT, whole.logp_BT),
                (without.value_BT, whole.value_BT),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
            assert without.after_B is None


def gradients(
    policy: Policy, batch: TextRollouts, name: str, micro_rows: int, *, bootstrap: bool = True, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of policy and critic, in one step from the values to `.grad`."""
    algorithm = Algorithm(dataclasses.replace(ALGORITHMS[name], **changes))
    seen = policy.observe(batch, micro_rows, with_logp=False, after=bootstrap)
    assert seen.value_BT is not None
    assert policy.critic is not None
    weighted = algorithm.compute_advantages(with_values(batch, seen.value_BT, seen.after_B))
    optimizer = torch.optim.SGD([*policy.parameters(), *policy.critic.trainable()], lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    updater = Updater(policy, algorithm, optimizer, scheduler, micro_rows=micro_rows, max_grad_norm=0.0)
    updater.update(weighted, torch.arange(len(batch.mask_BT)).unsqueeze(0))
    parts = (policy.parameters(), policy.critic.trainable())
    own, critic = (torch.cat([p.grad.reshape(-1) for p in part if p.grad is not None]) for part in parts)
    return own.clone(), critic.clone()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "options", [{}, {"trunk_gradient": True}, {"kind": "model"}], ids=["head", "head and trunk", "model"]
)
def test_no_cut_and_no_layout_changes_the_gradient_of_policy_or_critic(
    name: str, options: dict[str, Any], make_model: Callable[..., Any]
) -> None:
    batch = in_double(cut_rollouts())
    own, critic = gradients(with_critic(doubled(make_model()), "padded", **options), batch, name, 6)
    assert critic.norm() > 1e-3
    for packing, micro_rows in (("padded", 1), ("padded", 4), ("shared_prefix", 6), ("shared_prefix", 2)):
        again = gradients(with_critic(doubled(make_model()), packing, **options), batch, name, micro_rows)
        for ours, whole in zip(again, (own, critic), strict=True):
            assert float((ours - whole).norm() / whole.norm()) < 1e-10


def test_the_heads_gradient_is_the_mean_error_times_what_its_last_layer_reads(make_model: Callable[..., Any]) -> None:
    """d/dw of vf_coef · mean ½(w·x - G)², summed by hand over states computed one by one; at λ = 1 G is the verdict."""
    batch, model = in_double(rollouts()), doubled(make_model())
    policy = with_critic(model)
    assert policy.critic is not None
    _, critic = gradients(policy, batch, "a2c", 6, bootstrap=False, vf_coef=0.3)
    expected = torch.zeros(32, dtype=torch.float64)
    reward_B = batch.reward_BT.sum(1)
    with torch.no_grad():
        for i, (prompt, done) in enumerate(zip(batch.prompt_ids_B, batch.completion_ids(), strict=True)):
            for t in range(len(done)):
                ids = torch.tensor([[*prompt, *done[:t]]])
                read = policy.critic.head[:2](model.base_model(input_ids=ids).last_hidden_state[0, -1])
                expected += read * (value_alone(policy, ids[0].tolist()) - reward_B[i])
    torch.testing.assert_close(critic[-33:-1], 0.3 * expected / batch.mask_BT.sum(), rtol=1e-9, atol=1e-12)


def test_the_value_loss_reaches_the_policy_only_where_it_is_asked_to(make_model: Callable[..., Any]) -> None:
    batch = in_double(rollouts())
    for options, same in (({}, True), ({"kind": "model"}, True), ({"trunk_gradient": True}, False)):
        small, large = (
            gradients(with_critic(doubled(make_model()), **options), batch, "a2c", 6, vf_coef=c)[0]
            for c in (0.1, 100.0)
        )
        assert torch.equal(small, large) == same


def test_the_first_advantages_are_the_plain_returns(make_model: Callable[..., Any]) -> None:
    batch, policy = rollouts(), with_critic(make_model(), random=False)
    seen = policy.observe(batch, 6, with_logp=False, after=False)
    assert seen.value_BT is not None
    weighted = Algorithm(ALGORITHMS["a2c"]).compute_advantages(with_values(batch, seen.value_BT))
    returns_B1 = batch.reward_BT.sum(1, keepdim=True)
    torch.testing.assert_close(weighted.advantage_BT, returns_B1 * batch.mask_BT)


def test_values_are_float32_under_bfloat16_weights_and_under_autocast(make_model: Callable[..., Any]) -> None:
    for model, autocast in (
        (make_model().to(torch.bfloat16), None),
        (make_model(), lambda: torch.autocast("cpu", torch.bfloat16)),
    ):
        policy = with_critic(model)
        policy.autocast = autocast or policy.autocast
        value_BT = policy.forward(rollouts()).value_BT
        assert value_BT is not None
        assert value_BT.dtype == torch.float32


def test_a_model_critic_is_a_copy_that_does_not_follow_the_policy(make_model: Callable[..., Any]) -> None:
    model, batch = make_model(), rollouts()
    policy = with_critic(model, kind="model")
    before = policy.observe(batch, 6, with_logp=False, after=False).value_BT
    shared = with_critic(model).observe(batch, 6, with_logp=False, after=False).value_BT
    torch.testing.assert_close(before, shared)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05)
    torch.testing.assert_close(policy.observe(batch, 6, with_logp=False, after=False).value_BT, before, rtol=0, atol=0)


def test_a_model_critic_of_an_adapted_policy_trains_an_adapter_of_its_own(make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    critic = Critic(model, kind="model")
    names = set(critic.weights())
    assert {n for n in names if "lora_" not in n} == {
        f"critic.head.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    assert sum("lora_" in n for n in names) == len([p for p in model.parameters() if p.requires_grad])
    assert not {id(p) for p in critic.trainable()} & {id(p) for p in model.parameters()}


# --- time: the limit, λ, explained variance


def three_steps() -> TextRollouts:
    """Row 0 was cut by the limit, row 1 ended; both have the verdict 7."""
    row: TextRollouts = TextRollouts.of_scored_text(
        mask_BT=torch.ones(2, 3, dtype=torch.bool),
        logp_BT=-torch.ones(2, 3, dtype=torch.float64),
        group_B=torch.zeros(2, dtype=torch.int64),
        reward_B=torch.tensor([7.0, 7.0]),
        truncated_B=torch.tensor([True, False]),
        gamma=0.9,
        tokens_BT=torch.ones(2, 3, dtype=torch.int64),
        prompt_ids_B=[(1,), (1,)],
    )
    return row


def test_a_cut_row_takes_the_value_after_its_last_token_in_the_place_of_its_verdict() -> None:
    """γ 0.9, λ 0.8, V = 1, 2, 3 and 5 behind: δ = 0.8, 0.7, 1.5 where it was cut, 0.8, 0.7, 4 where it ended."""
    value_BT = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64)
    after_B = torch.tensor([5.0, 99.0], dtype=torch.float64)
    row = dataclasses.replace(ALGORITHMS["a2c"], gamma=0.9, lam=0.8, truncated="bootstrap")
    weighted = Algorithm(row).compute_advantages(with_values(three_steps(), value_BT, after_B, gamma=0.9))
    cut = [0.8 + 0.72 * (0.7 + 0.72 * 1.5), 0.7 + 0.72 * 1.5, 1.5]
    ended = [0.8 + 0.72 * (0.7 + 0.72 * 4.0), 0.7 + 0.72 * 4.0, 4.0]
    torch.testing.assert_close(weighted.advantage_BT, torch.tensor([cut, ended], dtype=torch.float64))
    torch.testing.assert_close(weighted.value_target_BT, weighted.advantage_BT + value_BT)
    kept = Algorithm(dataclasses.replace(row, truncated="keep")).compute_advantages(
        with_values(three_steps(), value_BT)
    )
    torch.testing.assert_close(kept.advantage_BT, torch.tensor([ended, ended], dtype=torch.float64))


def test_the_critics_own_lambda_moves_its_targets_and_not_the_advantages() -> None:
    value_BT = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64)
    valued = with_values(three_steps(), value_BT)
    row = dataclasses.replace(ALGORITHMS["a2c"], gamma=0.9, lam=0.8)
    one = Algorithm(row).compute_advantages(valued)
    both = Algorithm(dataclasses.replace(row, lam_value=1.0)).compute_advantages(valued)
    torch.testing.assert_close(one.advantage_BT, both.advantage_BT, rtol=0, atol=0)
    returns = torch.tensor([[7 * 0.81, 7 * 0.9, 7.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(both.value_target_BT, returns)
    assert one.value_target_BT is not None
    assert (one.value_target_BT - returns).abs().max() > 0.1


def test_lambda_grows_with_the_length_of_a_row() -> None:
    """1 - 1/(0.05 l): 0 up to 20 tokens, 0.5 at 40, 0.99 at 2000."""
    lam_B = length_adaptive_lambda(torch.tensor([1, 20, 40, 2000]), 0.05)
    torch.testing.assert_close(lam_B, torch.tensor([0.0, 0.0, 0.5, 0.99], dtype=torch.float64))


def test_each_row_is_weighed_with_the_lambda_of_its_length_and_the_targets_keep_theirs() -> None:
    batch = in_double(rollouts())
    value_BT = torch.linspace(-1, 1, batch.mask_BT.numel(), dtype=torch.float64).view(batch.mask_BT.shape)
    valued = with_values(batch, value_BT * batch.mask_BT)
    base = dataclasses.replace(ALGORITHMS["a2c"], lam=1.0)
    adaptive = Algorithm(dataclasses.replace(base, lam_length_alpha=0.5)).compute_advantages(valued)
    torch.testing.assert_close(adaptive.value_target_BT, Algorithm(base).compute_advantages(valued).value_target_BT)
    for i, n in enumerate(batch.length_B.tolist()):
        fixed = Algorithm(dataclasses.replace(base, lam=max(0.0, 1 - 2 / n))).compute_advantages(valued)
        torch.testing.assert_close(adaptive.advantage_BT[i], fixed.advantage_BT[i])


def test_explained_variance_is_one_for_a_seer_zero_for_a_constant_and_adds_up_over_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    return_BT = torch.randn(6, 5, generator=g)
    value_BT = return_BT + torch.randn(6, 5, generator=g)
    mask_BT = torch.rand(6, 5, generator=g) > 0.3
    assert explained_variance(return_BT, return_BT, mask_BT) == pytest.approx(1.0)
    assert explained_variance(torch.full((6, 5), 3.0), return_BT, mask_BT) == pytest.approx(0.0)
    assert explained_variance(value_BT, torch.full((6, 5), 0.3), mask_BT) is None
    kept, error = return_BT[mask_BT], (return_BT - value_BT)[mask_BT]
    expected = 1 - float(error.var(unbiased=False) / kept.var(unbiased=False))
    assert explained_variance(value_BT, return_BT, mask_BT) == pytest.approx(expected, rel=1e-5)
    sums: list[torch.Tensor] = []
    for half in (slice(0, 3), slice(3, 6)):
        explained_variance(value_BT[half], return_BT[half], mask_BT[half], lambda x: (sums.append(x), x)[1])
    both = explained_variance(value_BT[:3], return_BT[:3], mask_BT[:3], lambda _: sums[0] + sums[1])
    assert both == pytest.approx(expected, rel=1e-5)


# --- whole runs


def run(
    tmp_path: Path, name: str, *, lora: bool = False, rows: Any = ROWS_OF_TEXT, reward: Any = None, **changes: Any
) -> Any:
    """A run of PPO: the trainer, its weights before the first step, and those after each."""
    changes = {"reward_in_process": True, "log_completions": 0, **changes}
    options = {"out": str(tmp_path), "name": name, "algorithm": "ppo", "lora": lora, "rows": rows, "changes": changes}
    trainer = make({**options, **({} if reward is None else {"reward": reward})})
    seen: list[dict[str, torch.Tensor]] = []

    def noted(_: int) -> None:
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        assert trainer.policy.critic is not None
        seen.append({**weights, **{n: p.detach().clone() for n, p in trainer.policy.critic.weights().items()}})

    trainer.add_callback(Steps(after=noted))
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, start, seen


@pytest.mark.parametrize(
    "changes", [{}, {"critic_trunk_gradient": True, "entropy_coef": 0.1}, {"critic_kind": "model"}, {"lora": True}]
)
def test_in_the_warm_up_the_critic_learns_and_the_policy_stays_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    schedule = {"critic_warmup_steps": 2, "max_steps": 4, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    trainer, start, seen = run(tmp_path, "warm", **schedule, **changes)
    for weights in seen[:2]:
        assert all(torch.equal(weights[n], p) for n, p in start.items())
        assert weights["critic.head.2.weight"].abs().max() > 0
    assert not torch.equal(seen[0]["critic.head.2.weight"], seen[1]["critic.head.2.weight"])
    assert any(not torch.equal(seen[2][n], p) for n, p in start.items())
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "warm" / "metrics.jsonl")]
    assert rates == pytest.approx([0.0, 0.0, 0.01, 0.005])
    assert trainer.optimizer.param_groups[-1]["lr"] == pytest.approx(0.02 if "critic_kind" in changes else 3e-3)


def test_the_saved_model_loads_without_its_critic_which_has_a_file_of_its_own(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path, "saved", max_steps=2)
    folder = tmp_path / "saved" / "model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(trainer.model.named_parameters())[name])
    kept = load_file(folder / "critic.safetensors")
    assert set(kept) == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    assert trainer.policy.critic is not None
    assert torch.equal(kept["head.2.weight"], trainer.policy.critic.head[2].weight.detach())


def for_letters_from_the_end(completion: str, answer: str) -> float:
    return float(answer == "z")


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_run_begins_with_the_critic_that_it_is_given(kind: str, tmp_path: Path) -> None:
    def of(name: str, **changes: Any) -> Any:
        settings = {"max_steps": 2, "reward_in_process": True, "critic_kind": kind, **changes}
        return make({"out": str(tmp_path), "name": name, "algorithm": "ppo", "changes": settings})

    first = of("first")
    first.train()
    second = of("second", critic_path=str(first.folder.model))
    begun: dict[str, torch.Tensor] = {}

    def seen(step: int) -> None:
        if step == 1:
            begun.update({name: p.detach().clone() for name, p in second.policy.critic.weights().items()})

    second.add_callback(Steps(before=seen))
    second.train()
    learned = load_file(first.folder.model / "critic.safetensors")
    assert begun.keys() == {f"critic.{name}" for name in learned}
    assert all(torch.equal(begun[f"critic.{name}"], value) for name, value in learned.items())
    with pytest.raises(ConfigError, match=r"critic_path: .* holds no critic\.safetensors"):
        of("third", critic_path=str(tmp_path)).train()
    with pytest.raises(ConfigError, match=r"critic_path: .* holds another critic"):
        of("fourth", critic_path=str(first.folder.model), critic_kind="model" if kind == "head" else "head").train()


def test_the_critic_comes_to_predict_what_the_prompt_decides(tmp_path: Path) -> None:
    """The verdict hangs on the prompt alone: 1 for the one kind, 0 for the other; 60 steps of the critic alone."""
    rows = [{"prompt": letter * n + "=", "answer": letter} for n in range(1, 11) for letter in "az"]
    changes = {"max_steps": 61, "critic_warmup_steps": 60, "critic_kind": "model", "critic_learning_rate": 1e-2}
    run(tmp_path, "predicts", rows=rows, reward=for_letters_from_the_end, **changes)
    lines = read_metrics(tmp_path / "predicts" / "metrics.jsonl")
    assert lines[0]["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    late = [line["explained_variance"] for line in lines[-10:] if "explained_variance" in line]
    assert len(late) > 5
    assert min(late) > 0.8
