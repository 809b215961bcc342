"""Explain all neurons of a layer by lookup: the mean activation on every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cratelm.activations.records import LayerRecords
from cratelm.interpretation.explainers.explanation import LayerExplanations, unexplained
from cratelm.interpretation.lookup import tables
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.growing_sets import write_explanations


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupExplainer:
    """Explains a whole layer at once."""

    strings: Callable[[], Sequence[str]]
    """Reads the text of each token id; called when the first layer is explained."""

    async def explain(self, task: SetTask) -> None:
        """Explain all neurons of the layer that can be explained."""
        write_explanations(task.store, task.key, explain_layer(task.records, task.protocol, self.strings()))


def explain_layer(records: LayerRecords, protocol: Protocol, strings: Sequence[str]) -> LayerExplanations:
    """Explain every neuron of a layer that can be explained. `strings` is the text of each token id."""
    neuron = np.flatnonzero(np.array(unexplained(records, protocol)) == "")
    means = tables.explain(draw(records, protocol.explain, "explain").rows(neuron))
    texts = tuple(tables.sentence(*means.of(row), strings) for row in range(len(means)))
    return LayerExplanations(neuron=neuron, texts=texts, tables=means)
