"""Embedding and example embedding: similarity by a sentence encoder, without a language model.

    embedding           cosine of the explanation and each window; AUC of windows on which the neuron fires
    example-embedding   no explanation: is a window on which it fires nearer to others of the same strength than a
                        window on which it is silent is? AUC of the difference of mean cosines

After Paulo et al. (2024). `cratelm.encoder` opens an encoder of sentence-transformers.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from cratelm.interpretation.scorers.classification import Questions, enough_windows, too_few
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scorers.windows import Contrast, raw

COMPANY = 10
"""Most windows of each class that a window is compared with (example embedding)."""
QUERIES = 20
"""Pairs of a window on which the neuron fires and one on which it is silent (example embedding)."""


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors: sentence-transformers, or any object with this interface."""

    name: str

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dimensions"]:
        """A vector for each text; any length, none of them zero."""
        ...


def embedding(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], encoder: Encoder, questions: Questions,
    instruction: str = "",
) -> Judged:  # fmt: skip
    """How well similarity to the explanation separates windows on which the neuron fires from the others.

    `instruction` is put before the explanation, for encoders that expect a query prefix.
    """
    if not enough_windows("embedding", contrast, questions):
        return too_few(contrast)
    windows = (*contrast.positives, *contrast.negatives)
    vectors = _unit(encoder.encode([instruction + explanation, *(raw(window, pieces) for window in windows)]))
    return Judged(
        active=contrast.active, silent=contrast.silent, score=tuple((vectors[1:] @ vectors[0]).tolist()),
        truth=(1,) * len(contrast.positives) + (0,) * len(contrast.negatives),
        position=tuple(window.position for window in windows),
    )  # fmt: skip


def example_embedding(contrast: Contrast, pieces: Sequence[bytes], encoder: Encoder, questions: Questions) -> Judged:
    """How similar windows on which a neuron fires are to each other.

    A query's score is its mean cosine to windows on which the neuron fires, of one strength and itself not counted,
    less that to windows on which it is silent. Queries cycle through the strengths.
    """
    groups = min(questions.strengths, len(contrast.positives) // 2)
    if not enough_windows("example-embedding", contrast, questions) or min(groups, len(contrast.negatives) - 1) < 1:
        return too_few(contrast)
    windows = (*contrast.positives, *contrast.negatives)
    vectors = _unit(encoder.encode([raw(window, pieces) for window in windows]))
    cosines = vectors @ vectors.T
    rng = contrast.rng(questions.seed, "example-embedding")
    positives = np.arange(len(contrast.positives))
    negatives = np.arange(len(positives), len(windows))
    strengths = np.array_split(positives, groups)
    truth, score, position = [], [], []
    for turn in range(QUERIES):
        fires, silent = rng.permutation(strengths[turn % groups]), rng.permutation(negatives)
        friends, strangers = fires[1 : 1 + COMPANY], silent[1 : 1 + COMPANY]
        for kind, query in ((1, fires[0]), (0, silent[0])):
            truth.append(kind)
            score.append(float(cosines[query, friends].mean() - cosines[query, strangers].mean()))
            position.append(windows[query].position)
    return Judged(
        active=contrast.active, silent=contrast.silent, truth=tuple(truth), score=tuple(score),
        position=tuple(position),
    )  # fmt: skip


def _unit(vectors: Float[np.ndarray, "texts dimensions"]) -> Float[np.ndarray, "texts dimensions"]:
    wide = np.asarray(vectors, dtype=np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
