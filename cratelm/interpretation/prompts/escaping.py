r"""Tokens as prompts show them: one to a line, so that nothing inside a token may break a line or hide.

a tab, a line break            \t  \n  \r
a byte that is no character    \xe2
what cannot be seen            \u200b
a marker of a tokenizer        <endoftext>, not <|endoftext|>: a server would read it as the marker itself

And windows of text as prompts show them: the bytes of all their tokens become characters together, since a character
may lie in several tokens. What is left of one that the window's border cuts is left out of running text (`text_of`),
and is `\N{REPLACEMENT CHARACTER}` where tokens are marked (`characters`), so that there is something to mark.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cratelm.activations.records import Mode
from cratelm.data.tokenizer import token_bytes

BROKEN = "\N{REPLACEMENT CHARACTER}"
_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
_LETTERS = {written: letter for letter, written in _NAMED.items()}
_ESCAPE = re.compile(r"\\(?:[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_MARKER = re.compile(r"<\|(.*?)\|>")
_SURROGATES = "".join(map(chr, range(0xDC80, 0xDD00)))
"""What Python decodes a byte as that is no character."""
_LONE = re.compile(f"[{_SURROGATES}]+")
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")
"""Unicode's categories of letters that a reader does not see, or that reorder or break a line."""


def prompt_strings(tokenizer: Tokenizer, mode: Mode = "fixed") -> list[str]:
    """For each token id the text that prompts show; in `compat` mode as the released code decodes it, raw."""
    pieces = token_bytes(tokenizer)
    if mode == "compat":
        return [piece.decode(errors="replace") for piece in pieces]
    return [escaped(piece.decode(errors="backslashreplace")) for piece in pieces]


def shown_letter(letter: str) -> str:
    """One character, so that it is to be seen and breaks no line."""
    if letter in _NAMED:
        return _NAMED[letter]
    if unicodedata.category(letter) not in _UNSEEN:
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escaped(text: str) -> str:
    """A token on one line, with everything in it to be seen."""
    return "".join(map(shown_letter, without_markers(text)))


def unescaped(token: str) -> str:
    r"""A token as it is without escapes: a line break for `\n`, and for `\xc3` the letter of that number."""
    return _ESCAPE.sub(lambda one: _LETTERS.get(one[0]) or chr(int(one[0][2:], 16)), token)


def without_markers(text: str) -> str:
    """A text in which no server finds the marker of a tokenizer."""
    return _MARKER.sub(r"<\1>", text)


class Character(NamedTuple):
    """A character of a window."""

    text: str
    first: int
    """The first token that holds some of it, counted in the window."""
    last: int
    """The last one."""


def characters(pieces: Sequence[bytes]) -> list[Character]:
    """The characters of tokens one after the other; bytes next to each other that make none are one U+FFFD."""
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces]).tolist()
    found: list[Character] = []
    at, after_lone = 0, False
    for letter in b"".join(pieces).decode(errors="surrogateescape"):
        size, lone = len(letter.encode(errors="surrogateescape")), letter in _SURROGATES
        first, last = owner[at], owner[at + size - 1]
        if lone and after_lone:
            found[-1] = found[-1]._replace(last=last)
        else:
            found.append(Character(BROKEN if lone else letter, first, last))
        at, after_lone = at + size, lone
    text = "".join(one.text for one in found)
    bars = {place for one in _MARKER.finditer(text) for place in (one.start() + 1, one.end() - 2)}
    return [one for place, one in enumerate(found) if place not in bars]


def text_of(pieces: Sequence[bytes]) -> str:
    """The text of tokens one after the other, line breaks and all, without what is left of characters at its ends."""
    whole = b"".join(pieces).decode(errors="surrogateescape")
    return without_markers(_LONE.sub(BROKEN, whole.strip(_SURROGATES)))


def running_text(tokens: Sequence[str]) -> str:
    r"""Escaped tokens one after the other, with the characters that they make together.

    `\xc3` and `\xa9` become `é`; a byte that makes none with its neighbours stays as it is written.
    """
    return b"".join(map(_bytes_of, tokens)).decode(errors="backslashreplace")


def _bytes_of(token: str) -> bytes:
    # Only bytes from 80 up are parts of characters. Below, an escape is what cannot be seen, and stays one.
    parts = re.split(r"\\x([89a-f][0-9a-f])", token)
    return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))
