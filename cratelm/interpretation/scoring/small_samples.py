"""Small-sample correction of bootstrap intervals and p values of means over neurons.

The spread of a two-level bootstrap over n neurons is wrong in two ways. It is too small by sqrt((n-1)/n), and it counts
the noise of excerpts twice: the values of the neurons differ by this noise already, and the excerpts of each drawn
neuron are drawn again. So resampled means are scaled around their mean to the standard error of the n values, s /
sqrt(n) with s of ddof 1. For an interval they are also multiplied by the quotient of the 97.5 % quantiles of Student's
t, with n - 1 degrees of freedom, and of the normal distribution. Both apply where fewer than `FEW_NEURONS` neurons are
behind a mean. From there on the numbers are those of the plain bootstrap to the last digit, which covers rather too
much.

A mean over layers, or a difference of two models, has the degrees of freedom of Satterthwaite:

    nu = (sum v)^2 / sum (v^2 / nu_i)       v: variance of the resampled means of a part, which has nu_i = n_i - 1

A single neuron says nothing about other neurons: its interval is that of its excerpts, without a correction.
`benchmarks/coverage.py` shows the coverage by simulation.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

FEW_NEURONS = 250
"""Neurons behind a mean from which on nothing is corrected."""
WARN_BELOW = 20
"""Neurons behind a mean below which tables warn of its interval."""
Z_95 = 1.959964
"""97.5 % quantile of the normal distribution."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t with 1 to 9 degrees of freedom."""


def student(freedom: int | float) -> float:
    """The 97.5 % quantile of Student's t distribution; up to 9 degrees of freedom linear in their inverse."""
    if freedom <= len(_T):
        return float(np.interp(1 / freedom, [1 / whole for whole in range(len(_T), 0, -1)], _T[::-1]))
    z = Z_95
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def rescaled(
    samples: Float[np.ndarray, " samples"], values: Float[np.ndarray, " neurons"]
) -> Float[np.ndarray, " samples"]:
    """Resampled means over few neurons with the standard error of the neurons' values; undefined values are NaN.

    Values that are all equal say nothing about their spread, and the resampled means stay as they are.
    """
    known = values[~np.isnan(values)]
    if not 1 < len(known) < FEW_NEURONS:
        return samples
    error, spread = known.std(ddof=1) / math.sqrt(len(known)), samples.std()
    return _spread(samples, error / spread) if error and spread else samples


def unbiased(samples: Float[np.ndarray, " samples"], neurons: int) -> Float[np.ndarray, " samples"]:
    """Values of a bootstrap over few neurons alone, spread around their mean by sqrt(n/(n-1))."""
    return _spread(samples, math.sqrt(neurons / (neurons - 1))) if 1 < neurons < FEW_NEURONS else samples


def freedom_of(neurons: int) -> float:
    """Degrees of freedom of a mean over neurons; infinite where nothing is corrected."""
    return float(neurons - 1) if 1 < neurons < FEW_NEURONS else math.inf


def pooled_freedom(parts: Sequence[Float[np.ndarray, " samples"]], freedoms: Sequence[float]) -> float:
    """Degrees of freedom of a sum or difference of independent resampled means; undefined parts (NaN) are left out."""
    variances = np.array([np.var(part) for part in parts])
    known = ~np.isnan(variances)
    weighed = float((variances[known] ** 2 / np.array(freedoms)[known]).sum())
    return float(variances[known].sum()) ** 2 / weighed if weighed else math.inf


def widened(samples: Float[np.ndarray, " samples"], freedom: float) -> Float[np.ndarray, " samples"]:
    """Resampled means with the tails of Student's t at the 2.5 and 97.5 % points."""
    return _spread(samples, student(freedom) / Z_95) if freedom < FEW_NEURONS - 1 else samples


def few_neurons(counts: Iterable[int]) -> tuple[str, ...]:
    """A warning if fewer than `WARN_BELOW` neurons are behind some mean."""
    least = min((count for count in counts if count), default=WARN_BELOW)
    if least >= WARN_BELOW:
        return ()
    return (
        f"Some intervals are of only {least} neuron{'s' * (least > 1)}: below {WARN_BELOW} neurons they are rough, and "
        "the interval of a single neuron covers its excerpts only.",
    )


def _spread(samples: Float[np.ndarray, " samples"], factor: float) -> Float[np.ndarray, " samples"]:
    centre = samples.mean()
    return centre + factor * (samples - centre)
