"""Scores from ranks alone: Spearman's correlation, and the AUROC of the tokens on which a neuron fires.

Pearson's correlation, the paper's score, follows the few largest activations and the simulation's scale. These two do
not: with r(x) the rank of each value among its neuron's tokens, equal values sharing the mean of their ranks,

    Spearman    Pearson correlation of r(a) and r(s)
    AUROC       P(s of an active token > s of a silent one), a tie counted half; active is a > 0
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64


def ranks(
    values: Float32[np.ndarray, "neurons tokens"], valid: Bool[np.ndarray, "neurons tokens"]
) -> Float64[np.ndarray, "neurons tokens"]:
    """Rank of each valid value among those of its row, from 1, ties averaged; 0 where not valid.

    One sort of integers with the value in the upper bits and its position in the lower bits, as in `lookup.tables`:
    read as integers, the bits of floats have the order of the floats once those of negative floats are inverted.
    """
    rows, size = values.shape
    bits = (values + np.float32(0)).view(np.int32)  # adding 0 makes -0 and 0 one value
    keys = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    places = size.bit_length()
    keys[~valid] = np.iinfo(np.int32).max  # behind every number: no float but a NaN has these bits
    packed = (keys << places) + np.arange(size)
    packed.sort(axis=1)
    order = (packed & ((1 << places) - 1)) + np.arange(0, rows * size, size)[:, None]
    packed >>= places
    ends = np.ones((rows, size), dtype=bool)
    np.not_equal(packed[:, 1:], packed[:, :-1], out=ends[:, :-1])
    last = np.flatnonzero(ends)
    width = np.diff(last, prepend=-1)
    # A run of equal values ends at `last`, counted over all rows; the mean rank of its members lies half a run before.
    mean = last % size + 1 - (width - 1) / 2
    result = np.empty((rows, size))
    result.put(order, np.repeat(mean, width))
    result[~valid] = 0
    return result


def rank_scores(
    activations: Float32[np.ndarray, "neurons tokens"], simulated: Float32[np.ndarray, "neurons tokens"],
    valid: Bool[np.ndarray, "neurons tokens"],
) -> tuple[Float64[np.ndarray, " neurons"], Float64[np.ndarray, " neurons"]]:  # fmt: skip
    """Spearman's correlation and the AUROC of active tokens, over the valid tokens of each row.

    NaN where undefined: the correlation where a side is constant, the AUROC where all tokens are active, or none is.
    """
    count = valid.sum(axis=1).astype(np.float64)
    of_a, of_s = ranks(activations, valid), ranks(simulated, valid)
    active = (activations > 0) & valid
    positive = active.sum(axis=1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.einsum("nt,nt->n", of_s, active.astype(np.float64)) - positive * (positive + 1) / 2
        auroc = above / (positive * (count - positive))
        # Ranks are halves of whole numbers: up to some millions of tokens these sums are exact.
        mean = count * (count + 1) ** 2 / 4
        cross, square_a, square_s = (
            np.einsum("nt,nt->n", x, y) - mean for x, y in ((of_a, of_s), (of_a, of_a), (of_s, of_s))
        )
        spearman = cross / np.sqrt(square_a * square_s)
    return np.clip(spearman, -1, 1), auroc
