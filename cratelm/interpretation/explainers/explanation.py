"""Records -> explanations: what each neuron of a layer stands for, and which neurons cannot be explained, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from cratelm.activations.records import LayerRecords, Mode, NeuronId
from cratelm.interpretation.lookup import tables as lookup
from cratelm.interpretation.protocols import Part, Protocol, draw

DEAD = "dead"
"""Reason: the neuron never fired in the whole collection."""
TOO_RARE = "too rare"
"""Reason: it fired in fewer documents than the protocol wants top excerpts, to explain or to score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What one neuron stands for, in words, and for the lookup explainer the table behind them."""

    neuron: NeuronId
    """The neuron explained."""
    protocol: str
    """Which excerpts it was explained from."""
    mode: Mode
    """Which records these come from."""
    explainer: str
    """Who explained: `lookup`."""
    text: str
    """The explanation as a sentence; activations in it are means in the model's own units."""
    table: dict[int, float] = field(default_factory=dict)
    """Token id -> mean activation in the model's own units; a token that is not there means 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExplanations:
    """The explanations of those neurons of a layer that can be explained, as arrays."""

    neuron: Int64[np.ndarray, " neurons"]
    """Index of each explained neuron in the layer, ascending."""
    texts: tuple[str, ...]
    """The explanation in words."""
    tables: lookup.Tables
    """The explanation as a table, in the same order."""


def unexplained(records: LayerRecords, protocol: Protocol) -> tuple[str, ...]:
    """Why a neuron cannot be explained and scored, empty where it can.

    The released procedure asks nothing beforehand, so in `compat` mode every neuron can.
    """
    if protocol.mode == "compat":
        return ("",) * records.num_neurons
    dead = records.statistics["maximum"] <= 0
    rare = _too_rare(records, protocol, "explain") | _too_rare(records, protocol, "score")
    return tuple(DEAD if d else TOO_RARE if r else "" for d, r in zip(dead, rare, strict=True))


def _too_rare(records: LayerRecords, protocol: Protocol, part: Part) -> np.ndarray:
    """Which neurons fire in fewer documents than asked: their top excerpts come from one document each."""
    width, needed = protocol.top_needed(part)
    if not needed:
        return np.zeros(records.num_neurons, dtype=bool)
    top = records.excerpts(width, part, "top")
    return (top.activations.max(axis=2) > 0).sum(axis=1) < needed


def explain_layer(records: LayerRecords, protocol: Protocol, strings: Sequence[str]) -> LayerExplanations:
    """Explain every neuron of a layer that can be explained, by lookup. `strings` is the text of each token id."""
    neuron = np.flatnonzero(np.array(unexplained(records, protocol)) == "")
    tables = lookup.explain(draw(records, protocol.explain, "explain").rows(neuron))
    texts = tuple(lookup.sentence(*tables.of(row), strings) for row in range(len(tables)))
    return LayerExplanations(neuron=neuron, texts=texts, tables=tables)
