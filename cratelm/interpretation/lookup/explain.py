"""Explain all neurons of a layer by lookup: the mean activation on every token."""

from collections.abc import Sequence

import numpy as np

from cratelm.activations.records import LayerRecords
from cratelm.interpretation.explainers.explanation import LayerExplanations, unexplained
from cratelm.interpretation.lookup import tables
from cratelm.interpretation.protocols import Protocol, draw


def explain_layer(records: LayerRecords, protocol: Protocol, strings: Sequence[str]) -> LayerExplanations:
    """Explain every neuron of a layer that can be explained. `strings` is the text of each token id."""
    neuron = np.flatnonzero(np.array(unexplained(records, protocol)) == "")
    means = tables.explain(draw(records, protocol.explain, "explain").rows(neuron))
    texts = tuple(tables.sentence(*means.of(row), strings) for row in range(len(means)))
    return LayerExplanations(neuron=neuron, texts=texts, tables=means)
