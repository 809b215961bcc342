"""Which tokens the collector reads in `fixed` mode: documents cut into rows and rows into windows, before any pass.

Each document is read separately, in rows that fit the model's context. A row starts with `warmup` tokens of context
that are in no window: the tokens with which every row of the model begins, or the end-of-text token that leads a
document, count as some of them. Windows tile the rest, so each token lies in one window of each width. The plan is a
function of the corpus and the seed, so excerpts can be drawn before the pass.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Integer

from cratelm.errors import CrateError

SPLITS = ("explain", "score")
"""A hash of its content and the seed assigns each document to explaining or to scoring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """What to record in `fixed` mode."""

    wide: int = 64
    """Tokens of the excerpts for top-and-random and random-only."""
    narrow: int = 8
    """Tokens of the excerpts for anthropic."""
    top_wide: int = 20
    """Strongest wide excerpts kept per neuron and split, one per document."""
    top_narrow: int = 25
    random: int = 10
    """Random excerpts per neuron, split and width."""
    sample_wide: int = 64
    """Uniformly sampled wide excerpts per neuron and split; random and quantile excerpts are drawn from them."""
    sample_narrow: int = 192
    quantiles_wide: int = 5
    """Intervals of equal share of a neuron's sampled excerpts, ranked by their maximum."""
    quantiles_narrow: int = 12
    """As above; no excerpts of the strongest interval are kept, as in the paper's protocol."""
    per_quantile: int = 2
    """Excerpts kept per interval and split."""
    warmup: int = 4
    """Tokens at the start of each row that are context only, the beginning of the row included."""
    seed: int = 0
    """Seed of the document split and of random excerpts."""
    batch_rows: int = 16
    """Rows per forward pass."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of tokens for the forward passes, longest first, documents in order among equals."""

    wide: int
    """Tokens of a wide window (the paper's 64)."""
    narrow: int
    """Tokens of a narrow window (the paper's 8); divides `wide`."""
    warmup: int
    """Tokens at the start of each row that are context only."""
    row_position: Int[np.ndarray, " rows"]
    """Index in the corpus of the row's first token; one less than the document's first where end-of-text leads."""
    row_length: Int[np.ndarray, " rows"]
    """Tokens in the row, the warm-up included."""
    row_document: Int[np.ndarray, " rows"]
    document_position: Int[np.ndarray, " documents"]
    document_split: Int[np.ndarray, " documents"]
    """Index into `SPLITS`."""
    short: Bool[np.ndarray, " documents"]
    """Documents with fewer tokens than a wide window; each has one shorter window."""

    def windows(self, width: int) -> Int[np.ndarray, " rows"]:
        """Number of windows in each row. A remainder at the end of a document is in no window."""
        inside = self.row_length - self.warmup
        whole = inside // width
        return np.where((whole == 0) & self.short[self.row_document], 1, whole)

    def window_length(self, rows: slice, width: int) -> Int[np.ndarray, " some_rows"]:
        """Tokens in the windows of each row: `width`, or fewer in a short document."""
        return np.minimum(self.row_length[rows] - self.warmup, width)

    def row_split(self) -> Int[np.ndarray, " rows"]:
        """Split (explain or score) of each row's document."""
        return self.document_split[self.row_document]

    @property
    def num_tokens(self) -> int:
        """Tokens whose activations are measured."""
        return int((self.row_length - self.warmup).sum())


def make_plan(
    tokens: Integer[np.ndarray, " stream"],
    documents: Int[np.ndarray, " bounds"],
    *,
    context: int,
    wide: int = 64,
    narrow: int = 8,
    warmup: int = 4,
    max_tokens: int | None = None,
    seed: int = 0,
    lead: int = 1,
) -> Plan:
    """Cut a corpus into rows. `documents` has the start of each, which ends in <|endoftext|>, and the last end.

    `lead` is 1 if the end-of-text token before a document belongs to its first row, else 0. With `max_tokens`, only
    the first documents, of about that many tokens together.
    """
    assert wide % narrow == 0, "narrow windows tile wide ones"
    per_row = (context - warmup) // wide * wide
    if per_row == 0:
        raise CrateError(
            f"the model's context must be at least {wide + warmup} tokens (an excerpt of {wide} after {warmup} of "
            f"warm-up), got {context}. Use a model with a longer context"
        )
    if max_tokens is not None:
        documents = documents[: max(2, np.searchsorted(documents, max_tokens, side="right"))]
    content = np.diff(documents) - 1  # without the closing <|endoftext|>
    measured = np.maximum(content + lead - warmup, 0)
    rows = -(-measured // per_row)
    row_document = np.repeat(np.arange(len(content)), rows)
    index = np.arange(len(row_document)) - np.repeat(np.cumsum(rows) - rows, rows)
    inside = np.minimum(measured[row_document] - index * per_row, per_row)
    order = np.argsort(-inside, kind="stable")
    return Plan(
        wide=wide, narrow=narrow, warmup=warmup,
        row_position=(documents[:-1][row_document] - lead + index * per_row)[order],
        row_length=(inside + warmup)[order], row_document=row_document[order],
        document_position=documents[:-1].astype(np.int64), document_split=split_documents(tokens, documents, seed),
        short=measured < wide,
    )  # fmt: skip


def split_documents(
    tokens: Integer[np.ndarray, " stream"], documents: Int[np.ndarray, " bounds"], seed: int
) -> Int[np.ndarray, " documents"]:
    """0 (explain) or 1 (score) for each document, about half each, by a hash of content and seed."""
    key = seed.to_bytes(8, "little", signed=True)
    halves = [
        hashlib.blake2b(tokens[first:last].tobytes(), digest_size=1, key=key).digest()[0] & 1
        for first, last in zip(documents[:-1], documents[1:], strict=True)
    ]
    return np.array(halves, dtype=np.int64)


def read_rows(
    tokens: Integer[np.ndarray, " stream"], position: Int[np.ndarray, " rows"], length: int, end_of_text: int
) -> Int[np.ndarray, "rows length"]:
    """Token ids of rows of up to `length` tokens; the corpus' first document gets its leading <|endoftext|> here.

    A shorter row is padded with the tokens that follow in the corpus: a causal model does not read them at earlier
    positions, and no window covers them.
    """
    index = position[:, None] + np.arange(length)
    rows = tokens[np.clip(index, 0, len(tokens) - 1)].astype(np.int64)
    return np.where(index < 0, end_of_text, rows)
