"""Consistency and distinctiveness: does a neuron fire where its explanation says, and nowhere else?

The paper attributes CRATE's scores to neurons that fire consistently and distinctively on relevant tokens. A token is
*relevant* where the simulation from the explanation predicts at least a share t of its largest for that neuron:

    relevant(t)             s >= t max s and s > 0
    consistency(t)          share of the relevant tokens on which the neuron fires (a > 0)
    strength(t)             mean of a on the relevant tokens, as a share of the neuron's maximum
    distinctiveness(t)      share of the tokens on which the neuron fires that are relevant
    distinctiveness mass(t) share of its activation, summed over tokens, that falls on relevant ones

Chance levels: with the explanation of another neuron, consistency is close to the share of all tokens on which the
neuron fires, and distinctiveness close to the share of tokens that are relevant. Top excerpts and random excerpts are
measured separately: the neuron fires in every top excerpt.

A neuron fires more in some excerpts than in others, so an explanation of the right topic that marks the wrong tokens is
above these levels. `Counts.permuted` is the chance level for it: the simulation permuted within each excerpt. Of an
excerpt with n tokens, r of them relevant and f on which the neuron fires, r f / n are both on average over all
permutations, so the level is exact and needs no random numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from cratelm.activations.records import Excerpts, LayerRecords, read_records
from cratelm.interpretation.protocols import Protocol, draw, protocol
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a simulation's maximum from which on a token is relevant."""
STATED = THRESHOLDS.index(0.3)
"""Index of the threshold in tables: the share from which on scorers mark tokens, too."""
MEASURES = ("consistency", "strength", "distinctiveness", "distinctiveness_mass")
"""Measures that depend on the threshold."""
KINDS = ("top", "random")
"""Kinds of excerpts, measured separately."""
_CHUNK = 32
"""Neurons at a time."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts over the excerpts of one kind."""

    base: Float64[np.ndarray, "neurons excerpts 3"]
    """Tokens, tokens on which the neuron fires, sum of its activation."""
    relevant: Float64[np.ndarray, "neurons excerpts thresholds 3"] = field(repr=False)
    """Relevant tokens, relevant tokens on which the neuron fires, sum of its activation on relevant tokens."""
    maximum: Float64[np.ndarray, " neurons"]
    """Each neuron's largest activation in the whole collection."""

    @cached_property
    def measures(self) -> Float64[np.ndarray, "neurons thresholds 4"]:
        """The `MEASURES` of every neuron over all its excerpts; NaN where nothing is relevant, or it never fires."""
        return measured(self.base.sum(axis=1), self.relevant.sum(axis=1), self.maximum)

    @property
    def firing(self) -> Float64[np.ndarray, " neurons"]:
        """Share of all tokens on which the neuron fires: the chance level of consistency."""
        return _ratio(self.base[:, :, 1].sum(axis=1), self.base[:, :, 0].sum(axis=1))

    @property
    def relevance(self) -> Float64[np.ndarray, "neurons thresholds"]:
        """Share of all tokens that are relevant: the chance level of distinctiveness."""
        return _ratio(self.relevant[..., 0].sum(axis=1), self.base[:, :, 0].sum(axis=1)[:, None])

    @property
    def permuted(self) -> Float64[np.ndarray, "neurons thresholds 2"]:
        """Mean consistency and distinctiveness over all permutations of the simulation within each excerpt."""
        tokens, fires, _ = np.moveaxis(self.base, -1, 0)
        share = np.divide(fires, tokens, out=np.zeros_like(fires), where=tokens > 0)
        both = (self.relevant[..., 0] * share[:, :, None]).sum(axis=1)
        whole = self.relevant[..., 0].sum(axis=1), fires.sum(axis=1)[:, None]
        return np.stack([_ratio(both, whole[0]), _ratio(both, whole[1])], axis=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFiring:
    """Firing of the neurons of one layer on relevant and other tokens."""

    layer: int
    neuron: Int64[np.ndarray, " neurons"]
    """Index of each simulated neuron in the layer, ascending."""
    kinds: Mapping[str, Counts]
    """Kind of excerpts (`top`, `random`) -> counts, for the kinds that the protocol scores on."""


def firing_layer(records: LayerRecords, by: Protocol, simulations: LayerSimulations) -> LayerFiring:
    """Count for every simulated neuron on the scored excerpts of each kind, without the cropped ones."""
    excerpts = draw(records, by.score, "score").rows(simulations.neuron)
    simulated = simulations.laid_out(excerpts.valid)
    kind_of = np.array([scored.kind if scored.crop is None else "" for scored in by.score for _ in scored.picks])
    maximum = records.statistics["maximum"][simulations.neuron].astype(np.float64)
    base, relevant = count(excerpts, simulated)
    return LayerFiring(
        layer=records.layer, neuron=simulations.neuron,
        kinds={
            kind: Counts(base=base[:, kind_of == kind], relevant=relevant[:, kind_of == kind], maximum=maximum)
            for kind in KINDS
            if kind in kind_of
        },
    )  # fmt: skip


def count(
    excerpts: Excerpts, simulated: Float32[np.ndarray, "neurons excerpts width"]
) -> tuple[Float64[np.ndarray, "neurons excerpts 3"], Float64[np.ndarray, "neurons excerpts thresholds 3"]]:
    """`Counts.base` and `Counts.relevant` of every excerpt. The maximum of a simulation is over all of them."""
    neurons, number = excerpts.position.shape
    base, relevant = np.zeros((neurons, number, 3)), np.zeros((neurons, number, len(THRESHOLDS), 3))
    for rows in (slice(start, start + _CHUNK) for start in range(0, neurons, _CHUNK)):
        valid, s = excerpts.valid[rows], simulated[rows]
        a = np.maximum(excerpts.activations[rows], 0) * valid
        fires = a > 0
        base[rows] = np.stack([part.sum(axis=2) for part in (valid, fires, a)], axis=2)
        largest = np.where(valid, s, -np.inf).max(axis=(1, 2), initial=-np.inf, keepdims=True)
        for place, threshold in enumerate(THRESHOLDS):
            counted = valid & (s > 0) & (s >= np.float32(threshold) * largest)
            relevant[rows, :, place] = np.stack(
                [counted.sum(axis=2), (counted & fires).sum(axis=2), np.einsum("new,new->ne", counted, a)], axis=2
            )
    return base, relevant


def measured(
    base: Float64[np.ndarray, "*any 3"], relevant: Float64[np.ndarray, "*any thresholds 3"],
    maximum: Float64[np.ndarray, "*any"],
) -> Float64[np.ndarray, "*any thresholds 4"]:  # fmt: skip
    """Compute the `MEASURES` from sums over tokens."""
    tokens, both, mass = np.moveaxis(relevant, -1, 0)
    return np.stack(
        [
            _ratio(both, tokens), _ratio(mass, tokens * maximum[..., None]),
            _ratio(both, base[..., 1, None]), _ratio(mass, base[..., 2, None]),
        ],
        axis=-1,
    )  # fmt: skip


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def write_firing(store: Store, key: SetKey, firing: LayerFiring) -> None:
    """Store the numbers at the stated threshold, for every neuron and kind of excerpts."""
    rows = (
        (int(neuron), kind, *(None if np.isnan(value) else float(value) for value in values), int(tokens))
        for kind, counts in firing.kinds.items()
        for neuron, values, tokens in zip(
            firing.neuron,
            np.column_stack([counts.measures[:, STATED], counts.firing, counts.relevance[:, STATED]]),
            counts.base[:, :, 0].sum(axis=1), strict=True,
        )
    )  # fmt: skip
    store.write(key, "firing", f"neuron, excerpts, {', '.join(MEASURES)}, firing, relevant, tokens", rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Firing:
    """One neuron on excerpts of one kind, at the stated threshold. Shares, in [0, 1]; None where undefined."""

    excerpts: str
    """`top` or `random`."""
    consistency: float | None
    """Share of the relevant tokens on which the neuron fires."""
    strength: float | None
    """Mean activation on the relevant tokens, as a share of the neuron's maximum."""
    distinctiveness: float | None
    """Share of the tokens on which it fires that are relevant."""
    distinctiveness_mass: float | None
    """Share of its activation that falls on relevant tokens."""
    firing: float | None
    """Share of all tokens on which it fires: the chance level of consistency."""
    relevant: float | None
    """Share of all tokens that are relevant: the chance level of distinctiveness."""
    tokens: int
    """Tokens counted."""


def read_firing(store: Store, key: SetKey, index: int | None = None) -> dict[int, dict[str, Firing]]:
    """Neuron -> kind of excerpts -> stored numbers, of one neuron or of all neurons of a set."""
    names = ("excerpts", *MEASURES, "firing", "relevant", "tokens")
    query = f"SELECT neuron, {', '.join(names)} FROM firing WHERE set_id = ?"
    rows = store.rows(key, query) if index is None else store.rows(key, f"{query} AND neuron = ?", index)
    by_neuron: dict[int, dict[str, Firing]] = {}
    for neuron, *values in rows:
        firing = Firing(**dict(zip(names, values, strict=True)))
        by_neuron.setdefault(neuron, {})[firing.excerpts] = firing
    return by_neuron


def count_sets(run: Path, keys: Sequence[SetKey]) -> list[LayerFiring]:
    """Compute the firing of these sets again from their simulations, at every threshold."""
    store = Store.open(run)
    return [
        firing_layer(
            read_records(run, key.layer, mode=key.mode, tap=key.tap), protocol(key.protocol, key.mode),
            store.simulations(key),
        )
        for key in keys
    ]  # fmt: skip


def relevant_tokens(
    simulated: Float32[np.ndarray, " tokens"], largest: float, threshold: float = THRESHOLDS[STATED]
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of one excerpt are relevant; `largest` is the neuron's largest simulated activation."""
    return (simulated > 0) & (simulated >= np.float32(threshold) * np.float32(largest))
