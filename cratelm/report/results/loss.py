"""Losses on held-out text, and the difference of two models, paired by document where possible."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from cratelm.checksums import read_tensors_and_metadata
from cratelm.errors import CrateError
from cratelm.rundir import read_json
from cratelm.training.document_means import mean_over_documents

DOCUMENTS = "evaluation_documents.safetensors"
"""Next to evaluation.json: `nats` (float64) and `tokens` (int64) of each document, in the order of the split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Loss on held-out text, as `cratelm evaluate` measured it."""

    nats_per_token: float
    standard_error: float | None
    """Nats per token, over documents; None for a single document."""
    perplexity: float | None
    """None where it is too large for a number."""
    bits_per_byte: float
    tokens: int
    documents: int
    split: str
    data_hash: str | None = None
    """sha256 of the predicted tokens, if known."""
    by_document: "DocumentLosses | None" = field(default=None, repr=False)
    """None if the evaluation did not save it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentLosses:
    """The loss of each document."""

    nats: Float64[np.ndarray, " documents"]
    """Summed cross-entropy of each document's tokens."""
    tokens: Int64[np.ndarray, " documents"]
    """Number of predicted tokens of each document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDifference:
    """Loss of one model minus loss of another."""

    nats: float
    """Nats per token."""
    standard_error: float | None
    """Of `nats`, over documents; None unless both losses are saved by document, on the same documents."""

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the 95 % interval. Needs a standard error."""
        assert self.standard_error is not None
        return abs(self.nats) > 1.96 * self.standard_error


def loss_difference(first: Loss, second: Loss) -> LossDifference:
    """The difference of two losses, paired by document where possible.

    It excludes the difficulty that a document has for both.
    """
    difference = first.nats_per_token - second.nats_per_token
    a, b = first.by_document, second.by_document
    if a is None or b is None or first.data_hash is None or first.documents < 2:
        return LossDifference(nats=difference, standard_error=None)
    same = (first.data_hash, first.split) == (second.data_hash, second.split) and np.array_equal(a.tokens, b.tokens)
    if not same:
        return LossDifference(nats=difference, standard_error=None)
    mean, error = mean_over_documents(a.nats - b.nats, a.tokens)
    return LossDifference(nats=float(mean), standard_error=float(error))


def read_loss(run: Path) -> Loss | None:
    """The held-out loss of a run; None if it was not evaluated."""
    if not (run / "evaluation.json").exists():
        return None
    found = read_json(run / "evaluation.json", made_by=f"cratelm evaluate {run} --data DIR")
    if "nats_per_token" not in found:
        return None
    return Loss(
        nats_per_token=found["nats_per_token"], standard_error=_finite(found.get("standard_error")),
        perplexity=_finite(found.get("perplexity")), bits_per_byte=found["bits_per_byte"], tokens=found["tokens"],
        documents=found.get("documents") or 0, split=found.get("split") or "", data_hash=found.get("data_hash"),
        by_document=_read_documents(run, found),
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    """None for NaN and Infinity, which some evaluations contain."""
    return value if value is not None and math.isfinite(value) else None


def _read_documents(run: Path, evaluation: dict[str, Any]) -> DocumentLosses | None:
    """The documents of this evaluation; None if they are missing or belong to another evaluation."""
    path = run / DOCUMENTS
    if not path.exists():
        return None
    hint = f"Run: cratelm evaluate {run} --data DIR"
    arrays, described = read_tensors_and_metadata(path, hint=hint)
    if [name for name in ("nats", "tokens") if name not in arrays or arrays[name].ndim != 1]:
        raise CrateError(f"{path} must have nats and tokens of documents, got {', '.join(arrays) or 'none'}. {hint}")
    nats, tokens = arrays["nats"], arrays["tokens"]
    made = (described.get("split"), described.get("data_hash"), len(nats), len(tokens), int(tokens.sum()))
    documents = evaluation.get("documents")
    asked = (evaluation.get("split"), evaluation.get("data_hash") or "", documents, documents, evaluation["tokens"])
    if made != asked or not math.isclose(nats.sum() / tokens.sum(), evaluation["nats_per_token"], rel_tol=1e-9):
        return None
    return DocumentLosses(nats=nats, tokens=tokens)
