"""The tokens that the released procedure reads, may choose as peaks, and may show as windows.

Tokens are counted in three ways. A position is an index in the split. A place is an index among the tokens that are
read, block after block. A number counts those of them that may be chosen, which is all of them unless
`skip-first-tokens` is on. With no repair the three are the same.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int
from torch import Tensor

from cratelm.activations.repairs import REPAIRS, Repair

WIDE, NARROW = 64, 8
TOKENS = {WIDE: 8_192_000, NARROW: 819_200}
"""The released corpus: 8000 blocks of 1024 tokens for the 64-token records, 800 for the 8-token ones."""
SKIPPED = 4
"""Tokens that `skip-first-tokens` leaves out at the start of each block; they have little context or none."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The tokens that are read for the records of one width."""

    blocks: Int[np.ndarray, " blocks"]
    """Position of each block's first token, ascending."""
    context: int
    """Tokens of a block."""
    documents: Int[np.ndarray, " bounds"]
    """Position where each document of the split starts, and where the last ends."""
    repairs: frozenset[Repair] = frozenset()

    @property
    def skipped(self) -> int:
        """Tokens at the start of each block that may not be chosen."""
        return min(SKIPPED, self.context - 1) if "skip-first-tokens" in self.repairs else 0

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return len(self.blocks) * self.context

    @property
    def choosable(self) -> int:
        """Read tokens that may be chosen."""
        return len(self.blocks) * (self.context - self.skipped)

    def place(self, number: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
        """Places of the choosable tokens with these numbers."""
        if not self.skipped:
            return number
        each = self.context - self.skipped
        return number // each * self.context + self.skipped + number % each

    def position(self, place: Int[np.ndarray, "*some"]) -> Int[np.ndarray, "*some"]:
        """Positions in the split of the tokens at these places."""
        return self.blocks[place // self.context] + place % self.context

    @cached_property
    def cuts(self) -> Int[np.ndarray, " cuts"]:
        """Places that no window reaches over, from 0 to the end: where what is read next does not follow in the split.

        With `clip-windows` also where a block or a document ends.
        """
        starts = np.arange(len(self.blocks)) * self.context
        if "clip-windows" not in self.repairs:
            starts = starts[np.diff(self.blocks, prepend=-2 * self.context) != self.context]
            return np.append(starts, self.tokens)
        first, last = np.searchsorted(self.documents, [self.blocks[0], self.blocks[-1] + self.context])
        inside = self.documents[first:last]
        block = np.searchsorted(self.blocks, inside, side="right") - 1
        offset = inside - self.blocks[block]
        documents = (block * self.context + offset)[offset < self.context]
        return np.union1d(starts, np.append(documents, self.tokens))

    @cached_property
    def pieces(self) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
        """Number of the first choosable token of each stretch of one document, ascending, and the document's index."""
        columns = np.arange(self.skipped, self.context)
        positions = (self.blocks[:, None] + columns).ravel()
        document = np.searchsorted(self.documents, positions, side="right") - 1
        first = np.flatnonzero(np.diff(document, prepend=-1))
        return first, document[first]

    @property
    def documents_read(self) -> int:
        """Number of documents of which at least one token is read."""
        ends = self.blocks + self.context
        first = np.searchsorted(self.documents, self.blocks, side="right") - 1
        last = np.searchsorted(self.documents, ends, side="left")
        return len(np.unique(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])))


def corpus_tokens(available: int, context: int, max_tokens: int | None) -> dict[int, int]:
    """Tokens read for each width: whole blocks, at most as many as the released procedure reads."""
    whole = min(available, max_tokens or available) // context * context
    return {width: min(whole, limit // context * context) for width, limit in TOKENS.items()}


def readings(
    documents: Int[np.ndarray, " bounds"],
    *,
    available: int,
    context: int,
    max_tokens: int | None = None,
    repairs: Collection[Repair] = (),
) -> dict[int, Reading]:
    """What is read for each width: the first blocks of a split of `available` tokens, or blocks spread over all of it.

    The blocks of the narrow records are some of those of the wide ones.
    """
    assert set(repairs) <= set(REPAIRS), f"repairs are {', '.join(REPAIRS)}"
    chosen, found = np.arange(available // context) * context, {}
    for width, tokens in corpus_tokens(available, context, max_tokens).items():
        count = tokens // context
        chosen = (
            chosen[np.arange(count) * len(chosen) // max(count, 1)] if "spread-blocks" in repairs else chosen[:count]
        )
        found[width] = Reading(blocks=chosen, context=context, documents=documents, repairs=frozenset(repairs))
    return found
