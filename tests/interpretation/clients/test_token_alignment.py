"""Tokens aligned with a text, in each spelling that servers use, against their true offsets."""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
from fixtures.synthetic import make_tokenizer
from tokenizers import Tokenizer

from cratelm.interpretation.clients.token_alignment import align

LETTERS = list("abc 10\t\n.é日本語→🦀ü  the return")


def spans(pieces: list[bytes], text: str) -> list[tuple[int, int]]:
    """Where each token lies when a character stands with the token that has its first byte."""
    begins = [i for i, letter in enumerate(text) for _ in letter.encode()]
    first = [i == 0 or begins[i - 1] != begins[i] for i in range(len(begins))]
    ends = list(accumulate(map(len, pieces)))
    found, before = [], 0
    for end in ends:
        characters = sum(first[:end])
        found.append((before, characters))
        before = characters
    return found


def byte_pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    from cratelm.interpretation.clients.token_alignment import _byte_alphabet

    names = [tokenizer.id_to_token(number) for number in tokenizer.encode(text).ids]
    return [bytes(_byte_alphabet()[letter] for letter in name or "") for name in names]


def corrected(pieces: list[bytes]) -> list[str]:
    """Nothing for an unfinished character, and all of it where it ends."""
    found, pending = [], b""
    for piece in pieces:
        try:
            found.append((pending + piece).decode())
            pending = b""
        except UnicodeDecodeError:
            pending += piece
            found.append("")
    return found


SPELLINGS: dict[str, Callable[[list[bytes]], list[str]]] = {
    "replaced": lambda pieces: [piece.decode(errors="replace") for piece in pieces],
    "left out": lambda pieces: [piece.decode(errors="ignore") for piece in pieces],
    "corrected": corrected,
    "escaped": lambda pieces: [
        piece.decode() if _whole(piece) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece) for piece in pieces
    ],
}


def _whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tokens_find_their_places(spelling: str, rng: np.random.Generator) -> None:
    tokenizer = make_tokenizer()
    for _ in range(50):
        text = "".join(rng.choice(LETTERS, size=40)) + "."
        pieces = byte_pieces(tokenizer, text)
        told = SPELLINGS[spelling](pieces)
        found = align([[token] for token in told], text)
        assert found is not None
        expected = spans(pieces, text)
        # Which of several broken tokens in a row begins which character, their texts do not say.
        clear = [i for i, piece in enumerate(pieces) if _whole(piece)]
        assert [(found[i].start, found[i].end) for i in clear] == [expected[i] for i in clear]
        assert "".join(text[place.start : place.end] for place in found) == text


def test_a_single_cut_character_stands_with_its_first_token() -> None:
    for told in (["a", "\ufffd", "\ufffd", "\ufffd", "b"], ["a", "", "", "日", "b"], ["a", "", "", "", "b"]):
        found = align([[token] for token in told], "a日b")
        assert found is not None
        assert [place[:2] for place in found] == [(0, 1), (1, 2), (2, 2), (2, 2), (2, 3)]


def test_cut_characters_in_a_row_are_told_apart_by_their_byte_alphabet() -> None:
    for told in (["", "", "", "", "", "", "", ""], ["\ufffd"] * 8):
        found = align([[token] for token in [*told, "."]], "é日本.")
        assert found is not None
        assert [place[:2] for place in found] == [
            (0, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 3), (3, 3), (3, 3), (3, 4),
        ]  # fmt: skip
    found = align([["\ufffd"]] * 4 + [["."]], "日本.")
    assert found is not None
    assert [place[:2] for place in found] == [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]


def test_a_token_that_also_holds_a_whole_character() -> None:
    found = align([[" \ufffd"], ["\ufffd."], ["."]], " é..")
    assert found is not None
    assert [place[:2] for place in found] == [(0, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("told", "text", "expected"),
    [
        (["<s>", "a", "b"], "ab", [(0, 0), (0, 1), (1, 2)]),
        (["<s>", "The", "boat", "\n", "0"], "The boat\n0", [(0, 0), (0, 3), (3, 8), (8, 9), (9, 10)]),
        (
            ["<s>", "", "The", "", "boat", "s", " ", "x"],
            " The  boats   x",
            [(0, 0), (0, 1), (1, 4), (4, 5), (5, 10), (10, 11), (11, 13), (13, 15)],
        ),
        (["▁The", "▁boat", "<0x0A>", "0"], "The boat\n0", [(0, 3), (3, 8), (8, 9), (9, 10)]),
        (
            ["The", "Ġboat", "Ċ", "ĉ", "Ã©", "0"],
            "The boat\n\té0",
            [(0, 3), (3, 8), (8, 9), (9, 10), (10, 11), (11, 12)],
        ),
        (["a", "b", "c", "more"], "abc", [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_spellings_of_servers(told: list[str], text: str, expected: list[tuple[int, int]]) -> None:
    found = align([[token] for token in told], text)
    assert found is not None
    assert [place[:2] for place in found] == expected


def test_a_first_token_without_text_and_tokens_with_several_candidates() -> None:
    found = align([[], ["b", "bc"], ["d", "cd", ""]], "abcd")
    assert found is not None
    assert [tuple(place) for place in found] == [(0, 1, -1), (1, 2, 0), (2, 4, 1)]


def test_tokens_that_do_not_spell_the_text() -> None:
    assert align([["a"], ["x"], ["c"]], "abc") is None
    assert align([["a"]], "abc") is None
    assert align([["a"], [""]], "ab") is None
    assert align([], "abc") is None
    assert align([["A"], ["\ufffd"], ["c"]], "Abc") is None
    assert align([], "") == []


def test_a_long_text_takes_no_long_time() -> None:
    told = [[], *([["a", "aa"], [""], ["\ufffd"]] * 150)]
    assert align(told, "aéa" * 75 + "b") is None
