"""The text that a token adds, as the page shows it."""

from llm_pg.collect.collector import Pieces


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character can take several."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return "▁a" if token == ord("a") else "b"


def test_pieces_join_to_the_text_and_a_character_of_several_tokens_belongs_to_the_last() -> None:
    text = "b日é🙂"
    pieces = Pieces(Bytes())(list(text.encode()))
    assert "".join(pieces) == text
    assert pieces == ["b", "", "", "日", "", "é", "", "", "", "🙂"]


def test_a_cut_character_is_shown_by_the_mark_of_replacement_and_nothing_is_lost() -> None:
    assert Pieces(Bytes())([*b"b", *"日".encode()[:2]]) == ["b", "", "\ufffd"]


def test_a_sentencepiece_token_keeps_its_leading_space() -> None:
    assert Pieces(Bytes())(list(b"ba")) == ["b", " a"]
