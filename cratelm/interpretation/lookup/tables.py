"""Explaining without an LLM: an explanation is a table from tokens to activations, a simulation looks them up.

A neuron that is a function of the current token alone is explained fully by such a table; the table misses context. So
lookup is both an explainer that needs no other model and the baseline for other explainers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, Integer

from cratelm.activations.records import Excerpts

EXPLAINER = "lookup"
_NAMED = 8
"""Most tokens in a sentence."""
FAINT = 0.1
"""A sentence only counts tokens below this share of the strongest token's mean."""
_CHUNK = 16
"""Neurons at a time: their working arrays stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """For each of many neurons: token -> mean activation, for the tokens on which that is not 0."""

    first: Int64[np.ndarray, " neurons_plus_1"]
    """Where each neuron's entries begin in the two arrays below; one more number for the end."""
    tokens: Int32[np.ndarray, " entries"]
    """Token ids, ascending within a neuron."""
    means: Float32[np.ndarray, " entries"]
    """Mean activation over every occurrence in the explaining excerpts, in the model's own units."""

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, row: int) -> tuple[Int32[np.ndarray, " entries"], Float32[np.ndarray, " entries"]]:
        """Tokens and means of one neuron."""
        span = slice(self.first[row], self.first[row + 1])
        return self.tokens[span], self.means[span]

    def take(self, rows: Int[np.ndarray, " chosen"]) -> "Tables":
        """The tables of some neurons, in the order given, repeats allowed."""
        return tables_of([self.of(int(row)) for row in rows])


def tables_of(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tables:
    """Tables from each neuron's (tokens, means)."""
    first = np.cumsum([0, *(len(tokens) for tokens, _ in rows)], dtype=np.int64)
    return Tables(
        first=first, tokens=np.concatenate([tokens for tokens, _ in rows] or [np.empty(0)]).astype(np.int32),
        means=np.concatenate([means for _, means in rows] or [np.empty(0)]).astype(np.float32),
    )  # fmt: skip


def explain(excerpts: Excerpts) -> Tables:
    """Average each neuron's activation on each token it is shown.

    One sort per neuron, of numbers that hold the token above and the place below, brings equal tokens together.
    """
    parts = [_means(excerpts.rows(rows)) for rows in _chunks(len(excerpts.tokens))]
    counts, tokens, means = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Tables(first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), tokens=tokens, means=means)


def _means(
    excerpts: Excerpts,
) -> tuple[Int64[np.ndarray, " chunk"], Int32[np.ndarray, " entries"], Float32[np.ndarray, " entries"]]:
    """Entries of each neuron, and the tokens and means of all entries."""
    neurons, size = len(excerpts.tokens), excerpts.tokens.shape[1] * excerpts.tokens.shape[2]
    bits = size.bit_length()
    order = np.sort((excerpts.tokens.reshape(neurons, size).astype(np.int64) << bits) + np.arange(size), axis=1)
    tokens, places = order >> bits, order & ((1 << bits) - 1)
    activations = np.take_along_axis(excerpts.activations.reshape(neurons, size), places, axis=1).astype(np.float64)
    is_first = np.ones(tokens.shape, dtype=bool)
    np.not_equal(tokens[:, 1:], tokens[:, :-1], out=is_first[:, 1:])
    starts = np.flatnonzero(is_first)
    means = np.add.reduceat(activations.ravel(), starts) / np.diff(starts, append=tokens.size)
    nonzero = (tokens.ravel()[starts] >= 0) & (means != 0)
    counts = np.bincount(starts[nonzero] // size, minlength=neurons)
    return counts, tokens.ravel()[starts[nonzero]].astype(np.int32), means[nonzero].astype(np.float32)


def simulate(
    tables: Tables, tokens: Integer[np.ndarray, "neurons excerpts width"]
) -> Float32[np.ndarray, "neurons excerpts width"]:
    """Look each token up in its neuron's table; a token that is not there gets 0.

    0 is what the explanation says: the neuron does not fire there. It is the same for every neuron and protocol, while
    a baseline from the explaining excerpts would differ in meaning between protocols, and most of those excerpts were
    chosen because the neuron fires in them.
    """
    assert len(tables) == len(tokens), f"{len(tables)} tables for the excerpts of {len(tokens)} neurons"
    vocabulary = 1 + max(tokens.max(initial=0), tables.tokens.max(initial=0))
    dense = np.zeros(_CHUNK * vocabulary, dtype=np.float32)
    simulated = np.empty(tokens.shape, dtype=np.float32)
    for rows in _chunks(len(tokens)):
        entries = slice(tables.first[rows.start], tables.first[rows.stop])
        own_row = np.repeat(np.arange(rows.stop - rows.start), np.diff(tables.first[rows.start : rows.stop + 1]))
        cells = own_row * vocabulary + tables.tokens[entries]
        dense[cells] = tables.means[entries]
        asked = tokens[rows]
        offsets = np.arange(rows.stop - rows.start)[:, None, None] * vocabulary
        np.multiply(dense.take(np.maximum(asked, 0) + offsets), asked >= 0, out=simulated[rows])
        dense[cells] = 0  # cheaper than a fresh table: a neuron has a few hundred entries, a vocabulary 50,000
    return simulated


def _chunks(neurons: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, neurons)) for start in range(0, max(neurons, 1), _CHUNK))


def sentence(
    tokens: Integer[np.ndarray, " entries"], means: Float32[np.ndarray, " entries"], strings: Sequence[str]
) -> str:
    """A table in words, strongest tokens first: `fires on " return" (3.2), "def" (2.9); on nothing else`.

    `strings` is the text of each token id. The last clause is what the simulation takes literally: 0 elsewhere.
    """
    order = np.lexsort((tokens, -means))
    order = order[means[order] > 0]
    if not len(order):
        return "does not fire in the excerpts it was explained from"
    named = order[:_NAMED][means[order[:_NAMED]] >= FAINT * means[order[0]]]
    words = ", ".join(f"{legible(strings[tokens[i]])} ({brief(float(means[i]))})" for i in named)
    others = order[len(named) :]
    if not len(others):
        return f"fires on {words}; on nothing else"
    more = f"{len(others)} more token{'s' * (len(others) > 1)}"
    return f"fires on {words}; up to {brief(float(means[others[0]]))} on {more}; on nothing else"


def legible(text: str) -> str:
    r"""A token in quotes with its white space made visible: `" return"`, `"↵"`, `"␣␣␣␣"`, `"⇥⇥"`."""
    if text.strip(" ") == "":
        text = text.replace(" ", "␣")
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    return f'"{shown}"'


def brief(activation: float) -> str:
    """Two significant digits, without an exponent for large numbers."""
    return f"{activation:.0f}" if activation >= 100 else f"{activation:.2g}"
