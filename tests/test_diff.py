"""The word diff, in any script."""

import pytest

from studio.diff import GONE, NEW, SAME, Piece, changed, diff, words


def test_words_end_at_space_and_punctuation_and_nowhere_else() -> None:
    assert words("two red,  circles!") == ["two", "red", ",", "circles", "!"]
    assert words("एक नीली कार।") == ["एक", "नीली", "कार", "।"]
    assert words("தமிழ் மரம்") == ["தமிழ்", "மரம்"]
    assert words(" \n ") == []


def test_a_changed_word_is_gone_and_new() -> None:
    assert diff("two red circles", "two blue circles") == (
        Piece(SAME, "two "), Piece(GONE, "red "), Piece(NEW, "blue "), Piece(SAME, "circles"),
    )  # fmt: skip
    assert changed("two red circles", "two blue circles, big") == (("red",), ("blue", ", big"))
    assert changed("नाला", "नीली") == (("नाला",), ("नीली",))


NOVEL = "a b " * 2500


@pytest.mark.parametrize(
    ("old", "new"),
    [("", "a"), ("a", ""), ("", ""), ("a b", " a  b "), ("x, y", "x y, z\n"), ("<img src=x>", "<b>"),
     (NOVEL, "b " + NOVEL),
     (NOVEL, "c d " * 2500), ("a", "  ")],
)  # fmt: skip
def test_what_is_not_gone_is_the_new_prompt_to_the_letter(old: str, new: str) -> None:
    pieces = diff(old, new)
    assert "".join(piece.text for piece in pieces if piece.kind != GONE) == new
    if words(old) == words(new):
        assert {piece.kind for piece in pieces} <= {SAME}
