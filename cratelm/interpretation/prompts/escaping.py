r"""Escape tokens for prompts that show one token per line: nothing inside a token may break the line or be invisible.

a tab, a line break            \t  \n  \r
part of a character            \xe2
an invisible character         \u200b
a special token's text         <endoftext>, not <|endoftext|>, which a server would read as the special token

Windows of text are decoded from the bytes of all their tokens together, because a character may span several tokens.
Part of a character at a window's border is left out of running text (`text_of`), and is `\N{REPLACEMENT CHARACTER}`
where tokens are marked (`characters`), so that the mark encloses something.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cratelm.activations.records import Mode
from cratelm.data.tokenizer import token_bytes

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
_LETTERS = {written: letter for letter, written in _NAMED.items()}
_ESCAPE = re.compile(r"\\(?:[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_MARKER = re.compile(r"<\|(.*?)\|>")
_SURROGATES = "".join(map(chr, range(0xDC80, 0xDD00)))
"""Python decodes bytes that are not valid UTF-8 as these."""
_LONE = re.compile(f"[{_SURROGATES}]+")
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")
"""Unicode categories of characters that are invisible, or that reorder or break a line."""


def prompt_strings(tokenizer: Tokenizer, mode: Mode = "fixed") -> list[str]:
    """The text of each token id in prompts; in `compat` mode unescaped, as in the released code."""
    pieces = token_bytes(tokenizer)
    if mode == "compat":
        return [piece.decode(errors="replace") for piece in pieces]
    return [escaped(piece.decode(errors="backslashreplace")) for piece in pieces]


def shown_letter(letter: str) -> str:
    """One character, escaped if it is invisible or breaks a line."""
    if letter in _NAMED:
        return _NAMED[letter]
    if unicodedata.category(letter) not in _UNSEEN:
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escaped(text: str) -> str:
    """A token on one line, with every character visible."""
    return "".join(map(shown_letter, without_markers(text)))


def unescaped(token: str) -> str:
    r"""Undo `escaped`: `\n` becomes a line break, and `\xc3` the character with that number."""
    return _ESCAPE.sub(lambda match: _LETTERS.get(match[0]) or chr(int(match[0][2:], 16)), token)


def without_markers(text: str) -> str:
    """A text without special tokens such as <|endoftext|>, which a server would interpret."""
    return _MARKER.sub(r"<\1>", text)


class Character(NamedTuple):
    """A character of a window."""

    text: str
    first: int
    """Index in the window of the first token with part of the character."""
    last: int
    """Index of the last one."""


def characters(pieces: Sequence[bytes]) -> list[Character]:
    """The characters of consecutive tokens; adjacent bytes that are not valid UTF-8 become one U+FFFD."""
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces]).tolist()
    shown: list[Character] = []
    at, after_lone = 0, False
    for letter in b"".join(pieces).decode(errors="surrogateescape"):
        size, lone = len(letter.encode(errors="surrogateescape")), letter in _SURROGATES
        first, last = owner[at], owner[at + size - 1]
        if lone and after_lone:
            shown[-1] = shown[-1]._replace(last=last)
        else:
            shown.append(Character(REPLACEMENT_CHARACTER if lone else letter, first, last))
        at, after_lone = at + size, lone
    text = "".join(character.text for character in shown)
    bars = {place for marker in _MARKER.finditer(text) for place in (marker.start() + 1, marker.end() - 2)}
    return [character for place, character in enumerate(shown) if place not in bars]


def text_of(pieces: Sequence[bytes]) -> str:
    """The text of consecutive tokens, line breaks included, without parts of characters at both ends."""
    whole = b"".join(pieces).decode(errors="surrogateescape")
    return without_markers(_LONE.sub(REPLACEMENT_CHARACTER, whole.strip(_SURROGATES)))


def running_text(tokens: Sequence[str]) -> str:
    r"""Concatenate escaped tokens, and decode the bytes of characters that span several tokens.

    `\xc3` and `\xa9` become `é`; a byte that is not part of a whole character stays escaped.
    """
    return b"".join(map(_bytes_of, tokens)).decode(errors="backslashreplace")


def _bytes_of(token: str) -> bytes:
    # Only bytes from 80 up are parts of characters. Below, an escape is an invisible character, and stays one.
    parts = re.split(r"\\x([89a-f][0-9a-f])", token)
    return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))
