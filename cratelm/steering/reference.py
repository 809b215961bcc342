"""How strong is strong: a neuron's own maximum, or nearly that, from the records of a run."""

from typing import Literal

import numpy as np

from cratelm.activations.records import LayerRecords
from cratelm.activations.running import histogram_edges
from cratelm.errors import CrateError

Reference = Literal["maximum", "p99.9"]


def reference(records: LayerRecords, index: int, which: Reference = "maximum") -> float:
    """What `1x` is for a neuron, in the model's own units.

    `p99.9` is the 99.9th percentile of its activations above 0, from the histogram, interpolated inside a bin; it is
    less at the mercy of a single token than the maximum. A neuron that never fires has neither.
    """
    maximum = float(records.statistics["maximum"][index])
    if not maximum > 0:
        raise CrateError(
            f"neuron {records.layer}/{index} never fires in the records, so multiples of its maximum mean nothing. "
            "Give its strength as a number, as in set:0.5"
        )
    if which == "maximum":
        return maximum
    if "histogram" not in records.tables:
        raise CrateError("these records hold no histogram. Use --reference maximum")
    edges = histogram_edges().astype(np.float64)
    counts = records.tables["histogram"][index, 1:].astype(np.float64)
    if not counts.any():
        return maximum
    # How many are above each edge, and half a one above the maximum; their logarithm is taken as linear in between.
    inside = edges < maximum
    places = np.append(edges[inside], maximum)
    above = np.append(counts[::-1].cumsum()[::-1][inside], 0.5)
    wanted = max(0.001 * counts.sum(), 0.5)
    return float(np.interp(-np.log(wanted), -np.log(np.maximum(above, 0.5)), places))
