"""Align tokens with a text if a server returns only the text of each token.

Servers decode tokens one by one. Part of a character then is U+FFFD or empty, a SentencePiece token lacks its leading
space, some tokens are spelled as in the vocabulary, and before the first there may be a token that the text does not
have. So tokens are matched along the text by a depth-first search: each takes the first span that lets the rest match.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST_UNKNOWN = 64
"""Characters that a token of unknown text may stand for: the first one of a prompt."""
STEPS = 20
"""Search steps per token and character until the text counts as a different one; a right text takes one or a few."""
ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)$|<0x([0-9a-fA-F]{2})>$")


class TokenSpan(NamedTuple):
    """Where a token lies in the text."""

    start: int
    """Offset of its first character."""
    end: int
    """Offset after its last character; equal to `start` for a token in which no character begins."""
    reading: int
    """Which of the token's possible texts matched; -1 if none was reported."""


def align(tokens: Sequence[Sequence[str]], text: str) -> list[TokenSpan] | None:
    """Align tokens to character offsets. Each token is a list of possible texts, most likely first; empty if unknown.

    A split character belongs to its first token. Tokens after the end of the text are left out. None if the tokens do
    not spell the text.
    """
    first = None
    for spaceless, byte_level in ((False, False), (False, True), (True, False)):
        spelled = [[_from_byte_level(token) for token in readings] for readings in tokens] if byte_level else tokens
        spans = _search(spelled, text, spaceless=spaceless)
        # An unknown first token can stand for a whole short text; a match that needs all tokens is better.
        if spans is not None and len(spans) == len(tokens):
            return spans
        first = first or spans
    return first


def _search(tokens: Sequence[Sequence[str]], text: str, *, spaceless: bool) -> list[TokenSpan] | None:
    """As `align`; `spaceless`: each token lacks one leading space."""
    untried: list[Iterator[TokenSpan]] = []
    spans: list[TokenSpan] = []
    failed: set[tuple[int, int]] = set()
    cursor, steps = 0, STEPS * (len(tokens) + len(text))
    while cursor < len(text):
        number, steps = len(spans), steps - 1
        if steps < 0:
            return None
        if len(untried) == number:
            readings = tokens[number] if number < len(tokens) else None
            untried.append(iter(()) if readings is None else _matches(readings, text, cursor, number, spaceless))
        span = next((span for span in untried[number] if (number + 1, span.end) not in failed), None)
        if span is not None:
            spans.append(span)
            cursor = span.end
        elif not spans:
            return None
        else:
            failed.add((number, cursor))
            untried.pop()
            cursor = spans.pop().start
    return _split_characters(spans, tokens, text)


def _matches(readings: Sequence[str], text: str, at: int, number: int, spaceless: bool) -> Iterator[TokenSpan]:
    """Spans that a token may have at an offset, most likely first."""
    for reading, token in enumerate(readings):
        if spaceless and text[at] == " " and text.startswith(token, at + 1):
            yield TokenSpan(at, at + 1 + len(token), reading)
            if at:
                continue
        spelled = _spelling(token)
        if token and text.startswith(token, at):
            yield TokenSpan(at, at + len(token), reading)
        if spelled is not None:
            for end in range(min(at + len(spelled or BROKEN), len(text)), at - 1, -1):
                if _pattern(spelled).fullmatch(text, at, end):
                    yield TokenSpan(at, end, reading)
        if at == 0 and token[:1] in (" ", "▁") and text.startswith(token[1:]):
            yield TokenSpan(0, len(token) - 1, reading)  # SentencePiece starts every text with a space
    if not readings:
        yield from (TokenSpan(at, end, -1) for end in range(at, min(at + LONGEST_UNKNOWN, len(text)) + 1))
    elif number == 0:
        yield TokenSpan(at, at, 0)  # the token that marks the beginning of a text


@cache
def _spelling(token: str) -> str | None:
    """Another spelling of a token, with U+FFFD for the bytes of a split character; None if it has none."""
    if token == "" or BROKEN in token:
        return token
    if escaped := ESCAPED.match(token):
        return bytes.fromhex((escaped[1] or escaped[2]).replace("\\x", "")).decode(errors="replace")
    return token.replace("▁", " ") if "▁" in token else None


@cache
def _pattern(spelled: str) -> re.Pattern[str]:
    """What a spelling may stand for: each U+FFFD (or an empty token) is at most one character outside ASCII."""
    return re.compile(re.escape(spelled or BROKEN).replace(BROKEN, r"[^\x00-\x7f]?"))


def _split_characters(spans: list[TokenSpan], tokens: Sequence[Sequence[str]], text: str) -> list[TokenSpan]:
    """Assign each split character to the token in which it begins, by its share of the bytes of a run of pieces.

    If all pieces are empty, the server decoded the character at the token that ends it, which closes the run.
    """

    def is_piece(i: int) -> bool:
        span = spans[i]
        letters = text[span.start : span.end]
        empty = span.reading >= 0 and tokens[i][span.reading].strip(BROKEN) == ""
        return empty and (letters == "" or not letters.isascii())

    first = 0
    while first < len(spans):
        last = first
        while last < len(spans) and is_piece(last):
            last += 1
        start, end = spans[first].start, spans[max(last - 1, first)].end
        silent = all(tokens[i][spans[i].reading] == "" for i in range(first, last))
        if start == end and first < last < len(spans) and silent and not text[start : start + 1].isascii():
            spans[last] = spans[last]._replace(start=start + 1)
            end = start + 1
        if last - first >= end - start > 0:
            *begins, size = accumulate((len(letter.encode()) for letter in text[start:end]), initial=0)
            at = {first + -(-byte * (last - first) // size) for byte in begins}
            if len(at) == end - start:
                for i in range(first, last):
                    begin = start if i == first else spans[i - 1].end
                    spans[i] = spans[i]._replace(start=begin, end=begin + (i in at))
        first = last + 1
    return spans


def _from_byte_level(token: str) -> str:
    """The text of a token that is spelled in the alphabet of a byte-level vocabulary."""
    alphabet = _byte_alphabet()
    return bytes(map(alphabet.__getitem__, token)).decode(errors="replace") if set(token) <= alphabet.keys() else token


@cache
def _byte_alphabet() -> dict[str, int]:
    """Letter of a byte-level vocabulary -> byte: printable Latin-1 as it is, other bytes from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
