"""Do scorers put neurons in the same order as simulation does? Rank correlation over the neurons that both have scored.

Ranks are taken within a layer and scaled to [0, 1], so that a scorer gets no credit for a difference between layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from cratelm.interpretation.scoring.ranks import ranks
from cratelm.interpretation.scoring.small_samples import freedom_of, unbiased
from cratelm.interpretation.scoring.statistics import interval

LEAST = 5
"""Fewest neurons of a layer that have both scores."""
Pair = tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]
"""Two scores of the same neurons of one layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Rank correlation of two scores."""

    correlation: float
    low: float
    """Lower end of the 95 % interval: bootstrap over the neurons of each layer."""
    high: float
    """Upper end."""
    neurons: int
    """Neurons with both scores, in all layers."""


def rank_agreement(layers: Sequence[Pair], rng: np.random.Generator, *, resamples: int = 2000) -> Agreement | None:
    """The rank correlation of two scores over the neurons of some layers.

    Neurons without one of the scores (NaN) are left out, and so are layers with fewer than `LEAST` others. None if no
    layer is left, or if a score is the same for all neurons of each layer.
    """
    known = [(first[both], second[both]) for first, second in layers for both in [~np.isnan(first + second)]]
    known = [pair for pair in known if len(pair[0]) >= LEAST]
    observed = _correlation(known)
    if np.isnan(observed):
        return None
    drawn = []
    for _ in range(resamples):
        choices = [rng.integers(len(first), size=len(first)) for first, _ in known]
        drawn.append(_correlation([(a[i], b[i]) for (a, b), i in zip(known, choices, strict=True)]))
    samples = np.array(drawn)
    samples = samples[~np.isnan(samples)]
    neurons = sum(len(first) for first, _ in known)
    low, high = interval(unbiased(samples - samples.mean() + observed, neurons), freedom_of(neurons))
    return Agreement(correlation=observed, low=max(low, -1.0), high=min(high, 1.0), neurons=neurons)


def _correlation(layers: Sequence[Pair]) -> float:
    """Correlation of the ranks within layers, without differences between layers; NaN if a side is constant."""
    if not layers:
        return float("nan")
    first, second = (np.concatenate([_centred(pair[side]) for pair in layers]) for side in (0, 1))
    scale = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / scale) if scale > 0 else float("nan")


def _centred(values: Float64[np.ndarray, " _"]) -> Float64[np.ndarray, " _"]:
    """Ranks from 0 to 1, minus their mean."""
    row = values.astype(np.float32)[None]
    ranked = ranks(row, np.ones(row.shape, dtype=bool))[0] / len(values)
    return np.asarray(ranked - ranked.mean())
