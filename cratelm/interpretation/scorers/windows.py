"""Windows of text on which a neuron fires, and windows on which it is silent: what classifying scorers tell apart.

All come from the scoring half of the records, so that no document of theirs was seen by the explainer. A positive is
cut around the strongest token of a recorded excerpt, which lies anywhere in it; a negative is a window of a random or
quantile excerpt on whose every token the neuron is silent. No two windows of a neuron overlap, and none is drawn twice.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from cratelm.activations.records import Excerpt, Kind, NeuronId, NeuronRecord
from cratelm.errors import CrateError
from cratelm.interpretation.prompts.escaping import Character, characters, shown_letter, text_of

TOO_FEW = "too few excerpts"
"""Reason: the scoring half holds fewer windows than asked on which the neuron fires, or on which it is silent."""
MARKED = 0.3
"""A token is marked whose activation is at least this share of the window's strongest."""
SIGNS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("\N{LEFT DOUBLE ANGLE BRACKET}", "\N{RIGHT DOUBLE ANGLE BRACKET}"))
"""What a mark may be written as, best first; code has some of these of its own."""
ACTIVE_KINDS: tuple[Kind, ...] = ("top", "quantile", "random")
SILENT_KINDS: tuple[Kind, ...] = ("random", "quantile")


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How many windows are drawn, and how long they are."""

    width: int = 8
    """Tokens of a window. A dense neuron is silent throughout a short window more often than throughout a long one."""
    positives: int = 20
    """Most windows on which the neuron fires, drawn evenly from the strong ones and the weak ones."""
    negatives: int = 20
    """Most windows on which it is silent."""
    least: int = 5
    """Fewest of either; a neuron with fewer is counted as having too few excerpts."""
    strengths: int = 5
    """Groups of positives by strength: each gives the same number."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        if min(self.width, self.least, self.strengths) < 1:
            raise CrateError("width, least and strengths of the windows are at least 1")
        if min(self.positives, self.negatives) < self.least:
            raise CrateError(
                f"at least {self.least} positives and negatives are to be drawn: give more, or a lower least"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """The windows of one neuron."""

    neuron: NeuronId
    positives: tuple[Excerpt, ...] = field(repr=False)
    """Windows on which it fires, strongest first."""
    negatives: tuple[Excerpt, ...] = field(repr=False)
    """Windows on which it is silent, in random order."""
    active: int
    """Windows that the positives were drawn from."""
    silent: int
    """Windows that the negatives were drawn from."""

    def rng(self, seed: int, *what: str) -> np.random.Generator:
        """Random numbers for this neuron and purpose, whatever else is asked of it."""
        return np.random.default_rng([seed, self.neuron.layer, self.neuron.index, *"/".join(what).encode()])


def contrast(record: NeuronRecord, windows: Windows) -> Contrast:
    """Draw the windows of one neuron.

    Raises `CrateError` for records that keep no documents apart for scoring (`compat` mode).
    """
    scored = _recorded(record, "score")
    if not scored:
        raise CrateError(
            "only fixed records keep documents for scoring apart, on which an explanation can be tested like this. "
            "Run: cratelm collect RUN --data DIR, and leave --mode out"
        )
    explained = {excerpt.document for _, excerpts in _recorded(record, "explain") for excerpt in excerpts}
    rng = np.random.default_rng([windows.seed, record.neuron.layer, record.neuron.index])
    active = _apart(_around_peaks(_of(scored, ACTIVE_KINDS), windows.width, rng))
    positives = tuple(_evenly(active, windows.positives, windows.strengths, rng))
    silent = list(_silent(_of(scored, SILENT_KINDS), windows.width))
    silent = _apart([*positives, *(silent[i] for i in rng.permutation(len(silent)))])[len(positives) :]
    found = Contrast(
        neuron=record.neuron, active=len(active), silent=len(silent), positives=positives,
        negatives=tuple(silent[: windows.negatives]),
    )  # fmt: skip
    used = {window.document for window in (*found.positives, *found.negatives)}
    assert used.isdisjoint(explained), f"{record.neuron} would be scored on documents it was explained from"
    return found


def _recorded(record: NeuronRecord, part: str) -> list[tuple[str, tuple[Excerpt, ...]]]:
    """Kind and excerpts of every recorded set of one half, longest excerpts first."""
    sets = sorted((-width, kind, split) for width, split, kind in record.excerpts)
    return [(kind, record.excerpts[-width, split, kind]) for width, kind, split in sets if split == part]


def _of(sets: Sequence[tuple[str, tuple[Excerpt, ...]]], kinds: Sequence[str]) -> Iterator[Excerpt]:
    for kind, excerpts in sets:
        if kind in kinds:
            yield from excerpts


def _around_peaks(excerpts: Iterable[Excerpt], width: int, rng: np.random.Generator) -> list[Excerpt]:
    """Windows that hold the strongest token of each excerpt at a place drawn for each, strongest first.

    Were it always the same place, the place would tell positives from negatives.
    """
    found = []
    for excerpt in excerpts:
        if len(excerpt.tokens) >= width and excerpt.activations.max() > 0:
            peak = int(excerpt.activations.argmax())
            first = peak - int(rng.integers(width))
            found.append(_cut(excerpt, min(max(first, 0), len(excerpt.tokens) - width), width))
    return sorted(found, key=lambda window: -float(window.activations.max()))


def _silent(excerpts: Iterable[Excerpt], width: int) -> Iterator[Excerpt]:
    """Windows, side by side, on whose every token the neuron is silent."""
    for excerpt in excerpts:
        for first in range(0, len(excerpt.tokens) - width + 1, width):
            window = _cut(excerpt, first, width)
            if window.activations.max() <= 0:
                yield window


def _cut(excerpt: Excerpt, first: int, width: int) -> Excerpt:
    own = slice(first, first + width)
    return Excerpt(
        tokens=excerpt.tokens[own], activations=excerpt.activations[own], position=excerpt.position + first,
        document=excerpt.document,
    )  # fmt: skip


def _apart(windows: Sequence[Excerpt]) -> list[Excerpt]:
    """Those that overlap none before them."""
    taken: set[int] = set()
    found = []
    for window in windows:
        own = range(window.position, window.position + len(window.tokens))
        if taken.isdisjoint(own):
            taken.update(own)
            found.append(window)
    return found


def _evenly(ordered: Sequence[Excerpt], count: int, groups: int, rng: np.random.Generator) -> Iterator[Excerpt]:
    """As many from every group of neighbours in an order, as far as it has them; the order stays."""
    parts = [list(part) for part in np.array_split(np.arange(len(ordered)), groups)]
    shares = [0] * groups
    for turn in range(min(count, len(ordered)) * groups):
        if sum(shares) == min(count, len(ordered)):
            break
        shares[turn % groups] += shares[turn % groups] < len(parts[turn % groups])
    drawn = [i for part, share in zip(parts, shares, strict=True) for i in rng.choice(part, size=share, replace=False)]
    yield from (ordered[int(i)] for i in sorted(drawn))


def strong(window: Excerpt) -> Bool[np.ndarray, " width"]:
    """The tokens to mark in a window on which the neuron fires."""
    return (window.activations > 0) & (window.activations >= MARKED * window.activations.max())


def marks_of_strangers(positives: Sequence[Excerpt]) -> int:
    """How many tokens to mark where the marks mean nothing: the mean of those marked in the positives, rounded up."""
    return math.ceil(float(np.mean([strong(window).sum() for window in positives])))


def drawn_marks(
    allowed: Bool[np.ndarray, " width"], count: int, rng: np.random.Generator
) -> Bool[np.ndarray, " width"]:
    """So many of the allowed tokens, or all of them."""
    places = np.flatnonzero(allowed)
    marks = np.zeros(len(allowed), dtype=bool)
    marks[rng.choice(places, size=min(count, len(places)), replace=False)] = True
    return marks


def signs_for(texts: Iterable[str]) -> tuple[str, str]:
    """How to write marks in these texts: the first pair of signs that none of them holds."""
    together = "\n".join(texts)
    free = [pair for pair in SIGNS if not any(sign in together for sign in pair)]
    return free[0] if free else SIGNS[-1]


def raw(window: Excerpt, pieces: Sequence[bytes]) -> str:
    """The text of a window as it was written, line breaks and all. `pieces` is the bytes of each token id."""
    return text_of([pieces[token] for token in window.tokens.tolist()])


def plain(window: Excerpt, pieces: Sequence[bytes]) -> str:
    """The text of a window on one line, as a list of windows shows it."""
    return "".join(shown_letter(one.text) for one in _characters(window, pieces))


def marked(window: Excerpt, marks: Bool[np.ndarray, " width"], pieces: Sequence[bytes], signs: tuple[str, str]) -> str:
    """The text of a window on one line, with the marked tokens between signs, neighbours together, spaces outside.

    A character that lies in several tokens is marked where one of them is: no sign stands inside a character.
    """
    text, run = "", ""
    for letter, first, last in _characters(window, pieces):
        if marks[first : last + 1].any():
            run += shown_letter(letter)
        else:
            text, run = text + _between(run, signs) + shown_letter(letter), ""
    return text + _between(run, signs)


def _between(run: str, signs: tuple[str, str]) -> str:
    bare = run.lstrip(" ") or run
    return f"{run[: len(run) - len(bare)]}{signs[0]}{bare}{signs[1]}" if run else ""


def _characters(window: Excerpt, pieces: Sequence[bytes]) -> list[Character]:
    return characters([pieces[token] for token in window.tokens.tolist()])
