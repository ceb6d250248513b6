"""Random numbers as functions: against the same arithmetic on Python integers, and the draw against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_pg.sampling.random import draw, stream_key, uniform

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 2**64


def mixed(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * MIX_1 % WORD
    x = (x ^ (x >> 27)) * MIX_2 % WORD
    return x ^ (x >> 31)


def key_of(*parts: int) -> int:
    key = 0
    for part in parts:
        key = mixed((key * MIX_1 + part + GOLDEN) % WORD)
    return key


def signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


PARTS = [(0,), (1,), (0, 0), (5, 1, 2), (2**63 - 1, 3), (-1, 7), (123456789, 1, 40, 0, 7)]


@pytest.mark.parametrize("parts", PARTS)
def test_a_key_is_that_of_splitmix64_on_every_machine(parts: tuple[int, ...]) -> None:
    assert int(stream_key(*parts)) == signed(key_of(*(part % WORD for part in parts)))
    assert int(stream_key(*(torch.tensor(part) for part in parts))) == int(stream_key(*parts))


@pytest.mark.parametrize("parts", PARTS)
def test_a_uniform_is_the_top_53_bits_at_its_position(parts: tuple[int, ...]) -> None:
    key = stream_key(*parts)
    for position in (0, 1, 17, 2**40):
        bits = mixed((int(key) % WORD + (position + 1) * GOLDEN) % WORD)
        found = uniform(key, position)
        assert found.dtype == torch.float64
        assert float(found) == (bits >> 11) / 2**53
        assert float(uniform(key, torch.tensor(position))) == float(found)


def test_keys_and_positions_broadcast() -> None:
    keys = stream_key(3, torch.arange(4).unsqueeze(1), torch.arange(5))
    assert keys.dtype == torch.int64
    assert [[int(stream_key(3, i, j)) for j in range(5)] for i in range(4)] == keys.tolist()
    drawn = uniform(keys, torch.arange(5))
    assert [[float(uniform(keys[i, j], j)) for j in range(5)] for i in range(4)] == drawn.tolist()


def test_the_order_and_number_of_parts_make_another_key() -> None:
    parts = [p for n in (1, 2, 3) for p in itertools.product(range(4), repeat=n)]
    assert len({int(stream_key(*p)) for p in parts}) == len(parts)


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = uniform(stream_key(1), torch.arange(100_000))
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) < 1.0
    counts = torch.histc(drawn.float(), 20, 0.0, 1.0)
    assert float(((counts - 5000).square() / 5000).sum()) < 43.8  # χ² of 19 degrees, 1 in 1,000


def test_a_draw_is_the_first_token_whose_mass_passes_the_number() -> None:
    """Probabilities 0, 1/4, 1/2, 0, 1/4: a token of probability 0 is never drawn, at no edge."""
    logits = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25]]).log()
    expected = {0.0: 1, 0.2: 1, 0.25: 2, 0.5: 2, 0.7: 2, 0.75: 4, 0.99: 4, 1 - 2.0**-53: 4}
    for number, token in expected.items():
        assert draw(logits, torch.tensor([number], dtype=torch.float64)).tolist() == [token], number


def test_every_row_is_drawn_from_its_own_distribution() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 2
    numbers = uniform(stream_key(2, torch.arange(3).unsqueeze(1)), torch.arange(30_000))
    for row, drawn in enumerate(numbers):
        tokens = draw(logits[row].expand(30_000, 7), drawn)
        shares = torch.bincount(tokens, minlength=7) / 30_000
        assert torch.allclose(shares, logits[row].softmax(-1), atol=0.012)
    whole = draw(logits, numbers[:, 0])
    assert whole.tolist() == [int(draw(logits[i : i + 1], numbers[i, :1])) for i in range(3)]
    assert draw(logits.bfloat16(), numbers[:, 0]).shape == (3,)


def test_probabilities_that_do_not_add_up_to_one_are_drawn_in_proportion() -> None:
    """The softmax of 16-bit logits does not; a number of 1/2 is half of what there is."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)).bfloat16()
    cdf = logits.softmax(-1).double()[0].cumsum(0)
    share = cdf / cdf[-1]
    assert abs(float(cdf[-1]) - 1) > 1e-5
    for token in (0, 99, 250, 498):
        around = share[token] * torch.tensor([1 - 1e-7, 1 + 1e-7], dtype=torch.float64)
        assert draw(logits.expand(2, 500), around).tolist() == [token, token + 1]


def test_logits_that_are_no_numbers_still_draw_a_token_that_there_is() -> None:
    assert draw(torch.full((1, 5), float("nan")), torch.tensor([0.5], dtype=torch.float64)).tolist() == [4]
