"""Explanations -> simulations: how strongly a neuron should fire on each token of text it was not explained from."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int64

from cratelm.activations.records import LayerRecords, Mode, NeuronId
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.lookup import tables as lookup
from cratelm.interpretation.protocols import Protocol, draw

CONTROLS = ("shuffled",)
"""Controls by explanation: `shuffled` gives each neuron the explanation of another neuron of its layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What an explanation predicts for one neuron on the excerpts it is scored on."""

    neuron: NeuronId
    """The neuron predicted."""
    protocol: str
    """Which excerpts it is predicted on."""
    mode: Mode
    """Which records these come from."""
    explainer: str
    """Who made the explanation and the prediction: `lookup`."""
    control: str
    """Empty, or how the explanation was falsified on purpose: `shuffled`."""
    source: int
    """Index of the neuron whose explanation was used: the same neuron, unless this is a control."""
    activations: Float32[np.ndarray, " tokens"] = field(repr=False)
    """Expected activation, in the explanation's units, on every token of the excerpts one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSimulations:
    """The simulations of a layer's explained neurons, as arrays."""

    neuron: Int64[np.ndarray, " neurons"]
    """Index of each simulated neuron in the layer, ascending."""
    source: Int64[np.ndarray, " neurons"]
    """Index of the neuron whose explanation was used."""
    first: Int64[np.ndarray, " neurons_plus_1"]
    """Where each neuron's tokens begin in `activations`; one more number for the end."""
    activations: Float32[np.ndarray, " tokens"]
    """Expected activation on every token of every neuron's excerpts, one after the other."""

    def of(self, row: int) -> Float32[np.ndarray, " tokens"]:
        """The tokens of one neuron."""
        return self.activations[self.first[row] : self.first[row + 1]]

    def laid_out(
        self, valid: Bool[np.ndarray, "neurons excerpts width"]
    ) -> Float32[np.ndarray, "neurons excerpts width"]:
        """The same numbers by excerpt, 0 where there is no token."""
        assert (valid.sum(axis=(1, 2)) == np.diff(self.first)).all(), "these simulations are of other excerpts"
        laid_out = np.zeros(valid.shape, dtype=np.float32)
        laid_out[valid] = self.activations
        return laid_out


def simulate_layer(
    records: LayerRecords, protocol: Protocol, explanations: LayerExplanations, *, control: str = ""
) -> LayerSimulations:
    """Simulate every explained neuron of a layer on the excerpts it is scored on."""
    neuron, rows = explanations.neuron, np.arange(len(explanations.neuron))
    if control:
        rows = derangement(len(neuron), np.random.default_rng([records.layer, *protocol.name.encode()]))
        neuron = neuron[: len(rows)]
    excerpts = draw(records, protocol.score, "score").rows(neuron)
    tables = explanations.tables.take(rows) if control else explanations.tables
    simulated = lookup.simulate(tables, excerpts.tokens)
    return LayerSimulations(
        neuron=neuron, source=explanations.neuron[rows], activations=simulated[excerpts.valid],
        first=np.concatenate([[0], np.cumsum(excerpts.valid.sum(axis=(1, 2)))]).astype(np.int64),
    )  # fmt: skip


def derangement(size: int, rng: np.random.Generator) -> Int64[np.ndarray, " size"]:
    """A permutation that leaves nothing in place: each element to the next of one random ring.

    A single element has no other to change with: then the permutation is empty.
    """
    if size < 2:
        return np.empty(0, dtype=np.int64)
    ring = rng.permutation(size)
    shuffled = np.empty(size, dtype=np.int64)
    shuffled[ring] = np.roll(ring, 1)
    return shuffled


def check_controls(controls: tuple[str, ...]) -> tuple[str, ...]:
    """The controls asked for, refused if one does not exist."""
    for control in controls:
        if control not in CONTROLS:
            raise CrateError(f"there is no control {control!r}. Use: {', '.join(CONTROLS)}")
    return controls
