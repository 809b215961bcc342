"""Statistics of scores: the paper's table rule, and the two-level bootstrap that puts an interval around a mean."""

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64

from cratelm.interpretation.scoring.small_samples import rescaled, widened

EXCERPT_RESAMPLES = 256
"""Fewest bootstrap sets of excerpts per neuron (`sets_each`); each draw of a neuron uses one."""
_CHUNK = 32
"""Neurons at a time."""


def paper_table(points: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and population variance of per-layer points, as in the paper's table; a layer without points is left out.

    Models of 6 layers and more leave the last layer out. The variance says how layers differ (points squared), not
    how sure the mean is.
    """
    return mean_and_variance(points[: shown_layers(len(points))])


def mean_and_variance(points: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and population variance without None values; None for both if no value is left."""
    known = np.array([value for value in points if value is not None], dtype=np.float64)
    return (float(known.mean()), float(known.var())) if len(known) else (None, None)


def shown_layers(layers: int) -> int:
    """Number of a model's layers in the paper's table."""
    return layers - 1 if layers >= 6 else layers


def correlation_of_sums(sums: Float64[np.ndarray, "*any 6"]) -> Float64[np.ndarray, "*any"]:
    """Pearson correlation from (n, sum a, sum s, sum a^2, sum s^2, sum a s); NaN where a side is constant."""
    n, a, s, aa, ss, cross = np.moveaxis(sums, -1, 0)
    variance_a, variance_s = n * aa - a * a, n * ss - s * s
    # Rounding errors are about 1e-16 of the numbers subtracted: a smaller variance counts as 0.
    defined = (variance_a > 1e-12 * n * aa) & (variance_s > 1e-12 * n * ss)
    scale = np.sqrt(np.where(defined, variance_a * variance_s, 1))
    return np.where(defined, np.clip((n * cross - a * s) / scale, -1, 1), np.nan)


def bootstrap_means(
    sums: Float64[np.ndarray, "neurons excerpts 6"], rng: np.random.Generator, resamples: int
) -> Float64[np.ndarray, " resamples"]:
    """Resampled means over neurons of the correlation: draw neurons, then excerpts within each drawn neuron.

    Every neuron has the same number of resampled correlations, so drawing a neuron and then one of its correlations is
    one draw from all of them. An undefined resampled correlation is left out, as in the mean itself. A resample of
    five excerpts has three or four distinct ones, which lowers correlations on average, so the resampled means are
    shifted to the observed mean. Their spread counts the excerpts' noise twice, because the differences between neurons
    contain it too. Fewer than 250 neurons are corrected (`small_samples.py`); from 250 on the means are those of the
    plain bootstrap, to the last digit, and the interval is rather too wide.
    """
    correlations = resampled_correlations(sums, rng, sets_each(len(sums), resamples, EXCERPT_RESAMPLES)).ravel()
    known = ~np.isnan(correlations)
    values, all_known = np.where(known, correlations, 0), bool(known.all())
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        drawn = rng.integers(len(values), size=(min(_CHUNK, resamples - start), len(sums)))
        counts = len(sums) if all_known else np.maximum(known[drawn].sum(axis=1), 1)
        means[start : start + _CHUNK] = values[drawn].sum(axis=1) / counts
    observed = correlation_of_sums(sums.sum(axis=1))
    return rescaled(means - means.mean() + np.nanmean(observed), observed)


def sets_each(neurons: int, resamples: int, least: int) -> int:
    """Resampled sets for each neuron, so that together there are at least as many sets as draws.

    With one neuron and 64 sets, the 2.5 % point would be the second or third lowest, and two bootstraps would differ by
    a third of the interval's width.
    """
    return max(least, -(-resamples // max(neurons, 1)))


def resampled_correlations(
    sums: Float64[np.ndarray, "neurons excerpts 6"], rng: np.random.Generator, resamples: int
) -> Float64[np.ndarray, "neurons resamples"]:
    """For each neuron, `resamples` correlations over its excerpts, drawn with replacement."""
    correlations = np.empty((len(sums), resamples))
    for rows, present in _alike(sums):
        count = present.shape[1]
        drawn = rng.integers(count, size=(len(rows), resamples, count))
        cells = drawn + np.arange(len(rows) * resamples).reshape(len(rows), resamples, 1) * count
        times = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        correlations[rows] = correlation_of_sums(times.astype(np.float64) @ present)
    return correlations


def _alike(
    sums: Float64[np.ndarray, "neurons excerpts 6"],
) -> Iterator[tuple[Int64[np.ndarray, " chunk"], Float64[np.ndarray, "chunk present 6"]]]:
    """Chunks of neurons with the same number of excerpts, and the sums of these excerpts."""
    present = sums[:, :, 0] > 0
    counts = present.sum(axis=1)
    order = np.argsort(~present, axis=1, kind="stable")
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            yield chunk, np.take_along_axis(sums[chunk], order[chunk, :count, None], axis=1)


def generator(seed: int, protocol: str, layer: int, model: str = "") -> np.random.Generator:
    """The random numbers of one layer's bootstrap by one protocol, independent of other layers and protocols.

    `model` is needed where resampled means of two models are subtracted: from one seed both would draw the same neuron
    indices, and their random errors would be correlated.
    """
    words = [
        zlib.crc32(protocol.encode()),
        layer,
        *([zlib.crc32(model.encode(errors="surrogatepass"))] if model else []),
    ]
    return np.random.default_rng([seed, *words])


def interval(samples: Float[np.ndarray, " samples"], freedom: float = math.inf) -> tuple[float, float]:
    """The 95 % percentile interval; `freedom`: degrees of freedom of a mean over few neurons (`small_samples.py`)."""
    low, high = np.percentile(widened(samples, freedom), [2.5, 97.5])
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: each p-value times the number of p-values at least as large, made monotone."""
    corrected, most = [0.0] * len(ps), 0.0
    for place, index in enumerate(np.argsort(ps).tolist()):
        most = max(most, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = most
    return corrected


def p_value(difference: Float64[np.ndarray, " resamples"], freedom: float = math.inf) -> float:
    """Two-sided bootstrap p-value: the share of resampled differences on the other side of 0, doubled.

    With few neurons (`freedom`) the differences are widened as for the interval, so that p is below 0.05 where the
    interval excludes 0.
    """
    difference = widened(difference, freedom)
    beyond = min(float((difference <= 0).mean()), float((difference >= 0).mean()))
    return min(1.0, 2 * max(beyond, 1 / (len(difference) + 1)))


def components(scores: Float64[np.ndarray, "neurons samples"]) -> tuple[float, float, int] | None:
    """Variance between neurons and within them, from several scores of each, and the number of neurons.

    One-way analysis of variance: within is the mean over neurons of the variance over samples; between is the variance
    of the neurons' means minus within / samples, at least 0. None for fewer than two neurons.
    """
    neurons, samples = scores.shape
    if neurons < 2 or samples < 2:
        return None
    within = float(scores.var(axis=1, ddof=1).mean())
    between = max(float(scores.mean(axis=1).var(ddof=1)) - within / samples, 0.0)
    return between, within, neurons
