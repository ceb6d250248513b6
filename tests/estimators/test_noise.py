"""Signal and noise of a gradient, against the enumerated mean and variance of its groups."""

import math

import pytest
import torch

from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.exact import TabularPolicy
from llm_pg.estimators.expectation import enumerate_groups, updates
from llm_pg.estimators.noise import GradientNoise, NoiseScale, gradient_noise, half_square_norms, square_norm
from llm_pg.prove.measure import algorithm_of
from llm_pg.prove.world import loss_of_groups
from llm_pg.prove.worlds import WorldSpec, build


@pytest.fixture(scope="module")
def group_updates() -> tuple[torch.Tensor, torch.Tensor]:
    """The update of every group of two completions that a step could sample, and its probability."""
    spec = WorldSpec(horizon=2, num_generations=2)
    world = build(spec)
    loss_of = loss_of_groups(world, algorithm_of(ALGORITHMS["rloo"], spec.horizon))
    rows = []
    for groups in enumerate_groups(world.policy.prob_PS(), 2):
        theta_MPNV = world.policy.logits_PNV.expand(len(groups.weight_M), -1, -1, -1)
        rows.append((updates(loss_of, theta_MPNV, groups), groups.weight_M))
    return torch.cat([g for g, _ in rows]), torch.cat([w for _, w in rows])


def _expected(group_updates: tuple[torch.Tensor, torch.Tensor], parts: list[int]) -> tuple[float, float]:
    """Mean of the two estimates over every way in which a step could draw its groups."""
    g_MD, weight_M = group_updates
    num_groups = sum(parts)
    every = torch.cartesian_prod(*[torch.arange(len(weight_M))] * num_groups)
    weight = weight_M[every].prod(1)
    sums, squares, at = torch.zeros(len(every), g_MD.shape[1], dtype=torch.float64), [], 0
    for size in parts:
        part = g_MD[every[:, at : at + size]].sum(1) / num_groups
        squares.append(part.square().sum(1))
        sums += part
        at += size
    whole = sums.square().sum(1)
    found = [gradient_noise([float(s[i]) for s in squares], float(whole[i]), parts) for i in range(0, len(every), 1)]
    signal = torch.tensor([f.signal for f in found], dtype=torch.float64)
    noise = torch.tensor([f.noise for f in found], dtype=torch.float64)
    return float(weight @ signal), float(weight @ noise)


@pytest.mark.parametrize("parts", [[1, 1]])
def test_signal_and_noise_are_unbiased_over_every_pair_of_groups(
    group_updates: tuple[torch.Tensor, torch.Tensor], parts: list[int]
) -> None:
    g_MD, weight_M = group_updates
    mean_D = weight_M @ g_MD
    trace = float(weight_M @ (g_MD - mean_D).square().sum(1))
    signal, noise = _expected(group_updates, parts)
    assert signal == pytest.approx(float(mean_D.square().sum()), rel=1e-10)
    assert noise == pytest.approx(trace, rel=1e-10)


def test_unequal_parts_are_unbiased_too(group_updates: tuple[torch.Tensor, torch.Tensor]) -> None:
    g_MD, weight_M = group_updates
    likely = weight_M.topk(12).indices  # 12³ steps of three groups instead of 56³
    g_MD, weight_M = g_MD[likely], weight_M[likely] / weight_M[likely].sum()
    mean_D = weight_M @ g_MD
    trace = float(weight_M @ (g_MD - mean_D).square().sum(1))
    signal, noise = _expected((g_MD, weight_M), [1, 2])
    assert signal == pytest.approx(float(mean_D.square().sum()), rel=1e-10)
    assert noise == pytest.approx(trace, rel=1e-10)


def test_halves_of_a_gradient_give_the_lengths_of_their_difference() -> None:
    first = [torch.tensor([3.0, 0.0]), torch.tensor([[1.0]])]
    whole = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])]
    assert [float(x) for x in half_square_norms(first, whole)] == [10.0, 17.0, 29.0]
    assert float(square_norm(whole)) == 29.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        half_square_norms(first, whole[:1])


def test_lengths_are_summed_in_float64() -> None:
    """In float32 a long gradient loses the short ones after it: 2^24 + 1 is 2^24."""
    tensors = [torch.tensor([4096.0]), torch.tensor([1.0])]
    assert float(square_norm(tensors)) == 2**24 + 1
    assert float(square_norm([torch.cat(tensors)])) == 2**24 + 1
    assert square_norm(tensors).dtype == torch.float64
    for length in (square_norm([]), *half_square_norms([], [])):
        assert (length.dtype, length.shape, float(length)) == (torch.float64, (), 0.0)


def test_averages_are_corrected_for_their_start_and_survive_saving() -> None:
    scale = NoiseScale(decay=0.9)
    for _ in range(3):
        scale.update(GradientNoise(signal=0.5, noise=8.0, num_groups=4))
    again = NoiseScale(decay=0.9)
    again.load_state_dict(scale.state_dict())
    assert again.weight == pytest.approx(1 - 0.9**3)  # divided by it, signal and noise are means
    assert again.signal / again.weight == pytest.approx(0.5)
    assert again.simple_noise_scale == pytest.approx(16.0)
    assert again.signal_to_noise(num_groups=4) == pytest.approx(math.sqrt(4 * 0.5 / 8.0))


def test_signal_and_noise_are_equal_at_the_simple_noise_scale() -> None:
    scale = NoiseScale()
    scale.update(GradientNoise(signal=0.25, noise=8.0, num_groups=4))
    assert scale.signal_to_noise(num_groups=int(scale.simple_noise_scale)) == pytest.approx(1.0)


def test_an_estimate_weighs_one_minus_the_decay_and_none_before_it_counts_without_memory() -> None:
    first, second = GradientNoise(1.0, 8.0, 4), GradientNoise(3.0, 2.0, 4)
    half, none = NoiseScale(decay=0.5), NoiseScale(decay=0)
    for estimate in (first, second):
        half.update(estimate)
        none.update(estimate)
    assert half.state_dict() == {"signal": 0.25 * 1 + 0.5 * 3, "noise": 0.25 * 8 + 0.5 * 2, "weight": 0.75}
    assert none.state_dict() == {"signal": 3.0, "noise": 2.0, "weight": 1.0}
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"in \[0, 1\); it is {decay}"):
            NoiseScale(decay)


def test_a_gradient_without_noise_is_all_signal() -> None:
    scale = NoiseScale()
    scale.update(GradientNoise(signal=0.5, noise=0.0, num_groups=4))
    assert scale.simple_noise_scale == 0.0
    assert scale.signal_to_noise(8) == math.inf


def test_a_hidden_signal_is_not_reported_as_a_number() -> None:
    unseen = NoiseScale()
    assert (unseen.simple_noise_scale, unseen.signal_to_noise(8)) == (math.inf, 0.0)
    scale = NoiseScale()
    scale.update(GradientNoise(signal=-0.1, noise=1.0, num_groups=2))
    assert scale.simple_noise_scale == math.inf
    assert scale.signal_to_noise(8) == 0.0


def test_a_step_of_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two parts"):
        gradient_noise([1.0], 1.0, [1])
    for squares, parts in (([1.0], [1, 1]), ([1.0, 1.0], [1, 0])):
        with pytest.raises(ValueError, match=rf"got {len(squares)} squared lengths for parts of \[1, {parts[1]}\]"):
            gradient_noise(squares, 1.0, parts)


def test_signal_and_noise_of_a_step_are_reported_with_its_groups() -> None:
    """Two halves of two groups each, |g_k|² = 3 and |g|² = 8: (8 - 6) / (1 - 1/2) and 4 (8 - 4)."""
    assert gradient_noise([3.0, 3.0], 8.0, [2, 2]) == GradientNoise(signal=4.0, noise=16.0, num_groups=4)


def test_two_prompts_of_a_policy_are_drawn_with_equal_probability() -> None:
    policy = TabularPolicy.random(3, 2, num_prompts=2)
    shares = [float(groups.weight_M.sum()) for groups in enumerate_groups(policy.prob_PS(), 2)]
    assert shares == pytest.approx([0.5, 0.5], rel=1e-12)
