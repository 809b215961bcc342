"""The unit of relative strengths (`2x`): a neuron's maximum activation, or its 99.9th percentile, from the records."""

from typing import Literal

import numpy as np

from cratelm.activations.records import LayerRecords
from cratelm.activations.running import histogram_edges
from cratelm.errors import CrateError

Reference = Literal["maximum", "p99.9"]


def reference(records: LayerRecords, index: int, which: Reference = "maximum") -> float:
    """The activation that `1x` stands for.

    `p99.9` is the 99.9th percentile of the activations above 0, interpolated inside a bin of the histogram. It depends
    less on a single token than the maximum does. Raises `CrateError` for a neuron that never fires.
    """
    maximum = float(records.statistics["maximum"][index])
    if not maximum > 0:
        raise CrateError(
            f"neuron {records.layer}/{index} never fires in the records, so it has no maximum to multiply. "
            "Give an absolute strength, such as set:0.5"
        )
    if which == "maximum":
        return maximum
    if "histogram" not in records.tables:
        raise CrateError("these records have no histogram. Use --reference maximum")
    edges = histogram_edges().astype(np.float64)
    counts = records.tables["histogram"][index, 1:].astype(np.float64)
    if not counts.any():
        return maximum
    # Counts above each edge, with 0.5 above the maximum; the logarithm of the count is linear between edges.
    inside = edges < maximum
    values = np.append(edges[inside], maximum)
    above = np.append(counts[::-1].cumsum()[::-1][inside], 0.5)
    target = max(0.001 * counts.sum(), 0.5)
    return float(np.interp(-np.log(target), -np.log(np.maximum(above, 0.5)), values))
