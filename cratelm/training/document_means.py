"""A mean over tokens and its standard error, with documents as the sampling unit."""

import numpy as np
from jaxtyping import Float64, Int64


def mean_over_documents(
    sums: Float64[np.ndarray, "*rows documents"],
    sizes: Float64[np.ndarray, " documents"] | Int64[np.ndarray, " documents"],
) -> tuple[Float64[np.ndarray, "*rows"], Float64[np.ndarray, "*rows"]]:
    """The mean over all tokens and its standard error, from the sum and the number of tokens of each document.

    With S_d the sum and n_d the tokens of document d, the mean is M = sum S_d / sum n_d and its variance, as of a
    ratio, D / (D - 1) * sum (S_d - M n_d)^2 / (sum n_d)^2. The standard error is NaN for one document.
    """
    count, total = len(sizes), sizes.sum()
    mean = sums.sum(-1) / total
    spread = ((sums - mean[..., None] * sizes) ** 2).sum(-1) * count / max(1, count - 1)
    return np.asarray(mean), np.asarray(np.sqrt(spread) / total if count > 1 else np.full_like(spread, np.nan))
