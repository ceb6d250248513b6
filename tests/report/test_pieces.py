"""The text that a token adds, and a number, as the page shows them."""

import math

import pytest

from llm_pg.report.completions import Shared, compact
from llm_pg.report.svg import number
from llm_pg.rollout.experience import Pieces


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character can take several."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token for token in ids if token or not skip_special_tokens).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return {ord("a"): "▁a", ord(" "): "▁"}.get(token, "b")


def test_pieces_join_to_the_text_and_a_character_of_several_tokens_belongs_to_the_last() -> None:
    text = "b日é🙂"
    pieces = Pieces(Bytes())(list(text.encode()))
    assert "".join(pieces) == text
    assert pieces == ["b", "", "", "日", "", "é", "", "", "", "🙂"]


def test_a_cut_character_is_shown_by_the_mark_of_replacement_and_nothing_is_lost() -> None:
    assert Pieces(Bytes())([*b"b", *"日".encode()[:2]]) == ["b", "", "\ufffd"]


def test_a_sentencepiece_token_keeps_its_leading_space() -> None:
    assert Pieces(Bytes())(list(b"ba a")) == ["b", " a", " ", " a"]


def test_a_special_token_is_shown_and_bytes_that_make_no_character_are_not_waited_for_beyond_four() -> None:
    assert Pieces(Bytes())(list(b"b\x00")) == ["b", "\x00"]
    assert Pieces(Bytes())(list(b"\xff\xff\xff\xffb")) == ["", "", "", "\ufffd" * 4, "b"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        *[(0.0, "0"), (0.5, "0.5"), (-12.34, "-12.3"), (999.7, "1000"), (1234.4, "1234"), (-9999.4, "-9999")],
        *[(9999.7, "10k"), (20_000.0, "20k"), (12_500.0, "12.5k"), (999_400.0, "999k"), (999_700.0, "1e6")],
        *[(2.5e7, "2.5e7"), (3e-4, "3e-4"), (-3.24e-7, "-3.2e-7"), (1e-12, "1e-12")],
    ],
)
def test_a_number_is_told_shortly_and_rounds_over_no_edge(value: float, told: str) -> None:
    assert number(value) == told


def test_a_number_that_json_cannot_hold_is_left_out_of_the_page() -> None:
    """A ratio of a run that diverged can be infinite; the page had not been written at all."""
    tokens = {"logp": [-1.0, math.nan], "weight": [0.5, 0.25], "ratio": [math.inf, 2.0]}
    row = {"prompt": "p", "completion": "ab", "pieces": ["a", "b"], "ids": [1, 2], "reward": 1.0, "tokens": tokens}
    told = compact(row, 0, 1, Shared(), Shared(), Shared())
    assert (told["l"], told["a"], told["q"]) == ([-1000, None], [500, 250], [None, 2000])
