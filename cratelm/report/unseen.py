"""Letters that nobody sees, or that reorder what stands beside them, written out as `viewer/text.js` does it."""

import unicodedata

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_JOINERS = "\u200c\u200d"
"""Parts of words in some scripts."""


def visible(text: str) -> str:
    """The text on one line, with `U+202E` and its like for letters that cannot be seen. Any UTF-8 file can hold it."""
    return "".join(_SIGNS.get(one) or _written(one) for one in text)


def _written(letter: str) -> str:
    seen = letter in _JOINERS or unicodedata.category(letter) not in _UNSEEN
    return letter if seen else f"U+{ord(letter):04X}"
