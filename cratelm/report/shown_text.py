"""Text for display: the report's sentences as HTML, and text of the corpus with all characters visible."""

import re
import unicodedata
from html import escape

MODEL_NAME = r"(?:CRATE|GPT-2)-(?:[123]L|S|B)"
"""The paper's models, as `display_name` writes them."""


def prose(text: str) -> str:
    """A sentence as HTML without line breaks inside a model's name or before a per cent sign.

    Not for commands and the corpus, which a reader may copy: it replaces hyphens and spaces.
    """
    whole = re.sub(rf"\b{MODEL_NAME}\b", lambda name: name[0].replace("-", "\N{NON-BREAKING HYPHEN}"), text)
    return escape(whole.replace(" %", "\N{NO-BREAK SPACE}%"))


def paragraph(text: str, kind: str = "") -> str:
    """A sentence as an HTML paragraph."""
    return f'<p class="{kind}">{prose(text)}</p>' if kind else f"<p>{prose(text)}</p>"


def marked(text: str) -> str:
    """Text of the corpus as HTML: line breaks and tabs as symbols, invisible and reordering characters as codes."""
    return "".join(f"<b>{sign(letter)}</b>" if sign(letter) else escape(letter) for letter in text)


def visible(text: str) -> str:
    """Text of the corpus as plain text, with the same replacements as `marked`."""
    return "".join(sign(letter) or letter for letter in text)


def sign(letter: str) -> str:
    """The replacement of an invisible letter; empty for a visible letter."""
    if letter in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "␍"}[letter]
    if letter.isprintable() or unicodedata.category(letter) == "Zs" or letter in "\u200c\u200d":
        return ""
    return f"U+{ord(letter):04X}"
