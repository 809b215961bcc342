"""Simulate all neurons of a layer by lookup: the tokens of an excerpt are looked up in the explanation's table."""

from dataclasses import dataclass

import numpy as np

from cratelm.activations.records import LayerRecords
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.lookup import tables
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.simulators.controls import sources_of
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.growing_sets import write_simulations


@dataclass(frozen=True, slots=True)
class LookupSimulator:
    """Simulates a whole layer at once."""

    stored_name: str = ""

    async def simulate(self, task: SetTask) -> None:
        """Simulate all neurons of the layer that were explained by lookup."""
        explanations = task.store.explanations(task.key.explained)
        made = simulate_layer(task.records, task.protocol, explanations, control=task.key.control)
        write_simulations(task.store, task.key, made)


def simulate_layer(
    records: LayerRecords, protocol: Protocol, explanations: LayerExplanations, *, control: str = ""
) -> LayerSimulations:
    """Simulate every explained neuron of a layer on the excerpts it is scored on."""
    explained = explanations.neuron
    sources = sources_of(control, explained, explained, layer=records.layer, protocol=protocol.name)
    neuron, source = (np.array(list(column), dtype=np.int64) for column in (sources.keys(), sources.values()))
    excerpts = draw(records, protocol.score, "score").rows(neuron)
    means = explanations.tables.take(np.searchsorted(explained, source)) if control else explanations.tables
    simulated = tables.simulate(means, excerpts.tokens)
    return LayerSimulations(
        neuron=neuron, source=source, activations=simulated[excerpts.valid],
        first=np.concatenate([[0], np.cumsum(excerpts.valid.sum(axis=(1, 2)))]).astype(np.int64),
    )  # fmt: skip
