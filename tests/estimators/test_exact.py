"""The enumerable policy: its sums are checked by counting, by differences and by dynamic programming."""

import pytest
import torch

from llm_pg.estimators.exact import (
    TabularPolicy,
    completion_entropy,
    enumerate_completions,
    kl,
    num_completions,
    objective,
    state_values,
    step_values,
    terminal_reward,
)


def _difference(function, policy: TabularPolicy, step: float = 1e-6) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Gradient by central differences."""
    flat = policy.logits_PNV.reshape(-1)
    out = torch.zeros_like(flat)
    for i in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            ends.append(function(policy.with_logits(moved.reshape(policy.logits_PNV.shape))).value)
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out.reshape(policy.logits_PNV.shape)


@pytest.mark.parametrize(("vocab_size", "horizon", "expected"), [(3, 3, 15), (3, 2, 7), (2, 4, 5), (5, 4, 341)])
def test_completions_are_counted_once_each(vocab_size: int, horizon: int, expected: int) -> None:
    c = enumerate_completions(vocab_size, horizon)
    rows = {tuple(row[mask].tolist()) for row, mask in zip(c.tokens_ST, c.mask_ST, strict=True)}
    assert len(rows) == c.num_completions == num_completions(vocab_size, horizon) == expected


def test_a_completion_ends_at_its_first_eos_or_at_the_horizon() -> None:
    c = enumerate_completions(4, 3)
    for tokens, mask, truncated in zip(c.tokens_ST, c.mask_ST, c.truncated_S, strict=True):
        inside = tokens[mask].tolist()
        assert inside.count(c.eos) == (0 if truncated else 1)
        assert truncated or inside[-1] == c.eos
        assert not truncated or len(inside) == 3


def test_two_tokens_share_a_prefix_exactly_if_what_came_before_is_the_same() -> None:
    c = enumerate_completions(3, 3)
    for s in range(c.num_completions):
        for r in range(c.num_completions):
            for t in range(3):
                if c.mask_ST[s, t] and c.mask_ST[r, t]:
                    same = c.tokens_ST[s, :t].tolist() == c.tokens_ST[r, :t].tolist()
                    assert (c.prefix_ST[s, t] == c.prefix_ST[r, t]) == same


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.7}])
def test_probabilities_of_all_completions_add_up_to_one(warp: dict[str, float]) -> None:
    policy = TabularPolicy(TabularPolicy.random(4, 3, num_prompts=3).logits_PNV, 3, warp)
    assert torch.allclose(policy.prob_PS().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-14)


def test_a_warp_is_that_of_the_sampler() -> None:
    """Half the temperature doubles the logits; a token outside the support has probability 0, unless it is kept."""
    logits_PNV = TabularPolicy.random(4, 3, num_prompts=2).logits_PNV
    colder, doubled = TabularPolicy(logits_PNV, 3, {"temperature": 0.5}), TabularPolicy(2 * logits_PNV, 3)
    assert torch.allclose(colder.prob_PS(), doubled.prob_PS(), rtol=1e-12)
    reward_PNV = torch.randn(logits_PNV.shape, dtype=torch.float64)
    assert torch.allclose(state_values(colder, reward_PNV), state_values(doubled, reward_PNV), rtol=1e-12)
    cut = TabularPolicy(logits_PNV, 3, {"top_k": 1})
    assert (cut.prob_PS() > 0).sum().item() == 2
    least = logits_PNV.argmin(2)
    assert cut.warped(logits_PNV).gather(2, least.unsqueeze(2)).isinf().all()
    assert cut.warped(logits_PNV, keep=least).gather(2, least.unsqueeze(2)).isfinite().all()


def test_random_logits_are_a_function_of_their_seed_and_of_no_other_random_number() -> None:
    def drawn(**options: float) -> torch.Tensor:
        torch.manual_seed(torch.seed())
        return TabularPolicy.random(5, 4, **options).logits_PNV  # type: ignore[arg-type]

    assert drawn().shape == (1, 85, 5)
    assert torch.equal(drawn(), drawn(seed=0, spread=1.0))
    assert not torch.equal(drawn(seed=1), drawn())
    assert torch.allclose(drawn(spread=3.0), 3 * drawn(), rtol=1e-14)
    assert float(drawn().std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_objective_equals_the_value_of_the_empty_prefix(gamma: float) -> None:
    policy = TabularPolicy.random(4, 3, num_prompts=2, seed=3)
    reward_PNV = torch.randn(policy.logits_PNV.shape, dtype=torch.float64)
    by_recursion = state_values(policy, reward_PNV, gamma)[:, 0].mean()
    assert objective(policy, reward_PNV, gamma).value == pytest.approx(float(by_recursion), rel=1e-12)


def test_of_one_step_the_value_is_the_expected_reward() -> None:
    policy = TabularPolicy.random(4, 1, num_prompts=2)
    reward_PNV = torch.randn(policy.logits_PNV.shape, dtype=torch.float64)
    expected_PN = (policy.logits_PNV.softmax(2) * reward_PNV).sum(2)
    assert torch.allclose(state_values(policy, reward_PNV, 0.5), expected_PN, rtol=1e-12)


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.6}, {"top_k": 2}])
def test_gradients_agree_with_differences(warp: dict[str, float]) -> None:
    policy = TabularPolicy(TabularPolicy.random(3, 2, num_prompts=2, seed=1).logits_PNV, 2, warp)
    reference = TabularPolicy.random(3, 2, num_prompts=2, seed=2)
    reward_PNV = torch.randn(policy.logits_PNV.shape, dtype=torch.float64)
    for function in (
        lambda p: objective(p, reward_PNV, 0.9),
        lambda p: kl(p, reference),
        completion_entropy,
    ):
        assert torch.allclose(function(policy).gradient_PNV, _difference(function, policy), atol=1e-8)


def test_gradient_is_the_visits_times_action_minus_its_expectation() -> None:
    """∇J of a softmax table is d(n) π(v|n) (Q(n, v) - V(n)), with d the probability of reaching prefix n."""
    policy = TabularPolicy.random(3, 3, num_prompts=2, seed=5)
    reward_PNV = torch.randn(policy.logits_PNV.shape, dtype=torch.float64)
    c = policy.completions
    prob_PNV = policy.logits_PNV.softmax(-1)
    value_PN = state_values(policy, reward_PNV)
    follow_PNV = torch.where(
        c.child_NV >= 0, value_PN[:, c.child_NV.clamp(min=0)], torch.zeros((), dtype=torch.float64)
    )
    visit_PN = torch.zeros_like(value_PN)
    visit_PN[:, 0] = 1
    for n in range(c.num_prefixes):
        for v in range(c.vocab_size):
            if c.child_NV[n, v] >= 0:
                visit_PN[:, c.child_NV[n, v]] += visit_PN[:, n] * prob_PNV[:, n, v]
    advantage_PNV = reward_PNV + follow_PNV - value_PN.unsqueeze(2)
    by_theorem = visit_PN.unsqueeze(2) * prob_PNV * advantage_PNV / policy.num_prompts
    assert torch.allclose(objective(policy, reward_PNV).gradient_PNV, by_theorem, atol=1e-14)


def test_kl_is_positive_and_zero_only_against_itself() -> None:
    policy, other = TabularPolicy.random(3, 3, seed=1), TabularPolicy.random(3, 3, seed=2)
    assert kl(policy, other).value > 0.01
    assert kl(policy, policy).value == pytest.approx(0.0, abs=1e-15)
    assert kl(policy, policy).gradient_PNV.abs().max() < 1e-15


def test_kl_is_the_expectation_of_k1_and_k3_but_not_of_k2() -> None:
    from llm_pg.estimators.kl import k1, k2, k3

    policy, other = TabularPolicy.random(3, 3, seed=1), TabularPolicy.random(3, 3, seed=2)
    mask_ST = policy.completions.mask_ST
    prob_S, logp_ST, ref_ST = policy.prob_PS()[0], policy.logp_PST()[0], other.logp_PST()[0]
    means = {f.__name__: float(prob_S @ (f(logp_ST, ref_ST) * mask_ST).sum(1)) for f in (k1, k2, k3)}
    exact = kl(policy, other).value
    assert means["k1"] == pytest.approx(exact, rel=1e-12)
    assert means["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(means["k2"] - exact) > 0.05 * exact


def test_entropy_of_completions_is_the_expected_sum_of_token_entropies() -> None:
    policy = TabularPolicy.random(4, 3, num_prompts=2, seed=4)
    by_chain_rule = (policy.prob_PS() * policy.entropy_PST().sum(2)).sum(1).mean()
    assert completion_entropy(policy).value == pytest.approx(float(by_chain_rule), rel=1e-12)


def test_a_verdict_is_read_back_at_the_last_token_and_nowhere_else() -> None:
    c = enumerate_completions(3, 3)
    reward_PS = torch.randn(2, c.num_completions, dtype=torch.float64)
    read_PST = step_values(c, terminal_reward(c, reward_PS))
    assert torch.equal(read_PST.sum(2), reward_PS)
    assert torch.equal((read_PST != 0).sum(2), torch.ones(2, c.num_completions, dtype=torch.long))


def test_too_large_a_policy_is_refused_with_its_cost() -> None:
    with pytest.raises(ValueError, match=r"make 111,111 completions.*at most 5,000.*GiB.*341"):
        enumerate_completions(11, 5)


@pytest.mark.parametrize(("vocab_size", "horizon"), [(1, 3), (3, 0)])
def test_a_policy_with_nothing_to_choose_is_refused(vocab_size: int, horizon: int) -> None:
    with pytest.raises(ValueError, match="vocab_size >= 2 and horizon >= 1"):
        enumerate_completions(vocab_size, horizon)


def test_a_table_of_the_wrong_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match="must be float64"):
        TabularPolicy(torch.zeros(1, 7, 3), 3)
    with pytest.raises(ValueError, match="has 6 prefixes; with 3 tokens and horizon 3 there are 7"):
        TabularPolicy(torch.zeros(1, 6, 3, dtype=torch.float64), 3)
