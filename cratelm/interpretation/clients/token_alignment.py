"""Where in a text the tokens lie that a server names, when all it gives is each token's text.

Servers decode tokens one by one. A token that is a part of a character then comes as U+FFFD or as nothing, one of a
SentencePiece model without the space it begins with, some come as the vocabulary spells them, and before the first
there may be one that the text does not have. So the text decides: the tokens are laid along it, one after the other,
each in the first way that lets all the others find their place.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from os.path import commonprefix
from typing import NamedTuple

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST_UNKNOWN = 64
"""Characters of the text that a token whose text was not told may stand for: the first of a prompt."""
PATIENCE = 20
"""Steps for each token and character before a text counts as another one: a right one takes one and a few."""
ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)$|<0x([0-9a-fA-F]{2})>$")


class Place(NamedTuple):
    """Where a token lies."""

    start: int
    """Offset in the text of its first character."""
    end: int
    """Offset after its last; equal to `start` for a token that holds no character's beginning."""
    option: int
    """Which of the texts it may have, it has; -1 where none was told."""


def align(tokens: Sequence[Sequence[str]], text: str) -> list[Place] | None:
    """Lay tokens along a text; each is given by the texts it may have, most likely first, or by none if not told.

    A character that is cut stands with the first of its tokens. Tokens after the end of the text are left out. None
    where the tokens do not spell the text.
    """
    first = None
    # The likeliest texts alone, however they are spelt, before any others: of tables of candidates, some nothing but a
    # byte, a wrong spelling can be put together that needs every token.
    for likeliest in (True, False):
        told = [options[:1] for options in tokens] if likeliest else tokens
        for spaceless, decoded in ((False, False), (False, True), (True, False)):
            spelt = [[_decoded(token) for token in options] for options in told] if decoded else told
            found = _laid(spelt, text, spaceless=spaceless)
            # A first token whose text was not told can stand for a whole short text; better is one that needs them all.
            if found is not None and len(found) == len(tokens):
                return found
            first = first or found
    return first


class Layout(NamedTuple):
    """How tokens with one text each were laid along a text."""

    text: str
    tokens: Sequence[str | None]
    """The text of each; None where it was not told."""
    places: list[Place]


def align_like(before: Layout | None, tokens: Sequence[str | None], text: str) -> Layout | None:
    """As `align`, of tokens with one text each; what begins as another text did, tokens and all, lies as that did.

    Texts that are asked about one after the other mostly begin alike. None where `align` has to be told more.
    """
    known = _alike(before, tokens, text) if before is not None else []
    options = [() if token is None else (token,) for token in tokens]
    for begun in (known, []) if known else ([],):
        places = _laid(options, text, known=begun)
        if places is not None and len(places) == len(tokens):
            return Layout(text, tokens, places)
    return None


def _alike(before: Layout, tokens: Sequence[str | None], text: str) -> list[Place]:
    """The places that tokens surely share with those of a text laid before."""
    pairs = enumerate(zip(before.tokens, tokens, strict=False))
    count = next((i for i, (one, other) in pairs if one != other), min(len(before.tokens), len(tokens)))
    same = len(commonprefix([before.text, text]))
    while count:
        start, end, _ = before.places[count - 1]
        # Only behind a token that is there letter by letter, and not in the midst of a character.
        if end < same and text[start:end] == tokens[count - 1] != "" and text[start : end + 1].isascii():
            break
        count -= 1
    return before.places[:count]


def _laid(
    tokens: Sequence[Sequence[str]], text: str, *, spaceless: bool = False, known: Sequence[Place] = ()
) -> list[Place] | None:
    """As `align`, with tokens as they are; or `spaceless`, where each has lost one space that it began with.

    `known`: the places of the first tokens.
    """
    ways: list[Iterator[Place]] = [iter(())] * len(known)
    places: list[Place] = list(known)
    refused: set[tuple[int, int]] = set()
    cursor, steps = places[-1].end if places else 0, PATIENCE * (len(tokens) + len(text))
    while cursor < len(text):
        number, steps = len(places), steps - 1
        if steps < 0:
            return None
        if len(ways) == number:
            here = tokens[number] if number < len(tokens) else None
            ways.append(iter(()) if here is None else _ways(here, text, cursor, number, spaceless))
        place = next((one for one in ways[number] if (number + 1, one.end) not in refused), None)
        if place is not None:
            places.append(place)
            cursor = place.end
        else:
            refused.add((number, cursor))
            ways.pop()
            if not places:
                return None
            cursor = places.pop().start
    new, own = places[len(known) :], tokens[len(known) :]
    return [*known, *_with_first(_shared_out(new, own, text), own, text)]


def _ways(options: Sequence[str], text: str, at: int, number: int, spaceless: bool) -> Iterator[Place]:
    """The ways in which one token may lie at an offset, likeliest first."""
    for option, token in enumerate(options):
        if spaceless and text[at] == " " and text.startswith(token, at + 1):
            yield Place(at, at + 1 + len(token), option)
            if at:
                continue
        ends = [at + len(token)] if token and text.startswith(token, at) else []
        ends += [end for spelt in _spellings(token) for end in _ends(spelt, text, at) if end not in ends]
        if at == 0 and token[:1] in (" ", "▁") and text.startswith(token[1:]) and len(token) - 1 not in ends:
            ends.append(len(token) - 1)  # SentencePiece begins every text with a space
        yield from (Place(at, end, option) for end in ends)
    if not options:
        yield from (Place(at, end, -1) for end in range(at, min(at + LONGEST_UNKNOWN, len(text)) + 1))
    elif number == 0:
        yield Place(at, at, 0)  # the token that marks the beginning of a text


def _spellings(token: str) -> Iterator[str]:
    """What a token may mean, with U+FFFD for the bytes of an unfinished character."""
    if token == "" or BROKEN in token:
        yield token
    elif escaped := ESCAPED.match(token):
        yield bytes.fromhex((escaped[1] or escaped[2]).replace("\\x", "")).decode(errors="replace")
    elif "▁" in token:
        yield token.replace("▁", " ")


def _ends(spelt: str, text: str, at: int) -> list[int]:
    """Where a token with unfinished characters may end: each of them is there as a character or belongs elsewhere."""
    if BROKEN not in spelt and spelt:
        return [at + len(spelt)] if text.startswith(spelt, at) else []
    found = [at]
    for piece in re.split(f"({BROKEN}+)", spelt or BROKEN):
        if piece.startswith(BROKEN):
            found = [end for start in found for end in _unfinished(text, start, len(piece))]
        else:
            found = [start + len(piece) for start in found if text.startswith(piece, start)]
    return sorted(set(found), reverse=True)


def _unfinished(text: str, at: int, longest: int) -> Iterator[int]:
    """`at` and the offsets after it over characters that take several bytes."""
    yield at
    for end in range(at + 1, min(at + longest, len(text)) + 1):
        if text[end - 1].isascii():
            return
        yield end


def _shared_out(places: list[Place], tokens: Sequence[Sequence[str]], text: str) -> list[Place]:
    """Where several cut characters follow one another, deal them out over their tokens by bytes."""
    first = 0
    while first < len(places):
        last = first
        while last < len(places) and _is_piece(tokens[last], places[last], text):
            last += 1
        start, end = places[first].start, places[max(last - 1, first)].end
        if 2 <= end - start < last - first:
            *begins, size = accumulate((len(letter.encode()) for letter in text[start:end]), initial=0)
            at = {first + -(-byte * (last - first) // size) for byte in begins}
            if len(at) == end - start:
                for number in range(first, last):
                    begin = start if number == first else places[number - 1].end
                    places[number] = places[number]._replace(start=begin, end=begin + (number in at))
        first = last + 1
    return places


def _is_piece(options: Sequence[str], place: Place, text: str) -> bool:
    """Whether a token is nothing but a part of a character."""
    held = text[place.start : place.end]
    return place.option >= 0 and options[place.option] in ("", BROKEN) and (held == "" or not held.isascii())


def _with_first(places: list[Place], tokens: Sequence[Sequence[str]], text: str) -> list[Place]:
    """Move a character to the first of its tokens where the server gave it to the last, and nothing to those before."""
    for i, place in enumerate(places):
        empty = place.end == place.start and place.option >= 0 and _is_unfinished(tokens[i][place.option])
        if empty and (i == 0 or not _is_unfinished(_told(tokens[i - 1], places[i - 1]))):
            last = next((j for j in range(i, len(places)) if places[j].end > place.start), None)
            if last is not None and not text[place.start].isascii():
                places[i] = place._replace(end=place.end + 1)
                for j in range(i + 1, last + 1):
                    places[j] = places[j]._replace(start=place.start + 1, end=max(places[j].end, place.start + 1))
    return places


def _told(options: Sequence[str], place: Place) -> str:
    return options[place.option] if place.option >= 0 else ""


def _is_unfinished(token: str) -> bool:
    return token == "" or BROKEN in token


def _decoded(token: str) -> str:
    """A token of a byte-level vocabulary, spelt as that spells it, as text."""
    return bytes(map(_bytes().__getitem__, token)).decode(errors="replace") if set(token) <= _bytes().keys() else token


@cache
def _bytes() -> dict[str, int]:
    """Letter of a byte-level vocabulary -> byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
