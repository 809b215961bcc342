"""Explanations of one neuron and of a layer, and which neurons cannot be explained."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from cratelm.activations.records import LayerRecords, Mode, NeuronId
from cratelm.interpretation.lookup.tables import Tables
from cratelm.interpretation.protocols import Part, Protocol

DEAD = "dead"
"""Reason: the neuron never fired in the whole collection."""
TOO_RARE = "too rare"
"""Reason: it fired in fewer documents than the protocol draws top excerpts, to explain or to score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The explanation of one neuron in words, and by lookup also as a table."""

    neuron: NeuronId
    """The neuron explained."""
    protocol: str
    """Which excerpts it was explained from."""
    mode: Mode
    """Which records these come from."""
    explainer: str
    """Who explained: `lookup`, or a language model."""
    text: str
    """The explanation as a sentence; activations in it are means in the model's own units."""
    table: dict[int, float] = field(default_factory=dict)
    """Token id -> mean activation in the model's own units; 0 for tokens that are not in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExplanations:
    """The explanations of all neurons of a layer that can be explained, as arrays."""

    neuron: Int64[np.ndarray, " neurons"]
    """Index of each explained neuron in the layer, ascending."""
    texts: tuple[str, ...]
    """The explanation in words."""
    tables: Tables
    """The explanation as a table, in the same order."""


def unexplained(records: LayerRecords, protocol: Protocol) -> tuple[str, ...]:
    """For each neuron the reason why it cannot be explained and scored; empty if it can.

    The released procedure has no such test, so in `compat` mode every neuron can be explained.
    """
    if protocol.mode == "compat":
        return ("",) * records.num_neurons
    dead = records.statistics["maximum"] <= 0
    rare = _too_rare(records, protocol, "explain") | _too_rare(records, protocol, "score")
    return tuple(DEAD if d else TOO_RARE if r else "" for d, r in zip(dead, rare, strict=True))


def _too_rare(records: LayerRecords, protocol: Protocol, part: Part) -> np.ndarray:
    """Which neurons fire in too few documents: each top excerpt comes from another document."""
    width, needed = protocol.top_needed(part)
    if not needed:
        return np.zeros(records.num_neurons, dtype=bool)
    top = records.excerpts(width, part, "top")
    return (top.activations.max(axis=2) > 0).sum(axis=1) < needed
