"""Text as it is shown: sentences of ours as HTML, and text of the corpus and of models with every character visible."""

import re
import unicodedata
from html import escape

MODEL_NAME = r"(?:CRATE|GPT-2)-(?:[123]L|S|B)"
"""The paper's models, as `display_name` writes them."""


def prose(text: str) -> str:
    """Text of ours as HTML, in which a narrow screen breaks no line inside GPT-2-2L or before a per cent sign.

    Not for what a reader may copy: commands and the corpus keep their characters.
    """
    whole = re.sub(rf"\b{MODEL_NAME}\b", lambda name: name[0].replace("-", "\N{NON-BREAKING HYPHEN}"), text)
    return escape(whole.replace(" %", "\N{NO-BREAK SPACE}%"))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of ours as HTML."""
    return f'<p class="{kind}">{prose(text)}</p>' if kind else f"<p>{prose(text)}</p>"


def marked(text: str) -> str:
    """Text of the corpus as HTML: line breaks and tabs as signs, what is invisible or reorders the line by its code."""
    return "".join(f"<b>{sign(letter)}</b>" if sign(letter) else escape(letter) for letter in text)


def visible(text: str) -> str:
    """The same as plain text."""
    return "".join(sign(letter) or letter for letter in text)


def sign(letter: str) -> str:
    """What stands for a letter that cannot be seen; empty for one that can."""
    if letter in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "␍"}[letter]
    if letter.isprintable() or unicodedata.category(letter) == "Zs" or letter in "\u200c\u200d":
        return ""
    return f"U+{ord(letter):04X}"
