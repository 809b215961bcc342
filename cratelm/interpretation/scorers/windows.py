"""Windows of text on which a neuron fires, and windows on which it is silent: the classes that scorers separate.

All come from the scoring half of the records, so the explainer saw none of their documents. A positive is
cut around the strongest token of a recorded excerpt, which lies anywhere in it; a negative is a window of a random or
quantile excerpt on whose every token the neuron is silent. No two windows of a neuron overlap, and none is drawn twice.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from cratelm.activations.records import Excerpt, Kind, NeuronId, NeuronRecord
from cratelm.errors import CrateError
from cratelm.interpretation.prompts.escaping import Character, characters, shown_letter, text_of
from cratelm.interpretation.protocols import Part

TOO_FEW = "too few excerpts"
"""Reason: the scoring half has too few windows on which the neuron fires, or on which it is silent."""
MARKED = 0.3
"""A token is marked if its activation is at least this share of the window's strongest activation."""
SIGNS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("\N{LEFT DOUBLE ANGLE BRACKET}", "\N{RIGHT DOUBLE ANGLE BRACKET}"))
"""Delimiters of a mark, preferred first; code may contain some of them."""
ACTIVE_KINDS: tuple[Kind, ...] = ("top", "quantile", "random")
SILENT_KINDS: tuple[Kind, ...] = ("random", "quantile")


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Number and length of the windows."""

    width: int = 8
    """Tokens of a window. A dense neuron has more silent windows if they are short."""
    positives: int = 20
    """Most windows on which the neuron fires, drawn evenly from the strong ones and the weak ones."""
    negatives: int = 20
    """Most windows on which it is silent."""
    least: int = 5
    """Fewest windows of each class; a neuron with fewer counts as having too few excerpts."""
    strengths: int = 5
    """Groups of positives by strength: each gives the same number."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        if min(self.width, self.least, self.strengths) < 1:
            raise CrateError(
                f"width, least, strengths must be at least 1, got {self.width}, {self.least}, {self.strengths}"
            )
        if min(self.positives, self.negatives) < self.least:
            raise CrateError(
                f"positives and negatives must be at least {self.least}, got {self.positives} and {self.negatives}"
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
        """Random numbers for this neuron and purpose, independent of other draws."""
        return np.random.default_rng([seed, self.neuron.layer, self.neuron.index, *"/".join(what).encode()])


def contrast(
    record: NeuronRecord, windows: Windows, *, part: Part = "score", seen: Collection[int] = ()
) -> Contrast:  # fmt: skip
    """Draw the windows of one neuron from the excerpts of one half, by default the scoring half.

    `seen`: documents to draw no window from. With `part` explain these are the documents that the explainer saw, and
    no window is of the scoring half. Raises `CrateError` for records without held-out documents (`compat` mode).
    """
    scored = [
        (kind, tuple(excerpt for excerpt in excerpts if excerpt.document not in seen))
        for kind, excerpts in _recorded(record, part)
    ]
    if not scored:
        raise CrateError(
            "this scorer needs records with held-out documents, which mode compat does not have. "
            "Run: cratelm collect RUN --data DIR, and leave --mode out"
        )
    other = "explain" if part == "score" else "score"
    apart = {excerpt.document for _, excerpts in _recorded(record, other) for excerpt in excerpts} | set(seen)
    rng = np.random.default_rng([windows.seed, record.neuron.layer, record.neuron.index])
    active = _apart(_around_peaks(_of(scored, ACTIVE_KINDS), windows.width, rng))
    positives = tuple(_evenly(active, windows.positives, windows.strengths, rng))
    silent = list(_silent(_of(scored, SILENT_KINDS), windows.width))
    silent = _apart([*positives, *(silent[i] for i in rng.permutation(len(silent)))])[len(positives) :]
    drawn = Contrast(
        neuron=record.neuron, active=len(active), silent=len(silent), positives=positives,
        negatives=tuple(silent[: windows.negatives]),
    )  # fmt: skip
    used = {window.document for window in (*drawn.positives, *drawn.negatives)}
    assert used.isdisjoint(apart), f"{record.neuron} would be scored on documents it was explained from"
    return drawn


def _recorded(record: NeuronRecord, part: str) -> list[tuple[str, tuple[Excerpt, ...]]]:
    """Kind and excerpts of every recorded set of one half, longest excerpts first."""
    sets = sorted((-width, kind, split) for width, split, kind in record.excerpts)
    return [(kind, record.excerpts[-width, split, kind]) for width, kind, split in sets if split == part]


def _of(sets: Sequence[tuple[str, tuple[Excerpt, ...]]], kinds: Sequence[str]) -> Iterator[Excerpt]:
    for kind, excerpts in sets:
        if kind in kinds:
            yield from excerpts


def _around_peaks(excerpts: Iterable[Excerpt], width: int, rng: np.random.Generator) -> list[Excerpt]:
    """Windows with the strongest token of each excerpt at a random position, strongest first.

    A fixed position would reveal which windows are positives.
    """
    peaks = []
    for excerpt in excerpts:
        if len(excerpt.tokens) >= width and excerpt.activations.max() > 0:
            peak = int(excerpt.activations.argmax())
            first = peak - int(rng.integers(width))
            peaks.append(_cut(excerpt, min(max(first, 0), len(excerpt.tokens) - width), width))
    return sorted(peaks, key=lambda window: -float(window.activations.max()))


def _silent(excerpts: Iterable[Excerpt], width: int) -> Iterator[Excerpt]:
    """Adjacent windows in which the neuron is silent on every token."""
    for excerpt in excerpts:
        for first in range(0, len(excerpt.tokens) - width + 1, width):
            window = _cut(excerpt, first, width)
            if window.activations.max() <= 0:
                yield window


def silent_windows(record: NeuronRecord, width: int) -> list[Excerpt]:
    """Every window of the explaining half in which the neuron is silent on every token."""
    kinds = dict.fromkeys((*SILENT_KINDS, *ACTIVE_KINDS))
    return _apart(list(_silent(_of(_recorded(record, "explain"), tuple(kinds)), width)))


def _cut(excerpt: Excerpt, first: int, width: int) -> Excerpt:
    span = slice(first, first + width)
    return Excerpt(
        tokens=excerpt.tokens[span], activations=excerpt.activations[span], position=excerpt.position + first,
        document=excerpt.document,
    )  # fmt: skip


def _apart(windows: Sequence[Excerpt]) -> list[Excerpt]:
    """The windows that overlap no earlier one."""
    taken: set[int] = set()
    separate = []
    for window in windows:
        positions = range(window.position, window.position + len(window.tokens))
        if taken.isdisjoint(positions):
            taken.update(positions)
            separate.append(window)
    return separate


def _evenly(ordered: Sequence[Excerpt], count: int, groups: int, rng: np.random.Generator) -> Iterator[Excerpt]:
    """Equal numbers from each group of an ordered list, as far as the group has them; keeps the order."""
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


def num_marks_for_negatives(positives: Sequence[Excerpt]) -> int:
    """Number of tokens to mark in a negative: the mean number of marks in the positives, rounded up."""
    return math.ceil(float(np.mean([strong(window).sum() for window in positives])))


def drawn_marks(
    allowed: Bool[np.ndarray, " width"], count: int, rng: np.random.Generator
) -> Bool[np.ndarray, " width"]:
    """`count` random tokens of the allowed ones, or all of them."""
    places = np.flatnonzero(allowed)
    marks = np.zeros(len(allowed), dtype=bool)
    marks[rng.choice(places, size=min(count, len(places)), replace=False)] = True
    return marks


def signs_for(texts: Iterable[str]) -> tuple[str, str]:
    """Delimiters of marks in these texts: the first pair that no text contains."""
    together = "\n".join(texts)
    free = [pair for pair in SIGNS if not any(sign in together for sign in pair)]
    return free[0] if free else SIGNS[-1]


def raw(window: Excerpt, pieces: Sequence[bytes]) -> str:
    """The text of a window, line breaks included. `pieces` is the bytes of each token id."""
    return text_of([pieces[token] for token in window.tokens.tolist()])


def plain(window: Excerpt, pieces: Sequence[bytes]) -> str:
    """The text of a window on one line, as a list of windows shows it."""
    return "".join(shown_letter(character.text) for character in _characters(window, pieces))


def marked(window: Excerpt, marks: Bool[np.ndarray, " width"], pieces: Sequence[bytes], signs: tuple[str, str]) -> str:
    """The text of a window on one line, with the marked tokens between signs, neighbours together, spaces outside.

    A character split over several tokens is marked if one of them is: delimiters never split a character.
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
