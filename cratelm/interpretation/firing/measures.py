"""Consistency and distinctiveness: does a neuron fire where its explanation says, and nowhere else?

The paper attributes CRATE's scores to neurons that fire consistently and distinctively on relevant tokens. A token is
*relevant* where the simulation from the explanation predicts at least a share t of its largest for that neuron:

    relevant(t)             s >= t max s and s > 0
    consistency(t)          share of the relevant tokens on which the neuron fires (a > 0)
    strength(t)             mean of a on the relevant tokens, as a share of the neuron's maximum
    distinctiveness(t)      share of the tokens on which the neuron fires that are relevant
    distinctiveness mass(t) share of its activation, summed over tokens, that falls on relevant ones

Under the explanation of a stranger consistency comes near the share of all tokens on which the neuron fires, and
distinctiveness near the share of tokens that are relevant: these two stand beside them as what nothing gives. Excerpts
that were chosen because the neuron fires in them (top) and excerpts of any text (random) are taken apart.
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
"""The one whose numbers stand in tables: the same share from which on tokens are marked elsewhere."""
MEASURES = ("consistency", "strength", "distinctiveness", "distinctiveness_mass")
"""What depends on the threshold."""
KINDS = ("top", "random")
"""Kinds of excerpts, taken apart."""
CHUNK = 32
"""Neurons at a time."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted in the excerpts of one kind."""

    base: Float64[np.ndarray, "neurons excerpts 3"]
    """Tokens, tokens on which the neuron fires, sum of its activation."""
    relevant: Float64[np.ndarray, "neurons excerpts thresholds 3"] = field(repr=False)
    """Relevant tokens, those of them on which it fires, sum of its activation on them."""
    maximum: Float64[np.ndarray, " neurons"]
    """Each neuron's largest activation in all text that was collected."""

    @cached_property
    def measures(self) -> Float64[np.ndarray, "neurons thresholds 4"]:
        """The `MEASURES` of every neuron over all its excerpts; NaN where nothing is relevant, or it never fires."""
        return measured(self.base.sum(axis=1), self.relevant.sum(axis=1), self.maximum)

    @property
    def firing(self) -> Float64[np.ndarray, " neurons"]:
        """Share of all tokens on which the neuron fires: what consistency is worth by chance."""
        return _ratio(self.base[:, :, 1].sum(axis=1), self.base[:, :, 0].sum(axis=1))

    @property
    def relevance(self) -> Float64[np.ndarray, "neurons thresholds"]:
        """Share of all tokens that are relevant: what distinctiveness is worth by chance."""
        return _ratio(self.relevant[..., 0].sum(axis=1), self.base[:, :, 0].sum(axis=1)[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFiring:
    """How the neurons of one layer fire on what is predicted of them."""

    layer: int
    neuron: Int64[np.ndarray, " neurons"]
    """Index of each simulated neuron in the layer, ascending."""
    kinds: Mapping[str, Counts]
    """By kind of excerpts: `top`, `random`; a kind that the protocol does not score on is not there."""


def firing_layer(records: LayerRecords, by: Protocol, simulations: LayerSimulations) -> LayerFiring:
    """Count for every simulated neuron on the scored excerpts of each kind, but for those out of their context."""
    excerpts = draw(records, by.score, "score").rows(simulations.neuron)
    simulated = simulations.laid_out(excerpts.valid)
    kind_of = np.array([one.kind if one.crop is None else "" for one in by.score for _ in one.picks])
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
    for rows in (slice(start, start + CHUNK) for start in range(0, neurons, CHUNK)):
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
    """The `MEASURES` from sums."""
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


def write_firing(store: Store, key: SetKey, found: LayerFiring) -> None:
    """Keep the numbers at the stated threshold, for every neuron and kind of excerpts."""
    rows = (
        (int(neuron), kind, *(None if np.isnan(value) else float(value) for value in values), int(tokens))
        for kind, counts in found.kinds.items()
        for neuron, values, tokens in zip(
            found.neuron,
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
    """Share of all tokens on which it fires: what consistency is worth by chance."""
    relevant: float | None
    """Share of all tokens that are relevant: what distinctiveness is worth by chance."""
    tokens: int
    """Tokens counted."""


def read_firing(store: Store, key: SetKey, index: int | None = None) -> dict[int, dict[str, Firing]]:
    """Neuron -> kind of excerpts -> numbers, of one neuron or of all of a set that have them."""
    names = ("excerpts", *MEASURES, "firing", "relevant", "tokens")
    query = f"SELECT neuron, {', '.join(names)} FROM firing WHERE set_id = ?"
    rows = store.rows(key, query) if index is None else store.rows(key, f"{query} AND neuron = ?", index)
    found: dict[int, dict[str, Firing]] = {}
    for neuron, *values in rows:
        one = Firing(**dict(zip(names, values, strict=True)))
        found.setdefault(neuron, {})[one.excerpts] = one
    return found


def count_sets(run: Path, keys: Sequence[SetKey]) -> list[LayerFiring]:
    """Count anew, at every threshold, for sets that have simulations."""
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
    """Which tokens of one excerpt are relevant, where the neuron's largest prediction is known."""
    return (simulated > 0) & (simulated >= np.float32(threshold) * np.float32(largest))
