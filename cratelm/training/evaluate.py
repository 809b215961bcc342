"""Held-out loss: one deterministic pass, with a standard error over documents."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, Integer

from cratelm.distributed import ALONE, World
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import ProgressBar
from cratelm.training.document_means import mean_over_documents


class StoppedError(Exception):
    """An evaluation was stopped before its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a model predicts a text."""

    nats_per_token: float
    """Mean cross-entropy over all predicted tokens."""
    standard_error: float
    """Of `nats_per_token`, in nats; documents are the sampling unit."""
    perplexity: float
    """exp(nats_per_token)."""
    bits_per_byte: float
    """Total cross-entropy in bits over the bytes of the text as UTF-8: comparable between tokenizers."""
    tokens: int
    """Predicted tokens."""
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossesByDocument:
    """The cross-entropy of a text, by document."""

    nats: Float64[np.ndarray, " documents"]
    """Summed cross-entropy of each document's tokens."""
    tokens: Int64[np.ndarray, " documents"]
    """Predicted tokens of each."""


@torch.inference_mode()
def document_losses(
    model: LanguageModel,
    tokens: Integer[np.ndarray, " stream"],
    documents: Int[np.ndarray, " bounds"],
    *,
    batch: int,
    bar: ProgressBar,
) -> LossesByDocument:
    """The summed loss and the number of predicted tokens of every document.

    Each token is predicted once, in non-overlapping sequences of the model's context. `documents` holds where each
    document starts, and the end of the last.
    """
    if len(tokens) < 2:
        raise CrateError(f"a text must have at least 2 tokens, got {len(tokens)}. Tokenize more text")
    count = len(documents) - 1
    sums, sizes = np.zeros(count), np.zeros(count, dtype=np.int64)
    for first, rows, length in passes(len(tokens) - 1, model.config.context_length, batch):
        losses = _token_losses(model, tokens, first, rows, length)
        positions = np.arange(first + 1, first + 1 + len(losses))
        owner = np.searchsorted(documents, positions, side="right") - 1
        low, high = owner[0], owner[-1] + 1
        sums[low:high] += np.bincount(owner - low, losses, minlength=high - low)
        sizes[low:high] += np.bincount(owner - low, minlength=high - low)
        bar.advance(len(losses))
    return LossesByDocument(nats=sums, tokens=sizes)


def summarise(losses: LossesByDocument, *, text_bytes: int) -> Evaluation:
    """The loss of a text of `text_bytes` bytes and its standard error."""
    loss, error = map(float, mean_over_documents(losses.nats, losses.tokens))
    if not math.isfinite(loss):
        raise CrateError(f"the loss of this model is {loss}: its training has diverged. Train again with a lower rate")
    return Evaluation(
        nats_per_token=loss, standard_error=error, perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=losses.nats.sum() / math.log(2) / text_bytes, tokens=int(losses.tokens.sum()),
        documents=len(losses.nats),
    )  # fmt: skip


@torch.no_grad()
def held_out_loss(
    model: LanguageModel, tokens: Integer[np.ndarray, " stream"], *, batch: int, world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> float:  # fmt: skip
    """Mean cross-entropy in nats per token over a stream, in sequences of the model's context.

    Raises StoppedError when `stop`, asked before each forward pass, is true in some process.

    Several processes share the work. Each makes as many forward passes as the others, which a model that is spread
    over them needs; one that has nothing left repeats its last.
    """
    all_passes = passes(len(tokens) - 1, model.config.context_length, batch)
    total = torch.zeros(2, dtype=torch.float64)
    for turn in range(0, len(all_passes), world.size):
        if world.any(stop()):
            raise StoppedError
        mine = turn + world.rank
        losses = _token_losses(model, tokens, *all_passes[min(mine, len(all_passes) - 1)])
        if mine < len(all_passes):
            total += torch.tensor([losses.sum(), len(losses)], dtype=torch.float64)
    summed, count = world.sum_on_hosts(total).tolist()
    return summed / count


def passes(predicted: int, context: int, batch: int) -> list[tuple[int, int, int]]:
    """The forward passes over a stream: index of the first token, sequences, tokens of each."""
    whole = predicted // context
    full = [(row * context, min(batch, whole - row), context) for row in range(0, whole, batch)]
    return full + ([(whole * context, 1, predicted - whole * context)] if predicted % context else [])


def _token_losses(
    model: LanguageModel, tokens: np.ndarray, first: int, rows: int, length: int
) -> Float64[np.ndarray, " predicted"]:
    piece = torch.from_numpy(tokens[first : first + rows * length + 1].astype(np.int64)).to(model.device)
    losses = model.token_losses(piece[:-1].view(rows, length), piece[1:].view(rows, length))
    return losses.flatten().double().cpu().numpy()
