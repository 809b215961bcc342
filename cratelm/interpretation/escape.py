r"""Tokens as prompts show them: one to a line, so that nothing inside a token may break a line or hide.

a tab, a line break            \t  \n  \r
a byte that is no character    \xe2
what cannot be seen            \u200b
a marker of a tokenizer        <endoftext>, not <|endoftext|>: a server would read it as the marker itself
"""

import re
import unicodedata

from tokenizers import Tokenizer

from cratelm.activations.records import Mode
from cratelm.data.tokenizer import token_bytes

_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")
"""Unicode's categories of letters that a reader does not see, or that reorder or break a line."""


def prompt_strings(tokenizer: Tokenizer, mode: Mode = "fixed") -> list[str]:
    """For each token id the text that prompts show; in `compat` mode as the released code decodes it, raw."""
    pieces = token_bytes(tokenizer)
    if mode == "compat":
        return [piece.decode(errors="replace") for piece in pieces]
    return [escaped(piece.decode(errors="backslashreplace")) for piece in pieces]


def escaped(text: str) -> str:
    """A token on one line, with everything in it to be seen."""
    plain = re.sub(r"<\|(.*?)\|>", r"<\1>", text)
    return "".join(map(_escaped_letter, plain))


def _escaped_letter(letter: str) -> str:
    if letter in _NAMED:
        return _NAMED[letter]
    if unicodedata.category(letter) not in _UNSEEN:
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
