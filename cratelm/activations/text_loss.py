"""Whether a model predicts a text at all: its loss next to that of a unigram model, on the beginnings of documents.

A model that reads rows without its beginning token, or tokens of another tokenizer, predicts worse than token
frequencies do; its activations then mean nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from cratelm.activations.causal_model import CausalModel
from cratelm.activations.observe import with_beginning
from cratelm.activations.subject import Corpus

ROW, TOKENS = 256, 1024
"""Longest row, and about how many tokens are predicted."""
UNIGRAM_TOKENS = 1 << 22
"""Token frequencies are counted over this many first tokens of the split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLoss:
    """Losses on the same tokens, in nats per token."""

    model: float
    unigram: float
    """Of predicting by the frequencies of the tokens in the read text itself, the best that a unigram model can do."""
    tokens: int


@torch.inference_mode()
def loss_on(
    causal: CausalModel, corpus: Corpus, row_beginning: Sequence[int] | None, *, bf16: bool = False
) -> TextLoss:  # fmt: skip
    """The losses on the first tokens of the first documents, each predicted from its row.

    `row_beginning` is as in `Subject`: the tokens before each row, or None for the end-of-text token.
    """
    begin = (corpus.end_of_text,) if row_beginning is None else tuple(row_beginning)
    log_frequency = _log_frequencies(corpus)
    total = unigram = count = 0.0
    for row in _rows(corpus, min(ROW, (causal.context_length or ROW) - len(begin))):
        tokens = with_beginning(torch.from_numpy(row)[None].to(causal.device), begin)
        with torch.autocast(causal.device.type, dtype=torch.bfloat16, enabled=bf16):
            losses = causal.token_losses(tokens[:, :-1], tokens[:, 1:])[0, len(begin) :]
        total, count = total + float(losses.double().sum()), count + len(row) - 1
        unigram -= float(log_frequency[row[1:]].sum())
    return TextLoss(model=total / max(count, 1), unigram=unigram / max(count, 1), tokens=int(count))


def _rows(corpus: Corpus, longest: int) -> Iterator[Int[np.ndarray, " row"]]:
    """The beginnings of the first documents with at least two tokens."""
    taken = 0
    for start, end in zip(corpus.documents[:-1], corpus.documents[1:], strict=True):
        row = corpus.tokens[start : min(end - 1, start + longest)].astype(np.int64)
        if len(row) >= 2:
            yield row
            taken += len(row) - 1
        if taken >= TOKENS:
            return


def _log_frequencies(corpus: Corpus) -> np.ndarray:
    counts = np.bincount(corpus.tokens[:UNIGRAM_TOKENS].astype(np.int64))
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())
